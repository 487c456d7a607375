#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention_launch.h"
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/cuda_kv.h"
#include "kernels/cuda/launch_queue.h"
#include "kernels/round_weights.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {
namespace {

// Raised when a kernel's arithmetic changes: KV made before must not meet KV made after.
constexpr int kKernelRevision = 1;
constexpr int kMaxHeadDim = 256;
constexpr std::int64_t kTestCells = 1 << 26;  // of one test product: 256 MiB
constexpr std::int64_t kGatedRows = 2048;     // bounds the fp32 product that waits for SwiGLU

std::size_t Index(std::int64_t i) { return static_cast<std::size_t>(i); }

class CudaBuffer final : public Buffer {
 public:
  CudaBuffer(DeviceBlock block, std::size_t size) : block_(std::move(block)), size_(size) {}
  std::byte* data() const override { return block_.data(); }
  std::size_t size() const override { return size_; }

 private:
  DeviceBlock block_;
  std::size_t size_;
};

class CudaWeights final : public LinearWeights {
 public:
  std::int64_t in_features() const override { return k; }
  std::int64_t out_features() const override { return n; }
  std::size_t bytes() const override { return Index(n * k) * 2; }

  std::int64_t n = 0, k = 0;
  bool gated = false;
  int algorithm = kFastGemm;
  std::unique_ptr<Buffer> w;     // [n, k], in the backend's dtype
  std::unique_ptr<Buffer> bias;  // [n] fp32, or null
};

float TestValue(std::uint64_t i) {  // in [-1, 1), 16 bits of a hash
  i = (i + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  i = (i ^ (i >> 29)) * 0x94d049bb133111ebu;
  return static_cast<float>(static_cast<std::int64_t>(i >> 48) - 32768) / 32768.0f;
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<Device> device, const BackendOptions& options)
      : device_(std::move(device)),
        options_(options),
        queue_(*device_, options.memory_limit_bytes, options.staging_bytes),
        kv_(queue_) {
    Describe();
  }

  const Capabilities& capabilities() const override { return capabilities_; }

  Result<std::unique_ptr<Buffer>> Allocate(std::size_t bytes) override {
    KVS_ASSIGN_OR_RETURN(auto buffer, Take(std::max<std::size_t>(bytes, 1)));
    KVS_RETURN_IF_ERROR(device_->Fill(buffer->data(), 0, bytes));
    return std::unique_ptr<Buffer>(std::move(buffer));
  }

  Result<std::unique_ptr<LinearWeights>> MakeLinear(const LinearSpec& spec) override;
  std::size_t free_bytes() const override {
    return std::min(options_.memory_limit_bytes, device_->facts().memory_bytes) - queue_.memory().used_bytes();
  }

  void Embed(const EmbedParams& p) override {
    const auto rows = static_cast<std::int64_t>(p.ids.size());
    KVS_CHECK(p.out.rows == rows && p.out.cols == p.table.cols && p.out.dtype == DType::kF32);
    for (const std::int32_t id : p.ids) KVS_CHECK(id >= 0 && id < p.table.rows);
    if (rows == 0) return;
    queue_.Do("embed", rows, p.out.cols, [&]() -> Status {
      KVS_RETURN_IF_ERROR(queue_.staging().Begin(StagedBytes(p.ids)));
      KVS_ASSIGN_OR_RETURN(const std::int32_t* ids, queue_.staging().Put(p.ids));
      return device_->Embed(
          {ids, p.table.data, p.table.stride, p.table.dtype, p.out.row<float>(0), p.out.stride, p.out.cols, rows});
    });
  }

  void RmsNorm(const RmsNormParams& p) override {
    KVS_CHECK(p.x.dtype == DType::kF32 && p.out.rows == p.x.rows && p.out.cols == p.x.cols);
    KVS_CHECK(static_cast<std::int64_t>(p.weight.size()) == p.x.cols);
    if (p.x.rows == 0) return;
    queue_.Do("rms_norm", p.x.rows, p.x.cols, [&] {
      return device_->RmsNorm({p.x.row<float>(0), p.x.stride, p.weight.data(), p.eps, p.out.data, p.out.stride,
                               p.out.dtype, p.x.cols, p.x.rows});
    });
  }

  void Linear(const LinearParams& p) override {
    const auto& w = static_cast<const CudaWeights&>(*p.weights);
    KVS_CHECK(p.x.dtype == options_.dtype && p.x.cols == w.k && p.out.dtype == DType::kF32);
    KVS_CHECK(p.out.rows == p.x.rows && p.out.cols == w.n && !w.gated);
    if (p.x.rows == 0) return;
    Multiply(w, p.x, p.out.row<float>(0), p.out.stride, p.accumulate);
  }

  void GatedLinear(const GatedLinearParams& p) override {
    const auto& w = static_cast<const CudaWeights&>(*p.weights);
    KVS_CHECK(p.x.dtype == options_.dtype && p.x.cols == w.k && p.out.rows == p.x.rows && 2 * p.out.cols == w.n &&
              w.gated);
    for (std::int64_t first = 0; first < p.x.rows; first += kGatedRows) {
      const std::int64_t rows = std::min(kGatedRows, p.x.rows - first);
      auto scratch = Take(Index(rows * w.n) * sizeof(float));
      if (!scratch.ok()) return queue_.Fail(scratch.status());
      auto* product = reinterpret_cast<float*>((*scratch)->data());
      MatrixView x = p.x;
      x.data = p.x.row<std::uint16_t>(first);
      x.rows = rows;
      Multiply(w, x, product, w.n, false);
      std::byte* out = p.out.row<std::byte>(0) + Index(first * p.out.stride) * DTypeBytes(p.out.dtype);
      queue_.Do("swiglu", rows, p.out.cols, [&] {
        return device_->SwiGlu({product, w.n, out, p.out.stride, p.out.dtype, p.out.cols, rows});
      });
    }
  }

  void StoreKv(const StoreKvParams& p) override;
  void Attention(const AttentionParams& p) override;

  void CopyPageRows(const KvPages& pages, PageIndex from, PageIndex to, int tokens) override {
    KVS_CHECK(from < pages.num_pages && to < pages.num_pages && tokens >= 0 && tokens <= kPageTokens);
    const KvLayout& layout = pages.layout;
    const std::size_t bytes = layout.slab_bytes() / kPageTokens * Index(tokens);
    KVS_CHECK(bytes % 16 == 0);
    if (tokens == 0 || from == to) return;
    queue_.Do("copy_page_rows", tokens, layout.num_layers, [&] {
      return device_->CopyPageRows({pages.base + from * layout.page_bytes(), pages.base + to * layout.page_bytes(),
                                    static_cast<std::int64_t>(layout.slab_bytes()), static_cast<std::int64_t>(bytes),
                                    layout.num_layers * 2 * layout.num_kv_heads});
    });
  }

  Status Upload(std::byte* to, const void* from, std::size_t bytes) override {
    if (queue_.failed().ok() && bytes > 0) queue_.Keep(device_->CopyIn(to, from, bytes));
    return Sync();
  }
  Status Download(void* to, const std::byte* from, std::size_t bytes) override {
    if (queue_.failed().ok() && bytes > 0) queue_.Keep(device_->CopyOut(to, from, bytes));
    return Sync();
  }

  DeviceKv* device_kv() override { return &kv_; }

  Status Sync() override { return queue_.Sync(); }

  Status SelfTest() override;

 private:
  void Describe();

  Result<std::unique_ptr<CudaBuffer>> Take(std::size_t bytes) {
    KVS_ASSIGN_OR_RETURN(DeviceBlock block, DeviceBlock::Take(queue_.memory(), bytes));
    return std::make_unique<CudaBuffer>(std::move(block), bytes);
  }

  void Multiply(const CudaWeights& w, const MatrixView& x, float* out, std::int64_t out_stride, bool accumulate) {
    queue_.Do("linear", x.rows, w.n, [&] {
      return device_->Gemm({reinterpret_cast<const std::uint16_t*>(w.w->data()), x.row<std::uint16_t>(0), x.stride, out,
                            out_stride, x.rows, ShapeOf(w), accumulate},
                           w.algorithm);
    });
    if (w.bias == nullptr) return;
    queue_.Do("bias", x.rows, w.n, [&] {
      return device_->AddBias({out, out_stride, reinterpret_cast<const float*>(w.bias->data()), w.n, x.rows});
    });
  }

  GemmShape ShapeOf(const CudaWeights& w) const { return {w.n, w.k, options_.dtype}; }

  Status Pin(CudaWeights* weights);
  Result<bool> RowsAreInvariant(const CudaWeights& weights, int algorithm);

  std::unique_ptr<Device> device_;
  const BackendOptions options_;
  LaunchQueue queue_;
  CudaKv kv_;
  std::map<GemmShape, int> pinned_;  // candidate
  Capabilities capabilities_;
};

void CudaBackend::Describe() {
  const DeviceFacts& facts = device_->facts();
  capabilities_ = {.device = "cuda",
                   .isa = facts.arch,
                   .linear = facts.linear + (options_.deterministic ? "/det" : "/fast"),
                   .compute = options_.dtype,
                   .threads = facts.multiprocessors,
                   .numerics_id = "",
                   .host_memory = false,
                   .head_dims = {64, 128}};
  // Which algorithms cuBLASLt offers differs between GPUs of one architecture, and with it the order of sums.
  for (const auto& [shape, candidate] : pinned_) {
    char identity[20];
    std::snprintf(identity, sizeof identity, "#%016llx",
                  static_cast<unsigned long long>(device_->GemmIdentity(shape, candidate)));
    capabilities_.linear += "/" + std::to_string(shape.n) + "x" + std::to_string(shape.k) + identity;
  }
  capabilities_.numerics_id = "cuda/" + facts.arch + "/" + std::string(DTypeName(options_.dtype)) + "/" +
                              capabilities_.linear + "/split" + std::to_string(kSplitTokens) + "/r" +
                              std::to_string(kKernelRevision);
}

Result<std::unique_ptr<LinearWeights>> CudaBackend::MakeLinear(const LinearSpec& spec) {
  KVS_CHECK(!spec.parts.empty());
  auto weights = std::make_unique<CudaWeights>();
  weights->k = spec.parts[0].cols;
  weights->gated = spec.gated;
  for (const HostMatrix& part : spec.parts) {
    KVS_CHECK(part.cols == weights->k);
    weights->n += part.rows;
  }
  KVS_CHECK(!spec.gated || (spec.parts.size() == 2 && spec.parts[0].rows == spec.parts[1].rows));
  KVS_CHECK(spec.bias.empty() || static_cast<std::int64_t>(spec.bias.size()) == weights->n);
  if (weights->k % 8 != 0 || weights->n % 8 != 0) {
    return FailedPrecondition("a linear layer of " + std::to_string(weights->n) + " x " + std::to_string(weights->k) +
                              " on the GPU: sizes must be multiples of 8; use the CPU");
  }
  KVS_ASSIGN_OR_RETURN(weights->w, Take(weights->bytes()));
  std::vector<std::uint16_t> rounded;
  std::byte* to = weights->w->data();
  for (const HostMatrix& part : spec.parts) {
    rounded.resize(Index(part.rows * part.cols));
    const float* const beyond = RoundWeights(options_.dtype, {part.data, rounded.size()}, rounded.data());
    if (beyond != nullptr) return BeyondRange(options_.dtype, *beyond);
    KVS_RETURN_IF_ERROR(Upload(to, rounded.data(), rounded.size() * 2));
    to += rounded.size() * 2;
  }
  if (!spec.bias.empty()) {
    KVS_ASSIGN_OR_RETURN(weights->bias, Take(spec.bias.size_bytes()));
    KVS_RETURN_IF_ERROR(Upload(weights->bias->data(), spec.bias.data(), spec.bias.size_bytes()));
  }
  if (options_.deterministic) KVS_RETURN_IF_ERROR(Pin(weights.get()));
  return std::unique_ptr<LinearWeights>(std::move(weights));
}

// The first candidate whose rows have the same bits in any batch.
Status CudaBackend::Pin(CudaWeights* weights) {
  const GemmShape shape = ShapeOf(*weights);
  if (const auto it = pinned_.find(shape); it != pinned_.end()) {
    weights->algorithm = it->second;
    return OkStatus();
  }
  KVS_ASSIGN_OR_RETURN(const int candidates, device_->GemmCandidates(shape));
  for (int c = 0; c < candidates; ++c) {
    KVS_ASSIGN_OR_RETURN(const bool invariant, RowsAreInvariant(*weights, c));
    if (!invariant) continue;
    weights->algorithm = pinned_[shape] = c;
    Describe();
    return OkStatus();
  }
  return Internal("none of " + std::to_string(candidates) + " matrix algorithms for " + std::to_string(weights->n) +
                  " x " + std::to_string(weights->k) + " gives a row the same bits in any batch on this GPU");
}

// Rows in groups of several sizes and at several places against the same rows among many. An algorithm that refuses a
// number of rows is none for us.
Result<bool> CudaBackend::RowsAreInvariant(const CudaWeights& weights, int algorithm) {
  const std::int64_t n = weights.n, k = weights.k;
  const std::int64_t all = std::clamp<std::int64_t>(kTestCells / n, 300, 2048);
  std::vector<std::uint16_t> values(Index(all * k));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<std::uint16_t>(HalfBits(options_.dtype, TestValue(i)));
  }
  KVS_ASSIGN_OR_RETURN(const auto x, Take(values.size() * 2));
  KVS_ASSIGN_OR_RETURN(const auto out, Take(Index(all * n) * sizeof(float)));
  KVS_RETURN_IF_ERROR(Upload(x->data(), values.data(), values.size() * 2));
  std::vector<float> whole, part;
  struct Group {
    std::int64_t first, rows;
  };
  for (const Group& g :
       {Group{0, all}, Group{0, 1}, Group{all - 1, 1}, Group{13, 7}, Group{100, 64}, Group{170, 128}, Group{0, 300}}) {
    std::vector<float>& to = whole.empty() ? whole : part;
    to.resize(Index(g.rows * n));
    Status launched;
    queue_.Do("self_test", g.rows, n, [&] {
      launched = device_->Gemm({reinterpret_cast<const std::uint16_t*>(weights.w->data()),
                                reinterpret_cast<const std::uint16_t*>(x->data()) + g.first * k, k,
                                reinterpret_cast<float*>(out->data()), n, g.rows, ShapeOf(weights), false},
                               algorithm);
      return launched.code() == StatusCode::kUnimplemented ? OkStatus() : launched;
    });
    if (launched.code() == StatusCode::kUnimplemented) return false;
    KVS_RETURN_IF_ERROR(Download(to.data(), out->data(), to.size() * sizeof(float)));
    if (&to == &part && std::memcmp(part.data(), whole.data() + g.first * n, part.size() * sizeof(float)) != 0) {
      return false;
    }
  }
  return true;
}

Status CudaBackend::SelfTest() {
  if (!options_.deterministic) return Sync();
  // A shape of its own when there is no layer yet; MakeLinear has tested those there are.
  std::vector<float> values(256 * 256);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = TestValue(i + 7);
  const HostMatrix part{values.data(), 256, 256};
  pinned_.erase({256, 256, options_.dtype});
  return MakeLinear({.parts = {&part, 1}, .bias = {}, .gated = false}).status();
}

void CudaBackend::StoreKv(const StoreKvParams& p) {
  const KvLayout& layout = p.pages.layout;
  const int d = layout.head_dim;
  KVS_CHECK(p.qkv.dtype == DType::kF32 && p.qkv.cols == std::int64_t{p.num_heads + 2 * layout.num_kv_heads} * d);
  KVS_CHECK(static_cast<std::int64_t>(p.positions.size()) == p.qkv.rows &&
            static_cast<std::int64_t>(p.slots.size()) == p.qkv.rows && layout.dtype == options_.dtype);
  KVS_CHECK(p.layer >= 0 && p.layer < layout.num_layers && 2 * p.rope.half <= d && d <= kMaxHeadDim);
  KVS_CHECK(p.q_norm.empty() || static_cast<int>(p.q_norm.size()) == d);
  KVS_CHECK(p.k_norm.empty() || static_cast<int>(p.k_norm.size()) == d);
  if (p.qkv.rows == 0) return;
  const std::vector<SlotView> slots = SlotViews(p.pages, p.slots);
  for (const std::int64_t position : p.positions) KVS_CHECK(position >= 0 && position < p.rope.positions);
  queue_.Do("store_kv", p.qkv.rows, p.layer, [&]() -> Status {
    const std::span<const SlotView> staged(slots);
    KVS_RETURN_IF_ERROR(queue_.staging().Begin(StagedBytes(p.positions) + StagedBytes(staged)));
    StoreKvArgs args;
    KVS_ASSIGN_OR_RETURN(args.positions, queue_.staging().Put(p.positions));
    KVS_ASSIGN_OR_RETURN(args.slots, queue_.staging().Put(staged));
    args.qkv = p.qkv.row<float>(0);
    args.qkv_stride = p.qkv.stride;
    args.num_heads = p.num_heads;
    args.head_dim = d;
    args.q_norm = p.q_norm.empty() ? nullptr : p.q_norm.data();
    args.k_norm = p.k_norm.empty() ? nullptr : p.k_norm.data();
    args.eps = p.eps;
    args.rope = {p.rope.cos.data(), p.rope.sin.data(), p.rope.positions, p.rope.half};
    args.pages = ViewOf(p.pages, p.layer);
    args.rows = p.qkv.rows;
    return device_->StoreKv(args);
  });
}

void CudaBackend::Attention(const AttentionParams& p) {
  AttentionPlan plan = PlanAttention(p, {.spread_bytes = options_.spread_bytes});
  if (p.q.rows == 0) return;
  const int d = p.pages.layout.head_dim;
  std::unique_ptr<CudaBuffer> scratch;
  if (plan.partials > 0) {
    auto taken = Take(Index(plan.partials * (d + 2)) * sizeof(float));
    if (!taken.ok()) return queue_.Fail(taken.status());
    scratch = std::move(taken).value();
  }
  AttentionArgs args;
  if (queue_.failed().ok()) queue_.Keep(StageAttention(p, &plan, 0, queue_.staging(), &args));
  args.out = p.out.data;
  args.out_stride = p.out.stride;
  args.out_dtype = p.out.dtype;
  if (scratch != nullptr) {
    args.partial_out = reinterpret_cast<float*>(scratch->data());
    args.partial_stats = args.partial_out + plan.partials * d;
  }
  const int items = static_cast<int>(plan.items.size());
  if (items > 0) {
    queue_.Do("attention", p.q.rows, items, [&] { return device_->Attention(args, d, items, plan.spread); });
  }
  if (plan.spread) {
    const std::int64_t packed = p.q.rows * args.group;
    queue_.Do("merge", p.q.rows, plan.partials, [&] { return device_->Merge(args, d, packed); });
  }
}

}  // namespace

Result<std::unique_ptr<Backend>> NewBackendOn(std::unique_ptr<Device> device, const BackendOptions& options) {
  return std::unique_ptr<Backend>(std::make_unique<CudaBackend>(std::move(device), options));
}

}  // namespace kvshare::kernels::cuda
