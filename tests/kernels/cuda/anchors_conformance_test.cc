// KVCOMM's distances and offsets on the device, against the double-precision oracle and against the CPU's anchor pool;
// in the emulator always, on a GPU where there is one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "anchors/anchor_pool.h"
#include "anchors/q8.h"
#include "kernels/device_kv.h"
#include "kernels/kv_rows.h"
#include "tests/kernels/backend_fixture.h"
#include "tests/kernels/cuda/backends.h"
#include "tests/reference/anchors_reference.h"

namespace kvshare::kernels::cuda {
namespace {

constexpr std::int64_t kPositions = 600;
constexpr float kYarn = 1.25f;  // the factor that the RoPE table and the stored keys both hold

struct Shape {
  KvLayout layout;
  int half;
};
constexpr Shape k64{{3, 2, 64}, 32};
constexpr Shape k128{{2, 1, 128}, 64};
constexpr Shape kWide{{3, 4, 128}, 64};  // every thread has units, some more than others
constexpr Shape kPartlyRotated{{2, 3, 64}, 20};
constexpr Shape kUnrotated{{6, 1, 72}, 0};  // a head that no warp divides

// Rows of an anchor, coded as the pool codes them: Q8Blocks(width) blocks each.
using Blocks = std::vector<anchors::Q8Block>;
struct Values {
  Blocks base, offset;  // offset empty: not known
  std::int64_t tokens = 0;
};

Blocks Coded(std::span<const float> values, std::size_t width) {
  Blocks blocks(values.size() / width * anchors::Q8Blocks(width));
  for (std::size_t row = 0; row < values.size() / width; ++row) {
    anchors::EncodeQ8(values.subspan(row * width, width), blocks.data() + row * anchors::Q8Blocks(width));
  }
  return blocks;
}

Blocks Random(std::size_t rows, std::size_t width, float sigma, std::mt19937_64& random) {
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(rows * width);
  for (float& x : values) x = normal(random);
  return Coded(values, width);
}

// Stored tokens on shuffled pages, somewhere within them, and where they go; all else is NaN.
struct Case {
  Case(const Shape& s, std::int64_t count, std::uint64_t seed) : shape(s), tokens(count), random(seed) {
    for (int j = 0; j < s.half; ++j) inv_freq.push_back(std::pow(10000.0, -double(j) / s.half));
    for (std::int64_t p = 0; p < kPositions; ++p) {
      for (const double f : inv_freq) {
        cos.push_back(static_cast<float>(kYarn * std::cos(static_cast<double>(p) * f)));
        sin.push_back(static_cast<float>(kYarn * std::sin(static_cast<double>(p) * f)));
      }
    }
    const auto first = static_cast<std::int64_t>(random() % 64), base = static_cast<std::int64_t>(random() % 100);
    const auto start = static_cast<std::int64_t>(random() % 300);
    const std::int64_t run = (first + tokens + 63) / 64;
    std::vector<PageIndex> free(static_cast<std::size_t>(2 * run + 1));
    std::iota(free.begin(), free.end(), PageIndex{0});
    std::shuffle(free.begin(), free.end(), random);
    bytes.assign(s.layout.page_bytes() * free.size(), std::byte{0xff});
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t row = first + t;
      stored.push_back({free[static_cast<std::size_t>(row / 64)], static_cast<int>(row % 64)});
      to.push_back({free[static_cast<std::size_t>(run + t / 64)], static_cast<int>(63 - t % 64)});
      positions.push_back(base + t);
      to_positions.push_back(start + t);
    }
    std::vector<float> row(width());
    std::normal_distribution<float> normal;
    for (int layer = 0; layer < s.layout.num_layers; ++layer) {
      for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
        for (const KvSlot& slot : stored) {
          for (float& x : row) x = normal(random);
          StoreRow(OnHost(), layer, part, slot, row);
        }
      }
    }
  }
  std::size_t width() const { return static_cast<std::size_t>(shape.layout.num_kv_heads * shape.layout.head_dim); }
  KvPages OnHost() {
    return {bytes.data(), static_cast<PageIndex>(bytes.size() / shape.layout.page_bytes()), shape.layout};
  }
  RopeTable HostRope() const { return {cos, sin, kPositions, shape.half}; }

  // Near the stored tokens, further with every anchor, so that no two weigh the same; of some tokens more than there
  // are.
  void AddAnchor(bool offset) {
    Values v;
    v.tokens = tokens + static_cast<std::int64_t>(anchors.size() % 3);
    const auto rows = static_cast<std::size_t>(2 * shape.layout.num_layers * v.tokens);
    v.base = Random(rows, width(), 0.4f + 0.3f * static_cast<float>(anchors.size()), random);
    if (offset) v.offset = Random(rows, width(), 0.5f, random);
    anchors.push_back(std::move(v));
  }

  // The canonical rows as the CPU has them.
  anchors::KvBlock Canonical() {
    const int layers = shape.layout.num_layers;
    anchors::KvBlock block(layers, tokens, static_cast<std::int64_t>(width()));
    for (int layer = 0; layer < layers; ++layer) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        const auto i = static_cast<std::size_t>(t);
        LoadRow(OnHost(), layer, KvPart::kKey, stored[i], block.row(layer, 0, t));
        CanonicalKey(HostRope(), positions[i], shape.layout.head_dim, block.row(layer, 0, t));
        LoadRow(OnHost(), layer, KvPart::kValue, stored[i], block.row(layer, 1, t));
      }
    }
    return block;
  }
  // Host pages after the block's rows went to where they go, as MovedPrompt writes them.
  std::vector<std::byte> Written(const anchors::KvBlock& block) {
    std::vector<std::byte> kept = bytes;
    for (int layer = 0; layer < block.layers; ++layer) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        const auto i = static_cast<std::size_t>(t);
        std::vector<float> key(block.row(layer, 0, t).begin(), block.row(layer, 0, t).end());
        StoredKey(HostRope(), to_positions[i], shape.layout.head_dim, key);
        StoreRow(OnHost(), layer, KvPart::kKey, to[i], key);
        StoreRow(OnHost(), layer, KvPart::kValue, to[i], block.row(layer, 1, t));
      }
    }
    bytes.swap(kept);
    return kept;
  }

  Shape shape;
  std::int64_t tokens;
  std::mt19937_64 random;
  std::vector<double> inv_freq;
  std::vector<float> cos, sin;
  std::vector<std::byte> bytes;
  std::vector<KvSlot> stored, to;
  std::vector<std::int64_t> positions, to_positions;
  std::vector<Values> anchors;
};

struct Answer {
  std::vector<float> differences, distances;
  std::vector<std::byte> pages;
};

class CudaAnchorsTest : public CudaTest {
 protected:
  static Case Make(Shape shape, std::int64_t tokens, std::uint64_t seed) {
    shape.layout.dtype = half();
    return Case(shape, tokens, seed);
  }
  Answer Run(Case& c) {
    Answer answer;
    const auto pages = Uploaded(std::span<const std::byte>(c.bytes));
    const auto cos = Uploaded(std::span<const float>(c.cos)), sin = Uploaded(std::span<const float>(c.sin));
    std::vector<std::unique_ptr<Buffer>> values;
    std::vector<AnchorKv> coded;
    const auto on_device = [&](const Blocks& host) -> CodedKv {
      if (host.empty()) return {};
      const std::size_t width = c.width(), blocks = anchors::Q8Blocks(width);
      std::vector<std::int8_t> codes;
      std::vector<std::uint16_t> scales;
      for (std::size_t i = 0; i < host.size(); ++i) {
        const std::size_t first = i % blocks * anchors::kQ8Values;
        codes.insert(codes.end(), host[i].codes.begin(),
                     host[i].codes.begin() + static_cast<std::ptrdiff_t>(std::min(anchors::kQ8Values, width - first)));
        scales.push_back(host[i].scale);
      }
      values.push_back(Uploaded(std::span<const std::int8_t>(codes)));
      values.push_back(Uploaded(std::span<const std::uint16_t>(scales)));
      return {reinterpret_cast<const std::int8_t*>(values[values.size() - 2]->data()),
              reinterpret_cast<const std::uint16_t*>(values.back()->data())};
    };
    for (const Values& v : c.anchors) coded.push_back({on_device(v.base), on_device(v.offset), v.tokens});
    const std::size_t cells = 2 * c.stored.size() * coded.size();
    const auto differences = Block(cells * sizeof(float));
    AnchoredTokens tokens;
    tokens.pages = c.OnHost();
    tokens.pages.base = pages->data();
    tokens.rope = {{reinterpret_cast<const float*>(cos->data()), c.cos.size()},
                   {reinterpret_cast<const float*>(sin->data()), c.sin.size()},
                   kPositions,
                   c.shape.half};
    tokens.stored = c.stored;
    tokens.positions = c.positions;
    tokens.anchors = coded;
    answer.distances.assign(coded.size(), std::nanf(""));
    auto* cells_at = reinterpret_cast<float*>(differences->data());
    const Status status = backend_->device_kv()->AnchorDistances(tokens, cells_at, answer.distances);
    EXPECT_TRUE(status.ok()) << status.message();
    backend_->device_kv()->ApplyAnchors(tokens, cells_at, c.to, c.to_positions);
    answer.pages = Download(pages->data(), c.bytes.size());
    answer.differences.resize(cells);
    const std::vector<std::byte> raw = Download(differences->data(), cells * sizeof(float));
    if (cells > 0) std::memcpy(answer.differences.data(), raw.data(), raw.size());
    return answer;
  }
};

reference::Kv Widened(const Blocks& blocks, int layers, std::int64_t tokens, std::int64_t width) {
  reference::Kv kv{layers, tokens, width, {}};
  const std::size_t each = anchors::Q8Blocks(static_cast<std::size_t>(width));
  for (std::size_t row = 0; row < blocks.size() / each; ++row) {
    for (std::size_t c = 0; c < static_cast<std::size_t>(width); ++c) {
      const anchors::Q8Block& block = blocks[row * each + c / anchors::kQ8Values];
      kv.values.push_back(double{FromBf16(block.scale)} * block.codes[c % anchors::kQ8Values]);
    }
  }
  return kv;
}

// Rotates a key of one head by position * inv_freq, times `scale`.
void Turn(const std::vector<double>& inv_freq, double position, double scale, double* key) {
  const std::size_t half = inv_freq.size();
  for (std::size_t j = 0; j < half; ++j) {
    const double a = key[j], b = key[j + half], angle = position * inv_freq[j];
    key[j] = (a * std::cos(angle) - b * std::sin(angle)) * scale;
    key[j + half] = (b * std::cos(angle) + a * std::sin(angle)) * scale;
  }
}

void ExpectNearOracle(Case& c, const Answer& got) {
  const KvLayout& layout = c.shape.layout;
  const int layers = layout.num_layers;
  const auto width = static_cast<std::int64_t>(c.width());
  reference::Kv x{layers, c.tokens, width, {}};
  x.values.resize(static_cast<std::size_t>(2 * layers * c.tokens * width));
  std::vector<float> row(c.width());
  for (int layer = 0; layer < layers; ++layer) {
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t t = 0; t < c.tokens; ++t) {
        LoadRow(c.OnHost(), layer, part == 0 ? KvPart::kKey : KvPart::kValue, c.stored[static_cast<std::size_t>(t)],
                row);
        double* to = &x.at(layer, part, t, 0);
        std::copy(row.begin(), row.end(), to);
        for (int h = 0; h < layout.num_kv_heads && part == 0; ++h) {
          Turn(c.inv_freq, -static_cast<double>(c.positions[static_cast<std::size_t>(t)]), 1 / double{kYarn},
               to + h * layout.head_dim);
        }
      }
    }
  }
  std::vector<reference::KvAnchor> known;
  for (const Values& v : c.anchors) {
    known.push_back(
        {Widened(v.base, layers, v.tokens, width), Widened(v.offset, v.offset.empty() ? 0 : layers, v.tokens, width)});
  }
  const reference::AnchoredResult want = reference::Anchored(x, known);
  const auto count = static_cast<std::int64_t>(known.size());

  // A term is a difference of numbers of which ours went through table and rotation; sums are a thread's, then a tree.
  const double steps = static_cast<double>(layers * width) / 128 + 16;
  std::vector<double> score_error(static_cast<std::size_t>(2 * c.tokens), 0.0);
  WorstError differences("differences");
  for (std::size_t i = 0; i < want.differences.size(); ++i) {
    const double bound = kF32Eps * (steps * want.differences[i] + 12 * want.magnitudes[i]);
    const auto at = static_cast<std::int64_t>(i);
    differences.Compare(static_cast<double>(got.differences[i]), want.differences[i], bound, at / count, at % count);
    double& error = score_error[i / known.size()];
    error = std::max(error, bound / static_cast<double>(layers * width));
  }
  WorstError distances("distances");
  for (std::size_t a = 0; a < known.size(); ++a) {
    distances.Compare(static_cast<double>(got.distances[a]), want.distances[a],
                      kF32Eps * (steps + static_cast<double>(c.tokens)) * want.distances[a], 0,
                      static_cast<std::int64_t>(a));
  }
  // What is written is rounded to the pages' dtype; everything else is, and nothing else is written.
  std::vector<std::byte> expected = c.bytes;
  WorstError corrected("corrected");
  for (int layer = 0; layer < layers; ++layer) {
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t t = 0; t < c.tokens; ++t) {
        const auto i = static_cast<std::size_t>(t);
        const KvPart which = part == 0 ? KvPart::kKey : KvPart::kValue;
        KvPages pages = c.OnHost();
        pages.base = const_cast<std::byte*>(got.pages.data());  // read only
        LoadRow(pages, layer, which, c.to[i], row);
        pages.base = expected.data();
        StoreRow(pages, layer, which, c.to[i], row);
        const double* wanted = &want.corrected.values[want.corrected.Index(layer, part, t, 0)];
        const double* magnitude = &want.corrected_magnitude.values[want.corrected.Index(layer, part, t, 0)];
        std::vector<double> turned(wanted, wanted + width);
        for (int h = 0; h < layout.num_kv_heads && part == 0; ++h) {
          Turn(c.inv_freq, static_cast<double>(c.to_positions[i]), double{kYarn}, &turned[0] + h * layout.head_dim);
        }
        const double weight = 2 * score_error[static_cast<std::size_t>(part * c.tokens + t)] + 80 * kF32Eps;
        for (std::int64_t ch = 0; ch < width; ++ch) {
          // A turned channel holds both of its pair; bound it by the row's greatest.
          const std::int64_t head = ch / layout.head_dim * layout.head_dim;
          const double scale = 2 * *std::max_element(magnitude + head, magnitude + head + layout.head_dim);
          const double exact = turned[static_cast<std::size_t>(ch)];
          corrected.Compare(static_cast<double>(row[static_cast<std::size_t>(ch)]), exact,
                            std::abs(exact) * DTypeEps(layout.dtype) * 1.01 + DTypeTiny(layout.dtype) + scale * weight,
                            t, ch);
        }
      }
    }
  }
  EXPECT_EQ(got.pages, expected) << "something else was written";
}

TEST_P(CudaAnchorsTest, DistancesAndOffsetsAreNearOracle) {
  const struct {
    Shape shape;
    std::int64_t tokens;
    int anchors;
  } cases[] = {{k64, 1, 1}, {k64, 65, 2}, {k128, 64, 3}, {kPartlyRotated, 63, 1}, {kUnrotated, 12, 8}, {kWide, 10, 20}};
  std::uint64_t seed = 1;
  for (const auto& c : cases) {
    for (int i = 0; i < Repeats(1); ++i) {
      SCOPED_TRACE("seed " + std::to_string(seed));
      Case one = Make(c.shape, c.tokens, seed++);
      // Every fourth anchor has never been read by this agent.
      for (int n = 0; n < c.anchors; ++n) one.AddAnchor(n % 4 != 3);
      ExpectNearOracle(one, Run(one));
    }
  }
}

TEST_P(CudaAnchorsTest, AsManyAnchorsAsThereMayBe) {
  Case c = Make(kWide, 3, 50);
  for (std::size_t n = 0; n < kMostAnchors; ++n) c.AddAnchor(true);
  ExpectNearOracle(c, Run(c));
}

TEST_P(CudaAnchorsTest, WithoutAnOffsetTokensAreMovedAsTheCpuMovesThem) {
  for (const int anchors : {0, 1, 3}) {
    for (const Shape& shape : {k64, kPartlyRotated, kUnrotated}) {
      Case c = Make(shape, 11, 70);
      for (int n = 0; n < anchors; ++n) c.AddAnchor(false);
      EXPECT_EQ(Run(c).pages, c.Written(c.Canonical())) << anchors << " anchors";
    }
  }
}

// One anchor has the weight 1, so that the arithmetic is the same to the bit; of several the CPU's weights are doubles.
TEST_P(CudaAnchorsTest, OffsetsAreThoseOfTheCpusPool) {
  for (const int count : {1, 4}) {
    Case c = Make(k64, 20, 80);
    anchors::AnchorPool pool;
    for (int n = 0; n < count; ++n) {
      anchors::KvBlock base = c.Canonical(), real = base;
      std::normal_distribution<float> normal;
      for (float& x : base.values) x += 0.3f * static_cast<float>(n + 1) * normal(c.random);
      for (std::size_t i = 0; i < base.values.size(); ++i) real.values[i] = base.values[i] + normal(c.random);
      pool.Register("p", "agent", std::to_string(n), RowsOf(base), RowsOf(real));
    }
    for (const anchors::Anchor& a : pool.Snapshot()) c.anchors.push_back({*a.base, *a.offsets.at("agent"), a.tokens});
    anchors::KvBlock block = c.Canonical();
    pool.Correct("p", "agent", &block);
    const std::vector<std::byte> want = c.Written(block);
    const Answer got = Run(c);
    if (count == 1) {
      EXPECT_EQ(got.pages, want);
      continue;
    }
    std::size_t other = 0;
    const auto* a = reinterpret_cast<const std::uint16_t*>(got.pages.data());
    const auto* b = reinterpret_cast<const std::uint16_t*>(want.data());
    for (std::size_t i = 0; i < want.size() / 2; ++i) {
      ASSERT_LE(std::abs(static_cast<int>(a[i]) - static_cast<int>(b[i])), a[i] == b[i] ? 0 : 1) << "element " << i;
      other += a[i] != b[i];
    }
    EXPECT_LE(other, want.size() / 2 / (half() == DType::kF16 ? 25 : 200));
  }
}

// A token's numbers do not depend on the other tokens, nor an anchor's on the other anchors.
TEST_P(CudaAnchorsTest, BitsDoNotDependOnCompanions) {
  Case all = Make(k64, 70, 90);
  for (int n = 0; n < 11; ++n) all.AddAnchor(n != 2);
  const Answer want = Run(all);
  Case few = all;  // anchors 9, 4
  few.anchors = {all.anchors[9], all.anchors[4]};
  const Answer less = Run(few);
  EXPECT_EQ(less.distances, (std::vector<float>{want.distances[9], want.distances[4]}));
  for (std::size_t i = 0; i < 140; ++i) {
    EXPECT_EQ(less.differences[2 * i], want.differences[11 * i + 9]);
    EXPECT_EQ(less.differences[2 * i + 1], want.differences[11 * i + 4]);
  }
  Case one = all;  // the first 33 tokens
  one.tokens = 33;
  for (auto* slots : {&one.stored, &one.to}) slots->resize(33);
  for (auto* positions : {&one.positions, &one.to_positions}) positions->resize(33);
  const Answer part = Run(one);
  KvPages pages = all.OnHost();
  std::vector<float> a(all.width()), b(all.width());
  for (int layer = 0; layer < 3; ++layer) {
    for (const KvPart which : {KvPart::kKey, KvPart::kValue}) {
      for (std::size_t t = 0; t < 33; ++t) {
        pages.base = const_cast<std::byte*>(want.pages.data());
        LoadRow(pages, layer, which, all.to[t], a);
        pages.base = const_cast<std::byte*>(part.pages.data());
        LoadRow(pages, layer, which, all.to[t], b);
        EXPECT_EQ(a, b);
      }
    }
  }
}

TEST_P(CudaAnchorsTest, ATokenMayGoWhereItStands) {
  Case c = Make(kPartlyRotated, 20, 100);
  for (int n = 0; n < 3; ++n) c.AddAnchor(true);
  const Answer elsewhere = Run(c);
  Case there = c;
  there.to = there.stored;
  const Answer got = Run(there);
  KvPages pages = c.OnHost();
  std::vector<float> a(c.width()), b(c.width());
  for (std::size_t t = 0; t < c.to.size(); ++t) {
    for (const KvPart which : {KvPart::kKey, KvPart::kValue}) {
      pages.base = const_cast<std::byte*>(elsewhere.pages.data());
      LoadRow(pages, 1, which, c.to[t], a);
      pages.base = const_cast<std::byte*>(got.pages.data());
      LoadRow(pages, 1, which, c.stored[t], b);
      EXPECT_EQ(a, b);
    }
  }
}

TEST_P(CudaAnchorsTest, NoTokensAreNoWork) {
  Case c = Make(k64, 1, 110);
  c.AddAnchor(true);
  c.tokens = 0;
  for (auto* slots : {&c.stored, &c.to}) slots->clear();
  for (auto* positions : {&c.positions, &c.to_positions}) positions->clear();
  const Answer got = Run(c);
  EXPECT_EQ(got.distances, std::vector<float>{0.0f});
  EXPECT_EQ(got.pages, c.bytes);
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaAnchorsTest, kEachHalf, WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda
