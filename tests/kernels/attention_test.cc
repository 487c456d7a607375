// Attention against the double-precision oracle, and its bit contract: a row's output is a function of its query, its
// position and its segments' keys, however rows are batched, chunked, threaded or placed on pages.
//
// Every byte of a page that no row may look at holds NaN here, so a leak shows in any test.
#include "kernels/cpu/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "tests/reference/attention_reference.h"

namespace kvshare::kernels {
namespace {

constexpr std::int64_t kMaxPosition = 8192;

struct Shape {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int half;  // rotated pairs
};

std::uint16_t ToBf16(float f) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A run of keys by content: what a segment shows, independent of the pages it will lie on.
struct KeyRun {
  std::int64_t start = 0;
  std::int64_t length = 0;
  std::int64_t shift = 0;
  std::vector<float> k, v;  // [kv_head][length][head_dim]
  std::vector<bool> skipped;
};

// One sequence: its runs in order and its query rows.
struct Sequence {
  std::vector<KeyRun> runs;
  std::vector<std::int64_t> positions;
  std::vector<float> q;  // [rows][num_heads * head_dim]
};

// Rows of a sequence as they enter a batch.
struct Part {
  const Sequence* sequence;
  std::vector<int> rows;
};

class World {
 public:
  World(Shape shape, DType dtype, std::uint64_t seed) : shape_(shape), dtype_(dtype), random_(seed) {
    for (int j = 0; j < shape.half; ++j) inv_freq_.push_back(std::pow(10000.0, -double(j) / shape.half));
    for (std::int64_t p = 0; p < kMaxPosition; ++p) {
      for (const double f : inv_freq_) {
        cos_.push_back(static_cast<float>(std::cos(static_cast<double>(p) * f)));
        sin_.push_back(static_cast<float>(std::sin(static_cast<double>(p) * f)));
      }
    }
  }

  std::vector<float> Normal(std::size_t n, float sigma = 1.0f) {
    std::normal_distribution<float> normal(0.0f, sigma);
    std::vector<float> x(n);
    for (float& f : x) f = normal(random_);
    return x;
  }
  std::int64_t Uniform(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
  }

  KeyRun MakeRun(std::int64_t start, std::int64_t length, std::int64_t shift = 0, double skip = 0.0) {
    const std::size_t n = static_cast<std::size_t>(shape_.num_kv_heads * length * shape_.head_dim);
    KeyRun run{start, length, shift, Normal(n, 0.7f), Normal(n), {}};
    if (skip > 0) {
      std::bernoulli_distribution coin(skip);
      for (std::int64_t t = 0; t < length; ++t) run.skipped.push_back(coin(random_));
    }
    return run;
  }

  // One run [0, length) with a query row at every position of `positions`.
  Sequence Simple(std::int64_t length, std::vector<std::int64_t> positions) {
    Sequence s;
    s.runs.push_back(MakeRun(0, length));
    AddRows(s, std::move(positions));
    return s;
  }
  void AddRows(Sequence& s, std::vector<std::int64_t> positions) {
    s.q = Normal(positions.size() * static_cast<std::size_t>(shape_.num_heads * shape_.head_dim), 1.5f);
    s.positions = std::move(positions);
  }

  Shape shape() const { return shape_; }
  DType dtype() const { return dtype_; }

  Shape shape_;
  DType dtype_;
  std::int64_t window = 0;
  DType out_dtype = DType::kF32;
  std::vector<double> inv_freq_;
  std::vector<float> cos_, sin_;
  std::mt19937_64 random_;
};

enum class Bound { kAll, kWorstCase };

// A batch laid out on randomly chosen pages.
class Batch {
 public:
  Batch(World& w, const std::vector<Part>& parts, int spare_pages = 3) : world_(w) {
    const std::size_t width = static_cast<std::size_t>(w.shape_.num_heads * w.shape_.head_dim);
    std::size_t count = static_cast<std::size_t>(spare_pages);
    for (const Part& part : parts) {
      for (const KeyRun& run : part.sequence->runs) count += static_cast<std::size_t>((run.length + 63) / 64);
    }
    const KvLayout layout{2, w.shape_.num_kv_heads, w.shape_.head_dim, w.dtype_};
    bytes_.assign(layout.page_bytes() * count, std::byte{0xff});  // NaN in bf16 and in fp32
    p_.pages = {bytes_.data(), static_cast<PageIndex>(count), layout};
    std::vector<PageIndex> free(count);
    std::iota(free.begin(), free.end(), PageIndex{0});
    std::shuffle(free.begin(), free.end(), w.random_);
    for (const Part& part : parts) {
      const std::int64_t begin = static_cast<std::int64_t>(positions_.size());
      for (const int r : part.rows) {
        const std::size_t row = static_cast<std::size_t>(r);
        positions_.push_back(part.sequence->positions[row]);
        const auto at = part.sequence->q.begin() + static_cast<std::ptrdiff_t>(row * width);
        q_.insert(q_.end(), at, at + static_cast<std::ptrdiff_t>(width));
      }
      for (const KeyRun& run : part.sequence->runs) {
        AddSegment(run, begin, static_cast<std::int64_t>(positions_.size()), free);
      }
    }
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      segments_[s].pages = tables_[s];
      segments_[s].skip = skips_[s];
    }
    const std::int64_t rows = static_cast<std::int64_t>(positions_.size());
    out_.assign(positions_.size() * width * DTypeBytes(w.out_dtype), std::byte{0xff});
    const std::int64_t cols = static_cast<std::int64_t>(width);
    p_.q = {q_.data(), DType::kF32, rows, cols, cols};
    p_.num_heads = w.shape_.num_heads;
    p_.layer = 1;
    p_.scale = 1.0f / std::sqrt(static_cast<float>(w.shape_.head_dim));
    p_.window = w.window;
    p_.rope = {w.cos_, w.sin_, kMaxPosition, w.shape_.half};
    p_.positions = positions_;
    p_.segments = segments_;
    p_.out = {out_.data(), w.out_dtype, rows, cols, cols};
  }

  // The bytes of all output rows.
  const std::vector<std::byte>& Run(CpuIsa isa, int threads = 2) {
    ThreadPool pool(threads);
    CpuAttention(p_, isa, pool);
    return out_;
  }

  std::vector<std::byte> Row(std::size_t i) const {
    const std::size_t width = out_.size() / positions_.size();
    const auto at = out_.begin() + static_cast<std::ptrdiff_t>(i * width);
    return {at, at + static_cast<std::ptrdiff_t>(width)};
  }
  float Output(std::size_t i) const {
    if (p_.out.dtype == DType::kF32) return reinterpret_cast<const float*>(out_.data())[i];
    const std::uint32_t bits = reinterpret_cast<const std::uint16_t*>(out_.data())[i];
    return std::bit_cast<float>(bits << 16);
  }
  const AttentionParams& params() const { return p_; }

  // Runs, and compares each element with the oracle within the bound derived in docs/design/attention.md.
  void ExpectNearOracle(CpuIsa isa, Bound kind = Bound::kAll) {
    Run(isa);
    const reference::AttentionResult want = reference::Attention(p_, world_.inv_freq_);
    const std::size_t d = static_cast<std::size_t>(world_.shape_.head_dim);
    const bool bf16 = MultipliesBf16(isa) && world_.dtype_ == DType::kBf16;
    const double unit = std::ldexp(1.0, -24);
    // Relative errors of a query element (rounding, fp32 table and arithmetic, sums over d), of a weight, of the
    // output.
    const double query = (bf16 ? std::ldexp(1.0, -8) : 0.0) + (static_cast<double>(d) + 16) * unit;
    const double weight = (bf16 ? std::ldexp(1.0, -8) : 0.0) + 4096 * unit;
    const double out = p_.out.dtype == DType::kBf16 ? std::ldexp(1.0, -8) : 4 * unit;
    double worst = 0;
    std::size_t where = 0;
    for (std::size_t i = 0; i < want.out.size(); ++i) {
      // A score off by e scales its weight by exp(e), up and down: twice that in the normalised sum.
      const double e = query * want.score_bound[i / d];
      const double bound =
          want.weighted_abs[i] * (2 * std::expm1(e) + 2 * weight) + std::abs(want.out[i]) * out + 1e-30;
      const double error = std::abs(static_cast<double>(Output(i)) - want.out[i]);
      if (!(error / bound <= worst)) {
        worst = error / bound;
        where = i;
      }
    }
    EXPECT_LE(worst, 1.0) << "element " << where << ": " << Output(where) << " for " << want.out[where];
    if (kind == Bound::kWorstCase) return;
    // Rounding errors are independent: the mean error must be far below the worst case, else something is biased.
    double square = 0;
    double reference = 0;
    for (std::size_t i = 0; i < want.out.size(); ++i) {
      square += std::pow(static_cast<double>(Output(i)) - want.out[i], 2);
      reference += std::pow(want.out[i], 2);
    }
    const double tight = bf16 || p_.out.dtype == DType::kBf16 ? 4e-3 : 4e-6;
    EXPECT_LE(std::sqrt(square), tight * std::sqrt(reference) + 1e-30);
  }

 private:
  void AddSegment(const KeyRun& run, std::int64_t row_begin, std::int64_t row_end, std::vector<PageIndex>& free) {
    std::vector<PageIndex> table;
    std::vector<std::uint64_t> skip;
    const std::size_t d = static_cast<std::size_t>(world_.shape_.head_dim);
    for (std::int64_t t = 0; t < run.length; ++t) {
      if (t % 64 == 0) {
        table.push_back(free.back());
        free.pop_back();
        skip.push_back(0);
      }
      if (!run.skipped.empty() && run.skipped[static_cast<std::size_t>(t)]) {
        skip.back() |= std::uint64_t{1} << (t % 64);
        continue;  // stays NaN
      }
      for (int h = 0; h < world_.shape_.num_kv_heads; ++h) {
        for (int value = 0; value < 2; ++value) {
          const float* from = (value ? run.v : run.k).data() + static_cast<std::size_t>(h * run.length + t) * d;
          std::byte* slab = p_.pages.slab(table.back(), 1, value, h);
          for (std::size_t j = 0; j < d; ++j) {
            const std::size_t at = static_cast<std::size_t>(t % 64) * d + j;
            if (world_.dtype_ == DType::kF32) {
              reinterpret_cast<float*>(slab)[at] = from[j];
            } else {
              reinterpret_cast<std::uint16_t*>(slab)[at] = ToBf16(from[j]);
            }
          }
        }
      }
    }
    KvSegment s;
    s.start = run.start;
    s.length = run.length;
    s.shift = run.shift;
    s.row_begin = row_begin;
    s.row_end = row_end;
    segments_.push_back(s);
    tables_.push_back(std::move(table));
    skips_.push_back(run.skipped.empty() ? std::vector<std::uint64_t>{} : std::move(skip));
  }

  World& world_;
  std::vector<std::byte> bytes_;
  std::vector<std::byte> out_;
  std::vector<std::int64_t> positions_;
  std::vector<float> q_;
  std::vector<KvSegment> segments_;
  std::vector<std::vector<PageIndex>> tables_;
  std::vector<std::vector<std::uint64_t>> skips_;
  AttentionParams p_;
};

std::vector<int> Range(int begin, int end) {
  std::vector<int> x(static_cast<std::size_t>(end - begin));
  std::iota(x.begin(), x.end(), begin);
  return x;
}
std::vector<std::int64_t> Positions(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> x(static_cast<std::size_t>(end - begin));
  std::iota(x.begin(), x.end(), begin);
  return x;
}

struct Version {
  CpuIsa isa;
  DType dtype;
  Shape shape;
};

class AttentionTest : public testing::TestWithParam<Version> {
 protected:
  void SetUp() override {
    if (!CpuHasIsa(GetParam().isa)) GTEST_SKIP() << "this machine lacks the instruction set";
  }
  World MakeWorld(std::uint64_t seed) { return World(GetParam().shape, GetParam().dtype, seed); }
  CpuIsa isa() const { return GetParam().isa; }
};

TEST_P(AttentionTest, CausalPrefillIsNearOracle) {
  World w = MakeWorld(1);
  const Sequence s = w.Simple(150, Positions(0, 150));
  Batch(w, {{&s, Range(0, 150)}}).ExpectNearOracle(isa());
  w.out_dtype = DType::kBf16;
  Batch(w, {{&s, Range(0, 150)}}).ExpectNearOracle(isa());
}

TEST_P(AttentionTest, LongContextAcrossSplitsIsNearOracle) {
  World w = MakeWorld(2);
  const Sequence s = w.Simple(2200, {0, 63, 64, 1023, 1024, 1025, 2047, 2048, 2199});
  Batch(w, {{&s, Range(0, 9)}}).ExpectNearOracle(isa());
}

// Several sequences with several moved runs each, gaps, skips, windows, unordered scattered rows.
TEST_P(AttentionTest, RandomSegmentsAreNearOracle) {
  for (std::uint64_t seed = 100; seed < 112; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    World w = MakeWorld(seed);
    w.window = seed % 3 == 0 ? w.Uniform(1, 300) : 0;
    std::vector<Sequence> sequences(static_cast<std::size_t>(w.Uniform(1, 3)));
    std::vector<Part> parts;
    for (Sequence& s : sequences) {
      std::int64_t at = w.Uniform(0, 100);
      for (std::int64_t n = w.Uniform(0, 3); n > 0; --n) {
        const std::int64_t length = w.Uniform(1, 200);
        s.runs.push_back(w.MakeRun(at, length, w.Uniform(-50, at), seed % 2 == 0 ? 0.3 : 0.0));
        at += w.Uniform(0, 1) == 0 ? length : w.Uniform(0, length + 70);  // adjacent, overlapping, or with a gap
      }
      std::vector<std::int64_t> positions;
      for (std::int64_t n = w.Uniform(1, 40); n > 0; --n) positions.push_back(w.Uniform(at / 2, at + 20));
      for (const KeyRun& run : s.runs) {
        for (std::int64_t& p : positions) p = std::max(p, run.shift);
      }
      w.AddRows(s, positions);
      parts.push_back({&s, Range(0, static_cast<int>(positions.size()))});
    }
    Batch(w, parts).ExpectNearOracle(isa());
  }
}

TEST_P(AttentionTest, LargeScoresAreNearOracle) {
  World w = MakeWorld(3);
  Sequence s = w.Simple(300, Positions(200, 240));
  // Scores grow along the keys, so that the running reference moves in every tile.
  for (std::size_t i = 0; i < s.runs[0].k.size(); ++i) {
    const std::size_t t = i / static_cast<std::size_t>(w.shape_.head_dim) % 300;
    s.runs[0].k[i] *= 0.1f * static_cast<float>(t);
  }
  // Errors of such scores are large and alike, so only the worst-case bound applies.
  Batch(w, {{&s, Range(0, 40)}}).ExpectNearOracle(isa(), Bound::kWorstCase);
}

TEST_P(AttentionTest, BitsDoNotDependOnChunksRowsThreadsPagesOrCompanions) {
  World w = MakeWorld(4);
  const int n = 1300;
  const Sequence s = w.Simple(n, Positions(0, n));
  Sequence other = w.Simple(500, Positions(100, 171));
  Batch whole(w, {{&s, Range(0, n)}});
  whole.Run(isa(), 2);
  const auto expect_same = [&](Batch& batch, const std::vector<int>& rows, std::size_t first) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      ASSERT_EQ(batch.Row(first + i), whole.Row(static_cast<std::size_t>(rows[i]))) << "row " << rows[i];
    }
  };
  {
    SCOPED_TRACE("threads and pages");
    Batch again(w, {{&s, Range(0, n)}}, 50);
    again.Run(isa(), 1);
    expect_same(again, Range(0, n), 0);
  }
  for (const auto& [begin, end] : {std::pair{0, 777}, {777, 1000}, {1000, 1025}, {1025, 1300}}) {
    SCOPED_TRACE("chunk from " + std::to_string(begin));
    Batch chunk(w, {{&s, Range(begin, end)}});
    chunk.Run(isa(), 3);
    expect_same(chunk, Range(begin, end), 0);
  }
  for (const int row : {0, 1, 63, 64, 500, 1023, 1024, 1087, 1299}) {
    SCOPED_TRACE("single row");
    Batch single(w, {{&s, {row}}});
    single.Run(isa(), 2);
    expect_same(single, {row}, 0);
  }
  {
    SCOPED_TRACE("scattered, out of order, among companions");
    std::vector<int> rows;
    for (int i = 0; i < n; ++i) {
      if (w.Uniform(0, 99) < 15) rows.push_back(i);
    }
    std::shuffle(rows.begin(), rows.end(), w.random_);
    Batch scattered(w, {{&other, Range(0, 71)}, {&s, rows}, {&other, {5, 6}}});
    scattered.Run(isa(), 2);
    expect_same(scattered, rows, 71);
  }
}

// What a chunked prefill sees: later keys are not yet there, or belong to a longer segment.
TEST_P(AttentionTest, BitsDoNotDependOnKeysAfterTheRow) {
  World w = MakeWorld(5);
  Sequence s = w.Simple(1200, Positions(1000, 1100));
  Batch all(w, {{&s, Range(0, 100)}});
  all.Run(isa());
  for (const std::int64_t length : {1001, 1024, 1030, 1090}) {
    Sequence cut = s;
    KeyRun& run = cut.runs[0];
    run.length = length;
    run.k.clear();
    run.v.clear();
    const std::size_t d = static_cast<std::size_t>(w.shape_.head_dim);
    for (int h = 0; h < w.shape_.num_kv_heads; ++h) {
      const auto head = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(h) * 1200 * d);
      const auto size = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(length) * d);
      run.k.insert(run.k.end(), s.runs[0].k.begin() + head, s.runs[0].k.begin() + head + size);
      run.v.insert(run.v.end(), s.runs[0].v.begin() + head, s.runs[0].v.begin() + head + size);
    }
    const int rows = static_cast<int>(std::min<std::int64_t>(100, length - 1000));
    Batch batch(w, {{&cut, Range(0, rows)}});
    batch.Run(isa());
    for (int i = 0; i < rows; ++i) {
      ASSERT_EQ(batch.Row(static_cast<std::size_t>(i)), all.Row(static_cast<std::size_t>(i)));
    }
  }
}

TEST_P(AttentionTest, InfiniteValuesOfLaterKeysDoNotReachEarlierRows) {
  World w = MakeWorld(6);
  Sequence s = w.Simple(128, Positions(60, 128));
  Batch clean(w, {{&s, Range(0, 68)}});
  clean.Run(isa());
  const std::size_t d = static_cast<std::size_t>(w.shape_.head_dim);
  for (std::size_t j = 0; j < d; ++j) s.runs[0].v[100 * d + j] = std::numeric_limits<float>::infinity();
  Batch dirty(w, {{&s, Range(0, 68)}});
  dirty.Run(isa());
  for (std::size_t i = 0; i < 40; ++i) ASSERT_EQ(clean.Row(i), dirty.Row(i)) << "row at " << 60 + i;
  EXPECT_FALSE(std::isfinite(dirty.Output(40 * d * static_cast<std::size_t>(w.shape_.num_heads))));
}

TEST_P(AttentionTest, SegmentCutAtASplitBoundaryKeepsTheBits) {
  World w = MakeWorld(7);
  const Sequence one = w.Simple(2500, {1000, 1023, 1024, 1500, 2047, 2048, 2499});
  Sequence two = one;
  two.runs.clear();
  const std::size_t d = static_cast<std::size_t>(w.shape_.head_dim);
  for (const auto& [begin, end] : {std::pair<std::int64_t, std::int64_t>{0, 1024}, {1024, 2500}}) {
    KeyRun run{begin, end - begin, 0, {}, {}, {}};
    for (int h = 0; h < w.shape_.num_kv_heads; ++h) {
      const auto from = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(h * 2500 + begin) * d);
      const auto to = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(h * 2500 + end) * d);
      run.k.insert(run.k.end(), one.runs[0].k.begin() + from, one.runs[0].k.begin() + to);
      run.v.insert(run.v.end(), one.runs[0].v.begin() + from, one.runs[0].v.begin() + to);
    }
    two.runs.push_back(run);
  }
  Batch a(w, {{&one, Range(0, 7)}});
  Batch b(w, {{&two, Range(0, 7)}});
  EXPECT_EQ(a.Run(isa()), b.Run(isa()));
}

TEST_P(AttentionTest, RowsThatSeeNothingGetZeros) {
  World w = MakeWorld(8);
  Sequence before = w.Simple(100, {60});
  before.runs[0].start = 61;  // all keys later than the row
  Sequence skipped = w.Simple(70, {80, 90});
  skipped.runs[0].skipped.assign(70, true);
  Sequence bare;
  w.AddRows(bare, {3, 4, 5});
  Sequence empty = w.Simple(0, {7});
  for (const DType out : {DType::kF32, DType::kBf16}) {
    w.out_dtype = out;
    Batch batch(w, {{&before, {0}}, {&skipped, {0, 1}}, {&bare, {0, 1, 2}}, {&empty, {0}}});
    for (const std::byte b : batch.Run(isa())) ASSERT_EQ(b, std::byte{0});
  }
}

TEST_P(AttentionTest, NoRowsIsNoWork) {
  World w = MakeWorld(9);
  const Sequence s = w.Simple(10, {});
  Batch batch(w, {{&s, {}}});
  EXPECT_TRUE(batch.Run(isa()).empty());
}

std::vector<Version> Versions() {
  std::vector<Version> versions;
  for (const CpuIsa isa : {CpuIsa::kAmxBf16, CpuIsa::kAvx512Bf16, CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kPlain}) {
    for (const DType dtype : {DType::kBf16, DType::kF32}) {
      for (const Shape shape : {Shape{9, 3, 64, 32}, Shape{4, 1, 128, 64}, Shape{2, 2, 16, 8}, Shape{7, 1, 40, 12},
                                Shape{2, 1, 8, 0}, Shape{1, 1, 256, 128}, Shape{32, 1, 16, 8}, Shape{200, 1, 8, 0}}) {
        versions.push_back({isa, dtype, shape});
      }
    }
  }
  return versions;
}

std::string Name(const testing::TestParamInfo<Version>& info) {
  const Version& v = info.param;
  const char* isa = v.isa == CpuIsa::kAmxBf16      ? "AmxBf16"
                    : v.isa == CpuIsa::kAvx512Bf16 ? "Avx512Bf16"
                    : v.isa == CpuIsa::kAvx512     ? "Avx512"
                    : v.isa == CpuIsa::kAvx2       ? "Avx2"
                                                   : "Plain";
  return std::string(isa) + (v.dtype == DType::kBf16 ? "_bf16_" : "_f32_") + std::to_string(v.shape.num_heads) + "x" +
         std::to_string(v.shape.num_kv_heads) + "x" + std::to_string(v.shape.head_dim);
}

INSTANTIATE_TEST_SUITE_P(Versions, AttentionTest, testing::ValuesIn(Versions()), Name);

}  // namespace
}  // namespace kvshare::kernels
