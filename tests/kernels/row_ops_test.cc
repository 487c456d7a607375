// Embed, RmsNorm, StoreKv and CopyPageRows against their oracles, on every instruction set of this machine.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <vector>

#include "tests/kernels/backend_fixture.h"
#include "tests/reference/ops_reference.h"

namespace kvshare::kernels {
namespace {

class RowOpsTest : public BackendTest {};

TEST_P(RowOpsTest, EmbedCopiesTableRows) {
  for (const std::int64_t hidden : {1, 15, 16, 17, 576}) {
    HostRows table(11, hidden, dtype()), out(4, hidden, DType::kF32);
    table.FillNormal(random_);
    const std::vector<std::int32_t> ids = {10, 0, 3, 3};
    backend_->Embed({.ids = ids, .table = table.View(), .out = out.View()});
    for (std::size_t r = 0; r < ids.size(); ++r) EXPECT_EQ(out.Row(static_cast<std::int64_t>(r)), table.Row(ids[r]));
  }
}

TEST_P(RowOpsTest, RmsNormAgreesWithTheOracle) {
  for (const std::int64_t n : {1, 7, 8, 15, 16, 17, 63, 64, 65, 192, 576, 4096}) {
    HostRows x(19, n, DType::kF32), out(19, n, dtype()), weight(1, n, DType::kF32);
    x.FillNormal(random_, 30.0f);
    weight.FillNormal(random_);
    const std::vector<float> w = weight.Row(0);
    backend_->RmsNorm({.x = x.View(), .weight = w, .eps = 1e-5f, .out = out.View()});
    // The mean's n-term sum enters through a square root; two products, the division and the root; then the output.
    const double relative = (static_cast<double>(n) / 2 + 8) * kF32Eps + DTypeEps(dtype());
    WorstError worst("RmsNorm n " + std::to_string(n));
    for (std::int64_t r = 0; r < x.rows(); ++r) {
      const std::vector<double> exact = reference::RmsNorm(x.Row(r), w, double{1e-5f});
      for (std::int64_t c = 0; c < n; ++c) {
        const double value = exact[static_cast<std::size_t>(c)];
        worst.Compare(out.Get(r, c), value, relative * std::abs(value) + 0x1p-126, r, c);
      }
    }
  }
}

// Whatever rows stand beside it, numbers or not, wherever the batch is cut and however many threads there are.
TEST_P(RowOpsTest, ANormedRowsBitsAreItsOwn) {
  constexpr std::int64_t kRows = 83, kCols = 193;
  HostRows x(kRows, kCols, DType::kF32), weight(1, kCols, DType::kF32), whole(kRows, kCols, dtype());
  x.FillNormal(random_, 5.0f);
  weight.FillNormal(random_);
  const std::vector<float> w = weight.Row(0);
  backend_->RmsNorm({.x = x.View(), .weight = w, .eps = 1e-5f, .out = whole.View()});
  for (const int threads : {1, 2, 3}) {
    const std::unique_ptr<Backend> backend = MakeBackend(threads);
    for (int trial = 0; trial < 20; ++trial) {
      const std::int64_t rows = std::uniform_int_distribution<std::int64_t>(1, kRows)(random_);
      const std::int64_t first = std::uniform_int_distribution<std::int64_t>(0, kRows - rows)(random_);
      HostRows part(rows, kCols, dtype());
      backend->RmsNorm({.x = x.View(first, rows), .weight = w, .eps = 1e-5f, .out = part.View()});
      ASSERT_TRUE(whole.HoldsRows(first, part)) << rows << " rows from " << first << ", " << threads << " threads";
    }
  }
  HostRows dirty = x, out(kRows, kCols, dtype());
  for (std::int64_t c = 0; c < kCols; ++c) dirty.Set(40, c, std::nanf(""));
  backend_->RmsNorm({.x = dirty.View(), .weight = w, .eps = 1e-5f, .out = out.View()});
  for (std::int64_t r = 0; r < kRows; ++r) EXPECT_EQ(out.Row(r) == whole.Row(r), r != 40) << "row " << r;
}

struct KvShape {
  int heads, kv_heads, head_dim, half;
  bool norms;
};

class StoreKvTest : public BackendTest {
 protected:
  static constexpr std::int64_t kPositions = 300;

  void Prepare(const KvShape& shape) {
    shape_ = shape;
    layout_ = {.num_layers = 2, .num_kv_heads = shape.kv_heads, .head_dim = shape.head_dim, .dtype = dtype()};
    pages_storage_.assign(3 * layout_.page_bytes(), std::byte{0x5a});
    cos_.clear();
    sin_.clear();
    for (std::int64_t p = 0; p < kPositions; ++p) {
      for (int j = 0; j < shape.half; ++j) {
        const double angle = static_cast<double>(p) * std::pow(1e4, -static_cast<double>(j) / shape.half);
        cos_.push_back(static_cast<float>(std::cos(angle)));
        sin_.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    std::normal_distribution<float> normal(1.0f, 0.2f);
    q_norm_.clear();
    k_norm_.clear();
    for (int i = 0; shape.norms && i < shape.head_dim; ++i) {
      q_norm_.push_back(normal(random_));
      k_norm_.push_back(normal(random_));
    }
  }
  KvPages pages() { return {pages_storage_.data(), 3, layout_}; }
  float Stored(KvSlot slot, int layer, int value, int head, int dim) {
    const std::byte* slab = pages().slab(slot.page, layer, value, head);
    const std::size_t index = static_cast<std::size_t>(slot.offset * shape_.head_dim + dim);
    float result = 0;
    if (dtype() == DType::kF32) {
      std::memcpy(&result, slab + 4 * index, 4);
    } else {
      std::memcpy(reinterpret_cast<std::byte*>(&result) + 2, slab + 2 * index, 2);
    }
    return result;
  }
  void Store(HostRows& qkv, const std::vector<std::int64_t>& positions, const std::vector<KvSlot>& slots) {
    backend_->StoreKv({.qkv = qkv.View(),
                       .num_heads = shape_.heads,
                       .layer = 1,
                       .q_norm = q_norm_,
                       .k_norm = k_norm_,
                       .eps = 1e-6f,
                       .rope = {cos_, sin_, kPositions, shape_.half},
                       .positions = positions,
                       .slots = slots,
                       .pages = pages()});
  }

  KvShape shape_{};
  KvLayout layout_;
  std::vector<std::byte> pages_storage_;
  std::vector<float> cos_, sin_, q_norm_, k_norm_;
};

TEST_P(StoreKvTest, StoresRotatedKeysAndPlainValuesAndLeavesTheRest) {
  for (const KvShape& shape : {KvShape{9, 3, 64, 32, false}, KvShape{4, 2, 16, 8, true}, KvShape{2, 1, 24, 6, true},
                               KvShape{4, 1, 128, 64, true}, KvShape{2, 2, 15, 7, false}}) {
    Prepare(shape);
    const int d = shape.head_dim;
    HostRows qkv(3, (shape.heads + 2 * shape.kv_heads) * d, DType::kF32);
    qkv.FillNormal(random_);
    const HostRows before = qkv;
    const std::vector<std::int64_t> positions = {0, 299, 77};
    const std::vector<KvSlot> slots = {{2, 0}, {0, 63}, {2, 5}};
    const std::vector<std::byte> pages_before = pages_storage_;
    Store(qkv, positions, slots);
    const double relative = (d / 2.0 + 12) * kF32Eps;
    for (std::int64_t r = 0; r < 3; ++r) {
      const std::vector<float> row = before.Row(r);
      const auto head = [&](int h) { return std::vector<float>(row.begin() + h * d, row.begin() + (h + 1) * d); };
      for (int h = 0; h < shape.heads; ++h) {  // q: normalised in place, not rotated
        const std::vector<float> q = head(h);
        std::vector<double> exact(q.begin(), q.end());
        if (shape.norms) exact = reference::RmsNorm(q, q_norm_, double{1e-6f});
        for (int i = 0; i < d; ++i) {
          const double value = exact[static_cast<std::size_t>(i)];
          ASSERT_NEAR(qkv.Get(r, h * d + i), value, shape.norms ? relative * std::abs(value) : 0.0);
        }
      }
      const auto p = static_cast<std::size_t>(positions[static_cast<std::size_t>(r)] * shape.half);
      const std::span<const float> cos(cos_.data() + p, static_cast<std::size_t>(shape.half));
      const std::span<const float> sin(sin_.data() + p, static_cast<std::size_t>(shape.half));
      for (int h = 0; h < shape.kv_heads; ++h) {
        const std::vector<float> k = head(shape.heads + h), v = head(shape.heads + shape.kv_heads + h);
        std::vector<double> exact(k.begin(), k.end());
        if (shape.norms) exact = reference::RmsNorm(k, k_norm_, double{1e-6f});
        const double largest = std::abs(*std::max_element(
            exact.begin(), exact.end(), [](double a, double b) { return std::abs(a) < std::abs(b); }));
        const std::vector<double> rotated = reference::Rotate(exact, cos, sin);
        const KvSlot slot = slots[static_cast<std::size_t>(r)];
        for (int i = 0; i < d; ++i) {
          const double value = rotated[static_cast<std::size_t>(i)];
          ASSERT_NEAR(Stored(slot, 1, 0, h, i), value, 2 * relative * largest + DTypeEps(dtype()) * std::abs(value));
          const double stored = double{v[static_cast<std::size_t>(i)]};
          ASSERT_NEAR(Stored(slot, 1, 1, h, i), stored,
                      DTypeEps(dtype()) * std::abs(stored) * (dtype() == DType::kBf16));
        }
      }
    }
    // Layer 0, page 1 and all other token rows are as they were.
    std::size_t changed = 0;
    for (std::size_t i = 0; i < pages_storage_.size(); ++i) changed += pages_storage_[i] != pages_before[i];
    EXPECT_LE(changed, 3 * 2 * static_cast<std::size_t>(shape.kv_heads * d) * DTypeBytes(dtype()));
    const std::size_t page = layout_.page_bytes();
    EXPECT_TRUE(std::equal(pages_before.begin() + static_cast<long>(page),
                           pages_before.begin() + 2 * static_cast<long>(page),
                           pages_storage_.begin() + static_cast<long>(page)));
    EXPECT_TRUE(
        std::equal(pages_before.begin(), pages_before.begin() + static_cast<long>(page / 2), pages_storage_.begin()));
  }
}

// One batch of many rows, the same rows one by one, and the same on other numbers of threads: the same pages and q.
TEST_P(StoreKvTest, ARowsBitsAreItsOwn) {
  Prepare({4, 2, 64, 32, true});
  constexpr std::int64_t kRows = 77;
  HostRows qkv(kRows, 8 * 64, DType::kF32);
  qkv.FillNormal(random_);
  std::vector<std::int64_t> positions;
  std::vector<KvSlot> slots;
  for (std::int64_t r = 0; r < kRows; ++r) {
    positions.push_back(r * 3 + 1);
    slots.push_back({static_cast<PageIndex>(r / kPageTokens), static_cast<int>(r % kPageTokens)});
  }
  const std::vector<std::byte> fresh = pages_storage_;
  HostRows whole = qkv;
  Store(whole, positions, slots);
  const std::vector<std::byte> stored = pages_storage_;
  for (const int threads : {1, 2, 3}) {
    backend_ = MakeBackend(threads);
    pages_storage_ = fresh;
    for (std::int64_t first = 0; first < kRows;) {
      const std::int64_t rows = std::min(kRows - first, std::uniform_int_distribution<std::int64_t>(1, 40)(random_));
      HostRows part(rows, qkv.cols(), DType::kF32);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < qkv.cols(); ++c) part.Set(r, c, qkv.Get(first + r, c));
      }
      Store(part, {positions.begin() + first, positions.begin() + first + rows},
            {slots.begin() + first, slots.begin() + first + rows});
      EXPECT_TRUE(whole.HoldsRows(first, part)) << rows << " rows from " << first;
      first += rows;
    }
    EXPECT_TRUE(pages_storage_ == stored) << threads << " threads";
  }
}

TEST_P(StoreKvTest, CopyPageRowsCopiesTheFirstRowsOfEverySlab) {
  Prepare({4, 2, 16, 8, false});
  for (std::size_t i = 0; i < pages_storage_.size(); ++i) pages_storage_[i] = static_cast<std::byte>(i * 131 >> 3);
  for (const int tokens : {0, 1, 37, 64}) {
    const std::vector<std::byte> before = pages_storage_;
    backend_->CopyPageRows(pages(), 0, 2, tokens);
    for (int layer = 0; layer < 2; ++layer) {
      for (int value = 0; value < 2; ++value) {
        for (int h = 0; h < 2; ++h) {
          const std::size_t bytes = layout_.slab_bytes() / kPageTokens * static_cast<std::size_t>(tokens);
          const std::byte* to = pages().slab(2, layer, value, h);
          EXPECT_EQ(std::memcmp(to, pages().slab(0, layer, value, h), bytes), 0);
          const std::byte* rest = before.data() + (to - pages_storage_.data()) + bytes;
          EXPECT_EQ(std::memcmp(to + bytes, rest, layout_.slab_bytes() - bytes), 0) << "rows behind changed";
        }
      }
    }
    EXPECT_EQ(std::memcmp(before.data(), pages_storage_.data(), 2 * layout_.page_bytes()), 0) << "another page changed";
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, RowOpsTest, ::testing::ValuesIn(BackendCases()), BackendCaseName);
INSTANTIATE_TEST_SUITE_P(Isa, StoreKvTest, ::testing::ValuesIn(BackendCases()), BackendCaseName);

TEST(BackendOptionsTest, WrongOptionsAreNamed) {
  const auto threads = NewCpuBackend({.compute = DType::kF32, .threads = -1});
  ASSERT_FALSE(threads.ok());
  EXPECT_NE(threads.status().message().find("-1"), std::string::npos);
  const auto isa = ParseCpuIsa("avx1024");
  ASSERT_FALSE(isa.ok());
  EXPECT_NE(isa.status().message().find("avx1024"), std::string::npos);
}

class IsaVariable {  // KVSHARE_ISA for the time of a test
 public:
  explicit IsaVariable(const char* value) {
    if (const char* before = std::getenv("KVSHARE_ISA")) before_ = before;
    setenv("KVSHARE_ISA", value, 1);
  }
  ~IsaVariable() {
    if (before_.has_value()) {
      setenv("KVSHARE_ISA", before_->c_str(), 1);
    } else {
      unsetenv("KVSHARE_ISA");
    }
  }

 private:
  std::optional<std::string> before_;
};

TEST(BackendOptionsTest, TheEnvironmentChoosesTheInstructionSet) {
  const IsaVariable variable("plain");
  const auto by_environment = NewCpuBackend({.compute = DType::kF32, .threads = 1});
  ASSERT_TRUE(by_environment.ok()) << by_environment.status().message();
  EXPECT_EQ((*by_environment)->capabilities().isa, "plain");
  // What the program asks for comes first.
  const CpuIsa best = AvailableIsas().front();
  const auto by_option = NewCpuBackend({.compute = DType::kF32, .threads = 1, .isa = best});
  ASSERT_TRUE(by_option.ok()) << by_option.status().message();
  EXPECT_EQ((*by_option)->capabilities().isa, CpuIsaName(best));
}

TEST(BackendOptionsTest, AWrongInstructionSetInTheEnvironmentIsNamed) {
  const IsaVariable variable("sse9");
  const auto backend = NewCpuBackend({.compute = DType::kF32, .threads = 1});
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(backend.status().message().find("KVSHARE_ISA"), std::string::npos);
  EXPECT_NE(backend.status().message().find("sse9"), std::string::npos);
}

TEST(BackendOptionsTest, EveryNameOfAnInstructionSetIsRead) {
  for (const CpuIsa isa :
       {CpuIsa::kAuto, CpuIsa::kAmxBf16, CpuIsa::kAvx512Bf16, CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kPlain}) {
    const auto parsed = ParseCpuIsa(CpuIsaName(isa));
    ASSERT_TRUE(parsed.ok());
    EXPECT_EQ(*parsed, isa);
  }
  EXPECT_EQ(AvailableIsas().back(), CpuIsa::kPlain);
}

TEST(BackendOptionsTest, MemoryIsAlignedAndZeroed) {
  const auto backend = NewCpuBackend({.compute = DType::kF32, .threads = 1});
  ASSERT_TRUE(backend.ok());
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{4097}, std::size_t{5} << 20}) {
    const auto buffer = (*backend)->Allocate(bytes);
    ASSERT_TRUE(buffer.ok()) << buffer.status().message();
    EXPECT_EQ((*buffer)->size(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>((*buffer)->data()) % 64, 0u);
    EXPECT_TRUE(
        std::all_of((*buffer)->data(), (*buffer)->data() + bytes, [](std::byte b) { return b == std::byte{0}; }));
  }
}

TEST(BackendOptionsTest, NumericsIdNamesInstructionSetAndDtype) {
  const auto backend = NewCpuBackend({.compute = DType::kF32, .threads = 1, .isa = CpuIsa::kPlain});
  ASSERT_TRUE(backend.ok());
  EXPECT_NE((*backend)->capabilities().numerics_id.find("plain/float32"), std::string::npos);
}

TEST(BackendOptionsTest, TooMuchMemoryIsRefused) {
  const auto backend = NewCpuBackend({.compute = DType::kF32, .threads = 1});
  ASSERT_TRUE(backend.ok());
  const auto buffer = (*backend)->Allocate(std::size_t{1} << 60);
  ASSERT_FALSE(buffer.ok());
  EXPECT_EQ(buffer.status().code(), StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace kvshare::kernels
