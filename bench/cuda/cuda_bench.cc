// Every operation of a backend at the shapes of an 8B Llama layer (hidden 4096, 32 heads of 128, 8 kv heads), timed by
// the clock over enqueued repetitions, random data. Prints one JSON object a line:
//   {"part": "attention", "case": "dense 8192", "ms": ..., "tflops": ...}   (or "gbps"; useful work only)
//
//   cuda_bench [PART...] [--on cuda|cpu] [--small]
//
// Parts and workloads:
//   ceilings   device copy (read + write), pinned copies to and from the device; cuda only
//   gemm       the layer's matrices for 1 to 8192 rows, fast and det; 8192 x 8192 x 8192
//   attention  causal prefill of 8192 and 16384, its last 2048 rows, 15 % of its rows scattered
//   decode     32 agents with 256 tokens each behind 8192: sharing them, each with the same pages, each with a copy
//   rows       embed, rms_norm, store_kv, copy_page_rows
//   repair     attention mass that the last 128 of 8192 tokens pay, the choice of 15 % by it; KVCOMM's two passes over
//              1024 tokens of 32 layers with 1, 5 and 20 anchors; cuda only
//   link       64 pages of 32 layers from pinned memory and to it, alone and beside matrix products; cuda only
// --small divides the sizes by 64: to see that it runs (with --on cpu: anywhere). Its numbers mean nothing.
// Exit codes: 0 done, 1 failed, 2 usage, 3 no GPU that can be used.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "bench/cuda/ceilings.h"
#include "kernels/cuda_plugin.h"
#include "kernels/device_kv.h"

namespace {

using namespace kvshare;           // NOLINT
using namespace kvshare::kernels;  // NOLINT

constexpr int kHeads = 32, kKvHeads = 8, kDim = 128;
constexpr std::int64_t kHidden = 4096, kInner = 14336;
constexpr double kSecondsEach = 0.25;

[[noreturn]] void Die(const Status& status) {
  std::fprintf(stderr, "cuda_bench: %s\n", status.message().c_str());
  std::exit(1);
}
void Check(const Status& status) {
  if (!status.ok()) Die(status);
}
template <typename T>
T Must(Result<T> result) {
  if (!result.ok()) Die(result.status());
  return std::move(result).value();
}

void Print(const std::string& part, const std::string& name, double seconds, const char* unit, double per_second) {
  std::printf("{\"part\": \"%s\", \"case\": \"%s\", \"ms\": %.5f, \"%s\": %.2f}\n", part.c_str(), name.c_str(),
              seconds * 1e3, unit, per_second);
  std::fflush(stdout);
}

class Bench {
 public:
  Bench(Backend& backend, std::int64_t divide) : backend_(backend), divide_(divide) {
    // One block of noise, from which every buffer is filled. Zeros would be faster than data.
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int i = 0; i < 1 << 20; ++i) {
      const float x = normal(random);
      std::uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      floats_.push_back(x);
      halves_.push_back(static_cast<std::uint16_t>(bits >> 16));
    }
  }

  void Gemm(bool deterministic);
  void Prefill();
  void Decode();
  void Rows();
  void Mass();
  void Anchors();
  void Link();

 private:
  std::int64_t Size(std::int64_t n) const { return std::max<std::int64_t>(64, n / divide_); }
  std::int64_t Count(std::int64_t n) const { return std::max<std::int64_t>(1, n / divide_); }

  std::unique_ptr<Buffer> Fill(std::size_t bytes, const void* noise, std::size_t noise_bytes) {
    auto buffer = Must(backend_.Allocate(bytes));
    for (std::size_t at = 0; at < bytes; at += noise_bytes) {
      Check(backend_.Upload(buffer->data() + at, noise, std::min(noise_bytes, bytes - at)));
    }
    return buffer;
  }
  MatrixView Matrix(std::int64_t rows, std::int64_t cols, DType dtype) {
    const std::size_t bytes = static_cast<std::size_t>(rows * cols) * DTypeBytes(dtype);
    buffers_.push_back(dtype == DType::kF32 ? Fill(bytes, floats_.data(), floats_.size() * 4)
                                            : Fill(bytes, halves_.data(), halves_.size() * 2));
    return {buffers_.back()->data(), dtype, rows, cols, cols};
  }
  KvPages Pages(std::int64_t tokens, int layers = 1) {
    const KvLayout layout{layers, kKvHeads, kDim, DType::kBf16};
    const auto count = static_cast<PageIndex>((tokens + kPageTokens - 1) / kPageTokens);
    return {
        static_cast<std::byte*>(Matrix(count, static_cast<std::int64_t>(layout.page_bytes() / 2), DType::kBf16).data),
        count, layout};
  }
  RopeTable Rope(std::int64_t positions) {
    std::vector<float> cos, sin;
    for (std::int64_t p = 0; p < positions; ++p) {
      for (int j = 0; j < kDim / 2; ++j) {
        const double angle = static_cast<double>(p) * std::pow(500000.0, -2.0 * j / kDim);
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    buffers_.push_back(Fill(cos.size() * 4, cos.data(), cos.size() * 4));
    const auto* c = reinterpret_cast<const float*>(buffers_.back()->data());
    buffers_.push_back(Fill(sin.size() * 4, sin.data(), sin.size() * 4));
    const auto* s = reinterpret_cast<const float*>(buffers_.back()->data());
    return {{c, cos.size()}, {s, sin.size()}, positions, kDim / 2};
  }

  // Seconds of one call: the least of three series.
  double Time(const std::function<void()>& call) {
    using Clock = std::chrono::steady_clock;
    const auto series = [&](int repeats) {
      const auto begin = Clock::now();
      for (int i = 0; i < repeats; ++i) call();
      Check(backend_.Sync());
      return std::chrono::duration<double>(Clock::now() - begin).count() / repeats;
    };
    const double once = std::min(series(1), series(1));
    const int repeats = static_cast<int>(std::clamp(kSecondsEach / divide_ / once, 1.0, 1000.0));
    return std::min({series(repeats), series(repeats), series(repeats)});
  }

  // 4 FLOP for each of head_dim, head and visible key.
  void Attention(const std::string& part, const std::string& name, const AttentionParams& p, double visible) {
    const double seconds = Time([&] { backend_.Attention(p); });
    Print(part, name, seconds, "tflops", 4.0 * kHeads * kDim * visible / seconds / 1e12);
  }
  AttentionParams Params(std::span<const std::int64_t> positions, const KvPages& pages, const RopeTable& rope) {
    AttentionParams p;
    const auto rows = static_cast<std::int64_t>(positions.size());
    p.q = Matrix(rows, std::int64_t{kHeads} * kDim, DType::kF32);
    p.num_heads = kHeads;
    p.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    p.rope = rope;
    p.positions = positions;
    p.pages = pages;
    p.out = Matrix(rows, std::int64_t{kHeads} * kDim, DType::kBf16);
    return p;
  }

  Backend& backend_;
  const std::int64_t divide_;
  std::vector<float> floats_;
  std::vector<std::uint16_t> halves_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

void Bench::Gemm(bool deterministic) {
  struct Shape {
    const char* name;
    std::int64_t n, k;
    std::vector<std::int64_t> rows;
  };
  const std::vector<std::int64_t> rows = {1, 16, 256, 2048, 8192};
  for (const Shape& s : {Shape{"qkv", kHidden + 2 * kKvHeads * kDim, kHidden, rows}, Shape{"o", kHidden, kHidden, rows},
                         Shape{"gate_up", 2 * kInner, kHidden, rows}, Shape{"down", kHidden, kInner, rows},
                         Shape{"square", 8192, 8192, {8192}}}) {
    const std::int64_t n = Size(s.n), k = Size(s.k);
    std::vector<float> values(static_cast<std::size_t>(n * k));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = 0.02f * floats_[i % floats_.size()];
    const HostMatrix part{values.data(), n, k};
    const auto weights = Must(backend_.MakeLinear({.parts = {&part, 1}, .bias = {}, .gated = false}));
    for (const std::int64_t wanted : s.rows) {
      const std::int64_t m = Count(wanted);
      const MatrixView x = Matrix(m, k, DType::kBf16), out = Matrix(m, n, DType::kF32);
      const double seconds = Time([&] { backend_.Linear({.x = x, .weights = weights.get(), .out = out}); });
      const std::string name = std::string(s.name) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" +
                               std::to_string(k) + (deterministic ? " det" : " fast");
      Print("gemm", name, seconds, "tflops", 2.0 * static_cast<double>(m * n * k) / seconds / 1e12);
      buffers_.clear();
    }
  }
}

void Bench::Prefill() {
  for (const std::int64_t length : {Size(8192), Size(16384)}) {
    const KvPages pages = Pages(length);
    const RopeTable rope = Rope(length);
    std::vector<PageIndex> table(pages.num_pages);
    std::iota(table.begin(), table.end(), PageIndex{0});
    std::shuffle(table.begin(), table.end(), std::mt19937(3));
    std::vector<std::int64_t> all(static_cast<std::size_t>(length));
    std::iota(all.begin(), all.end(), 0);
    std::vector<std::int64_t> scattered;
    std::mt19937 random(4);
    for (const std::int64_t at : all) {
      if (random() % 100 < 15) scattered.push_back(at);
    }
    const std::vector<std::int64_t> last(all.end() - static_cast<std::ptrdiff_t>(length / 4), all.end());
    const struct {
      const char* name;
      const std::vector<std::int64_t>& positions;
    } cases[] = {{"dense", all}, {"last quarter of", last}, {"15 % of", scattered}};
    for (const auto& c : cases) {
      AttentionParams p = Params(c.positions, pages, rope);
      const KvSegment s{.pages = table, .length = length, .row_end = p.q.rows};
      p.segments = {&s, 1};
      double visible = 0;
      for (const std::int64_t at : c.positions) visible += static_cast<double>(at + 1);
      Attention("attention", std::string(c.name) + " " + std::to_string(length), p, visible);
    }
    buffers_.clear();
  }
}

void Bench::Decode() {
  const std::int64_t prefix = Size(8192), own = Size(256), agents = std::max<std::int64_t>(2, Count(32));
  const RopeTable rope = Rope(prefix + own);
  const std::int64_t prefix_pages = prefix / kPageTokens, own_pages = (own + kPageTokens - 1) / kPageTokens;
  const KvPages pages = Pages((agents * (prefix_pages + own_pages)) * kPageTokens);
  const std::vector<std::int64_t> positions(static_cast<std::size_t>(agents), prefix + own - 1);
  std::vector<PageIndex> table(pages.num_pages);
  std::iota(table.begin(), table.end(), PageIndex{0});
  const auto pages_from = [&](std::int64_t first, std::int64_t count) {
    return std::span<const PageIndex>(table).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
  };
  const std::string size = std::to_string(agents) + " agents, " + std::to_string(prefix) + " + " + std::to_string(own);
  for (const char* how : {"shared", "same pages", "copies"}) {
    const bool shared = std::strcmp(how, "shared") == 0, copies = std::strcmp(how, "copies") == 0;
    AttentionParams p = Params(positions, pages, rope);
    std::vector<KvSegment> segments;
    if (shared) segments.push_back({.pages = pages_from(0, prefix_pages), .length = prefix, .row_end = agents});
    for (std::int64_t a = 0; a < agents; ++a) {
      if (!shared) {
        segments.push_back({.pages = pages_from(copies ? a * prefix_pages : 0, prefix_pages),
                            .length = prefix,
                            .row_begin = a,
                            .row_end = a + 1});
      }
      segments.push_back({.pages = pages_from(agents * prefix_pages + a * own_pages, own_pages),
                          .start = prefix,
                          .length = own,
                          .row_begin = a,
                          .row_end = a + 1});
    }
    p.segments = segments;
    Attention("decode", std::string(how) + ", " + size, p, static_cast<double>(agents * (prefix + own)));
  }
  buffers_.clear();
}

void Bench::Rows() {
  const std::int64_t rows = Count(8192), qkv_cols = (kHeads + 2 * kKvHeads) * kDim;
  const KvPages pages = Pages(2 * rows);
  const RopeTable rope = Rope(rows);
  const MatrixView table = Matrix(Count(32768), kHidden, DType::kBf16), x = Matrix(rows, kHidden, DType::kF32);
  const MatrixView normed = Matrix(rows, kHidden, DType::kBf16), qkv = Matrix(rows, qkv_cols, DType::kF32);
  std::vector<std::int32_t> ids;
  std::vector<std::int64_t> positions;
  std::vector<KvSlot> slots;
  for (std::int64_t r = 0; r < rows; ++r) {
    ids.push_back(static_cast<std::int32_t>((r * 7919) % table.rows));
    positions.push_back(r);
    slots.push_back({static_cast<PageIndex>(r / kPageTokens), static_cast<int>(r % kPageTokens)});
  }
  const std::span<const float> weight(x.row<float>(0), static_cast<std::size_t>(kHidden));
  const auto report = [&](const char* name, double bytes, const std::function<void()>& call) {
    const double seconds = Time(call);
    Print("rows", std::string(name) + " " + std::to_string(rows), seconds, "gbps", bytes / seconds / 1e9);
  };
  const double cells = static_cast<double>(rows * kHidden);
  report("embed", cells * 6, [&] { backend_.Embed({.ids = ids, .table = table, .out = x}); });
  report("rms_norm", cells * 6, [&] { backend_.RmsNorm({.x = x, .weight = weight, .eps = 1e-5f, .out = normed}); });
  const double kv = static_cast<double>(rows) * kKvHeads * kDim * 2;
  report("store_kv", kv * 6, [&] {
    backend_.StoreKv({.qkv = qkv,
                      .num_heads = kHeads,
                      .layer = 0,
                      .q_norm = {},
                      .k_norm = {},
                      .rope = rope,
                      .positions = positions,
                      .slots = slots,
                      .pages = pages});
  });
  const auto page = static_cast<double>(pages.layout.page_bytes());
  const int copies = static_cast<int>(std::min<PageIndex>(64, pages.num_pages / 2));
  report("copy_page_rows", 2 * page * copies, [&] {
    for (int i = 0; i < copies; ++i) {
      backend_.CopyPageRows(pages, static_cast<PageIndex>(i), pages.num_pages - 1 - static_cast<PageIndex>(i), 64);
    }
  });
  buffers_.clear();
}

// Scores are useful once, and computed twice. The choice is small: its time is launches and the wait.
void Bench::Mass() {
  if (backend_.device_kv() == nullptr) return;
  const std::int64_t length = Size(8192), looking = Count(128);
  const KvPages pages = Pages(length);
  const RopeTable rope = Rope(length);
  std::vector<PageIndex> table(pages.num_pages);
  std::iota(table.begin(), table.end(), PageIndex{0});
  std::vector<std::int64_t> positions, rows;
  double visible = 0;
  for (std::int64_t i = 0; i < looking; ++i) {
    rows.push_back(i);
    positions.push_back(length - looking + i);
    visible += static_cast<double>(positions.back() + 1);
  }
  AttentionParams p = Params(positions, pages, rope);
  const KvSegment s{.pages = table, .length = length, .row_end = looking};
  p.segments = {&s, 1};
  auto* const mass = Matrix(1, length, DType::kF32).row<float>(0);
  double seconds = Time([&] { backend_.device_kv()->AttentionMass(p, rows, {&mass, 1}); });
  const std::string name = "attention_mass " + std::to_string(looking) + " of " + std::to_string(length);
  Print("repair", name, seconds, "tflops", 2.0 * kHeads * kDim * visible / seconds / 1e12);
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(length * 15 / 100));
  seconds = Time([&] { Check(backend_.device_kv()->ChooseRowsByMass(mass, nullptr, length, chosen)); });
  Print("repair", "choose_rows " + std::to_string(chosen.size()) + " of " + std::to_string(length), seconds, "gbps",
        static_cast<double>(length) * 4 / seconds / 1e9);
  buffers_.clear();
}

// What each pass has to move: the first reads every anchor's base and the tokens, the second every offset and the
// tokens, which it writes. The time holds the small reads and waits between.
void Bench::Anchors() {
  if (backend_.device_kv() == nullptr) return;
  DeviceKv& kv = *backend_.device_kv();
  constexpr int kLayers = 32;
  const std::int64_t tokens = Size(1024);
  const KvPages pages = Pages(2 * tokens, kLayers);
  const RopeTable rope = Rope(2 * tokens);
  std::vector<KvSlot> from, to;
  std::vector<std::int64_t> positions;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto page = static_cast<PageIndex>(t / kPageTokens);
    from.push_back({page, static_cast<int>(t % kPageTokens)});
    to.push_back({pages.num_pages - 1 - page, static_cast<int>(t % kPageTokens)});
    positions.push_back(t);
  }
  const std::int64_t values = 2 * tokens * kLayers * kKvHeads * kDim;  // of one copy of the tokens
  std::vector<AnchorKv> anchors;
  for (const int count : {1, 5, 20}) {
    while (static_cast<int>(anchors.size()) < count) {
      // Codes of base and offset; the scales of both are the same noise.
      const auto* codes = static_cast<const std::int8_t*>(Matrix(1, values, DType::kBf16).data);
      const auto* scales = static_cast<const std::uint16_t*>(Matrix(1, values / 32, DType::kBf16).data);
      anchors.push_back({{codes, scales}, {codes + values, scales}, tokens});
    }
    const MatrixView differences = Matrix(2 * tokens, count, DType::kF32);
    std::vector<float> distances(static_cast<std::size_t>(count));
    const AnchoredTokens anchored{pages, rope, from, positions, anchors};
    // 2 bytes a value of the tokens themselves, 34 for 32 of an anchor.
    const auto report = [&](const char* name, int copies, const std::function<void()>& call) {
      const double seconds = Time(call), each = 2.0 * copies + 34.0 / 32 * count;
      Print("repair", std::string(name) + " " + std::to_string(tokens) + " tokens, " + std::to_string(count), seconds,
            "gbps", each * static_cast<double>(values) / seconds / 1e9);
    };
    report("anchor_distances", 1, [&] { Check(kv.AnchorDistances(anchored, differences.row<float>(0), distances)); });
    report("apply_anchors", 2, [&] { kv.ApplyAnchors(anchored, differences.row<float>(0), to, positions); });
  }
  buffers_.clear();
}

// The products are as many as take about as long as the copies at 50 GB/s and 400 TFLOP/s: what is lost beside them is
// what does not overlap.
void Bench::Link() {
  if (backend_.device_kv() == nullptr) return;
  DeviceKv& kv = *backend_.device_kv();
  const KvPages pages = Pages(Size(64 * kPageTokens), 32);
  std::vector<PageIndex> index(pages.num_pages);
  std::iota(index.begin(), index.end(), PageIndex{0});
  const std::size_t bytes = pages.num_pages * pages.layout.page_bytes();
  const auto pinned = Must(kv.AllocatePinned(bytes));
  for (std::size_t at = 0; at < bytes; at += floats_.size() * 4) {
    std::memcpy(pinned->data() + at, floats_.data(), std::min(bytes - at, floats_.size() * 4));
  }
  const std::int64_t n = Size(kHidden), rows = Count(8192);
  const MatrixView x = Matrix(rows, n, DType::kBf16), out = Matrix(rows, n, DType::kF32);
  const std::vector<float> values(static_cast<std::size_t>(n * n), 0.01f);
  const HostMatrix part{values.data(), n, n};
  const auto weights = Must(backend_.MakeLinear({.parts = {&part, 1}, .bias = {}, .gated = false}));
  const double flops = 2.0 * static_cast<double>(rows * n * n);
  const int products = static_cast<int>(std::clamp(static_cast<double>(bytes) / 50e9 / (flops / 400e12), 1.0, 100.0));
  for (const bool beside : {false, true}) {
    const auto report = [&](const char* name, const std::function<Result<std::unique_ptr<PageTransfer>>()>& begin) {
      const double seconds = Time([&] {
        const auto transfer = Must(begin());
        for (int i = 0; i < products && beside; ++i) {
          backend_.Linear({.x = x, .weights = weights.get(), .out = out});
        }
        Check(transfer->Wait());
      });
      Print("link", std::string(name) + (beside ? " beside products" : ""), seconds, "gbps",
            static_cast<double>(bytes) / seconds / 1e9);
    };
    report("promote_pages", [&] { return kv.PromotePages(pages, pinned->data(), index); });
    report("demote_pages", [&] { return kv.DemotePages(pages, index, pinned->data()); });
  }
  buffers_.clear();
}

std::unique_ptr<Backend> Open(const std::string& on, bool deterministic) {
  if (on == "cpu") return Must(NewCpuBackend({}));
  auto backend = NewCudaBackend({.deterministic = deterministic});
  if (!backend.ok()) {
    std::fprintf(stderr, "cuda_bench: no GPU: %s\n", backend.status().message().c_str());
    std::exit(3);
  }
  return std::move(backend).value();
}

}  // namespace

int main(int argc, char** argv) {
  const std::set<std::string> known = {"ceilings", "gemm", "attention", "decode", "rows", "repair", "link"};
  std::set<std::string> parts;
  std::string on = "cuda";
  std::int64_t divide = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--small") {
      divide = 64;
    } else if (word == "--on" && i + 1 < argc &&
               (!std::strcmp(argv[i + 1], "cpu") || !std::strcmp(argv[i + 1], "cuda"))) {
      on = argv[++i];
    } else if (known.count(word) != 0) {
      parts.insert(word);
    } else {
      std::fprintf(stderr,
                   "cuda_bench: '%s'? parts: ceilings gemm attention decode rows repair link; --on cuda|cpu, --small\n",
                   word.c_str());
      return 2;
    }
  }
  if (parts.empty()) parts = known;
  {
    const std::unique_ptr<Backend> backend = Open(on, true);
    std::printf("{\"part\": \"machine\", \"case\": \"%s\"}\n", backend->capabilities().numerics_id.c_str());
    if (parts.count("ceilings") != 0 && on == "cuda") {
      Check(MeasureCeilings(
          [](const char* name, double seconds, double gbps) { Print("ceilings", name, seconds, "gbps", gbps); }));
    }
    Bench bench(*backend, divide);
    if (parts.count("gemm") != 0) bench.Gemm(true);
    if (parts.count("attention") != 0) bench.Prefill();
    if (parts.count("decode") != 0) bench.Decode();
    if (parts.count("rows") != 0) bench.Rows();
    if (parts.count("repair") != 0) {
      bench.Mass();
      bench.Anchors();
    }
    if (parts.count("link") != 0) bench.Link();
  }
  if (parts.count("gemm") != 0 && on == "cuda") {
    const std::unique_ptr<Backend> backend = Open(on, false);
    Bench(*backend, divide).Gemm(false);
  }
  return 0;
}
