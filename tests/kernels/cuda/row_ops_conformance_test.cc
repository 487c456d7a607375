// The row-local CUDA operations and linear layers: near their oracles, and a row's bits its own; in the emulator
// always, on a GPU where there is one. Outputs begin as NaN.
#include <cmath>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "tests/kernels/backend_fixture.h"
#include "tests/kernels/cuda/backends.h"
#include "tests/reference/ops_reference.h"

namespace kvshare::kernels::cuda {
namespace {

class CudaRowOpsTest : public CudaTest {
 protected:
  // Host bytes on the backend, and back.
  std::unique_ptr<Buffer> Put(const void* data, std::size_t bytes) {
    auto buffer = backend_->Allocate(bytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status().message();
    EXPECT_TRUE(backend_->Upload((*buffer)->data(), data, bytes).ok());
    return std::move(buffer).value();
  }
  std::unique_ptr<Buffer> Put(HostRows& rows) { return Put(rows.View().data, Bytes(rows)); }
  std::unique_ptr<Buffer> Put(const std::vector<float>& values) { return Put(values.data(), values.size() * 4); }
  std::unique_ptr<Buffer> Poison(HostRows& rows) {
    std::memset(rows.View().data, 0xff, Bytes(rows));
    return Put(rows);
  }
  void Get(const Buffer& buffer, HostRows& rows) {
    const Status status = backend_->Download(rows.View().data, buffer.data(), Bytes(rows));
    ASSERT_TRUE(status.ok()) << status.message();
  }
  static std::size_t Bytes(HostRows& rows) {
    return static_cast<std::size_t>(rows.rows() * rows.cols()) * DTypeBytes(rows.View().dtype);
  }
  // The view of a host matrix, over its copy on the backend.
  static MatrixView On(const Buffer& buffer, HostRows& rows) {
    MatrixView view = rows.View();
    view.data = buffer.data();
    return view;
  }
  static std::span<const float> Floats(const Buffer& buffer) {
    return {reinterpret_cast<const float*>(buffer.data()), buffer.size() / 4};
  }

  // out = x W^T (+ bias), (accumulated) on rows [first, first + rows) of x.
  HostRows Multiply(const LinearWeights& weights, HostRows& x, std::int64_t first, std::int64_t rows) {
    HostRows part(rows, x.cols(), half()), out(rows, weights.out_features(), DType::kF32);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < x.cols(); ++c) part.Set(r, c, x.Get(first + r, c));
    }
    const auto in = Put(part), dst = Poison(out);
    backend_->Linear({.x = On(*in, part), .weights = &weights, .out = On(*dst, out)});
    Get(*dst, out);
    return out;
  }
  std::unique_ptr<LinearWeights> Weights(std::vector<HostRows>& parts, std::span<const float> bias, bool gated) {
    std::vector<std::vector<float>> values;
    std::vector<HostMatrix> matrices;
    for (HostRows& part : parts) {
      part.FillNormal(random_, 0.1f);
      values.emplace_back();
      for (std::int64_t r = 0; r < part.rows(); ++r) {
        const std::vector<float> row = part.Row(r);
        values.back().insert(values.back().end(), row.begin(), row.end());
      }
    }
    for (std::size_t i = 0; i < parts.size(); ++i) {
      matrices.push_back({values[i].data(), parts[i].rows(), parts[i].cols()});
    }
    auto made = backend_->MakeLinear({.parts = matrices, .bias = bias, .gated = gated});
    EXPECT_TRUE(made.ok()) << made.status().message();
    return std::move(made).value();
  }
  // Some order of K + 2 fp32 additions.
  static double SumBound(const reference::Sum& sum, std::int64_t k) {
    return static_cast<double>(k + 2) * kF32Eps * sum.magnitude + 0x1p-120;
  }

  std::mt19937_64 random_{20250611};
};

TEST_P(CudaRowOpsTest, EmbedCopiesTableRows) {
  for (const DType dtype : {half(), DType::kF32}) {
    HostRows table(11, 200, dtype), out(4, 200, DType::kF32);
    table.FillNormal(random_);
    std::vector<std::int32_t> ids = {10, 0, 3, 3};
    const auto src = Put(table), dst = Poison(out);
    backend_->Embed({.ids = ids, .table = On(*src, table), .out = On(*dst, out)});
    ids.assign(4, -1);  // the call has read them
    Get(*dst, out);
    for (std::int64_t r = 0; r < 4; ++r) EXPECT_EQ(out.Row(r), table.Row(std::vector{10, 0, 3, 3}[std::size_t(r)]));
  }
}

TEST_P(CudaRowOpsTest, RmsNormAgreesWithTheOracle) {
  for (const DType dtype : {half(), DType::kF32}) {
    for (const std::int64_t n : {1, 31, 128, 129, 576}) {
      HostRows x(5, n, DType::kF32), out(5, n, dtype), weight(1, n, DType::kF32);
      x.FillNormal(random_, 30.0f);
      weight.FillNormal(random_);
      const std::vector<float> w = weight.Row(0);
      const auto src = Put(x), scale = Put(w), dst = Poison(out);
      backend_->RmsNorm({.x = On(*src, x), .weight = Floats(*scale), .eps = 1e-5f, .out = On(*dst, out)});
      Get(*dst, out);
      const double relative = (static_cast<double>(n) / 2 + 8) * kF32Eps + DTypeEps(dtype);
      WorstError worst("RmsNorm n " + std::to_string(n));
      for (std::int64_t r = 0; r < x.rows(); ++r) {
        const std::vector<double> exact = reference::RmsNorm(x.Row(r), w, double{1e-5f});
        for (std::int64_t c = 0; c < n; ++c) {
          const double value = exact[static_cast<std::size_t>(c)];
          worst.Compare(out.Get(r, c), value, relative * std::abs(value) + DTypeTiny(dtype) + 0x1p-120, r, c);
        }
      }
    }
  }
}

// K un-normed is two products and a sum, each rounded: the CPU backend's bits in float32, rounded once more. Normed,
// near them.
TEST_P(CudaRowOpsTest, StoreKvStoresWhatTheCpuStores) {
  constexpr int kHeads = 4, kKvHeads = 2, kDim = 64, kHalf = 24;
  constexpr std::int64_t kRows = 5, kCols = (kHeads + 2 * kKvHeads) * kDim;
  const KvLayout layout{2, kKvHeads, kDim, half()}, cpu_layout{2, kKvHeads, kDim, DType::kF32};
  const std::vector<std::int64_t> positions = {0, 1, 77, 300, 511};
  const std::vector<KvSlot> slots = {{1, 0}, {1, 63}, kNoSlot, {2, 5}, {0, 9}};
  std::vector<float> cos, sin, norm;
  for (int i = 0; i < 512 * kHalf; ++i) {
    const double angle = i / kHalf * std::pow(1000.0, -double(i % kHalf) / kHalf);
    cos.push_back(static_cast<float>(std::cos(angle)));
    sin.push_back(static_cast<float>(std::sin(angle)));
  }
  for (int j = 0; j < kDim; ++j) norm.push_back(0.5f + static_cast<float>(j) / kDim);
  auto cpu = NewCpuBackend({.compute = DType::kF32, .threads = 1});
  ASSERT_TRUE(cpu.ok());
  for (const bool normed : {false, true}) {
    HostRows qkv(kRows, kCols, DType::kF32);
    qkv.FillNormal(random_);
    HostRows expected = qkv;
    std::vector<std::byte> pages(layout.page_bytes() * 3, std::byte{0xff});
    std::vector<float> cpu_pages(pages.size() / 2, std::nanf(""));
    StoreKvParams p{.qkv = expected.View(),
                    .num_heads = kHeads,
                    .layer = 1,
                    .eps = 1e-6f,
                    .rope = {cos, sin, 512, kHalf},
                    .positions = positions,
                    .slots = slots,
                    .pages = {reinterpret_cast<std::byte*>(cpu_pages.data()), 3, cpu_layout}};
    if (normed) p.q_norm = p.k_norm = norm;
    (*cpu)->StoreKv(p);
    const auto in = Put(qkv), c = Put(cos), s = Put(sin), w = Put(norm), mem = Put(pages.data(), pages.size());
    p.qkv = On(*in, qkv);
    p.rope.cos = Floats(*c);
    p.rope.sin = Floats(*s);
    p.pages = {mem->data(), 3, layout};
    if (normed) p.q_norm = p.k_norm = Floats(*w);
    backend_->StoreKv(p);
    Get(*in, qkv);
    ASSERT_TRUE(backend_->Download(pages.data(), mem->data(), pages.size()).ok());
    if (!normed) {
      EXPECT_TRUE(qkv.SameBytes(expected));
    }
    // Normed, the sum of squares has another order: a few units in the last place, and then one of the half.
    WorstError worst("normed q, k, v");
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t j = 0; j < kCols; ++j) {
        worst.Compare(qkv.Get(r, j), expected.Get(r, j), 80 * kF32Eps * std::abs(expected.Get(r, j)), r, j);
      }
    }
    const auto* got = reinterpret_cast<const std::uint16_t*>(pages.data());
    for (std::size_t i = 0; i < cpu_pages.size(); ++i) {
      const bool stored = !std::isnan(cpu_pages[i]);
      const std::uint32_t want = stored ? HalfBits(half(), cpu_pages[i]) : 0xffffu;
      if (!normed || !stored) {
        ASSERT_EQ(got[i], want) << "element " << i;
        continue;
      }
      const double x = FromHalf(half(), want), eps = DTypeEps(half());
      ASSERT_LE(std::abs(FromHalf(half(), got[i]) - x), 2 * eps * std::abs(x) + 1e-4 * eps) << "element " << i;
    }
  }
}

TEST_P(CudaRowOpsTest, LinearAgreesWithTheOracle) {
  for (const bool with_bias : {false, true}) {
    std::vector<HostRows> parts = {{24, 64, half()}, {16, 64, half()}};
    const std::vector<float> bias(with_bias ? 40 : 0, 0.25f);
    const auto weights = Weights(parts, bias, false);
    EXPECT_EQ(weights->out_features(), 40);
    HostRows x(9, 64, half()), out(9, 40, DType::kF32);
    x.FillNormal(random_);
    out.FillNormal(random_);
    const HostRows before = out;
    const auto in = Put(x), dst = Put(out);
    backend_->Linear({.x = On(*in, x), .weights = weights.get(), .out = On(*dst, out), .accumulate = true});
    Get(*dst, out);
    WorstError worst("Linear");
    for (std::int64_t r = 0; r < 9; ++r) {
      for (std::int64_t c = 0; c < 40; ++c) {
        const HostRows& part = parts[c < 24 ? 0 : 1];
        const std::vector<float> row = x.Row(r), w = part.Row(c < 24 ? c : c - 24);
        reference::Sum exact = reference::Dot(row, w, with_bias ? 0.25 : 0.0);
        exact.value += double{before.Get(r, c)};
        exact.magnitude += std::abs(double{before.Get(r, c)});
        worst.Compare(out.Get(r, c), exact.value, SumBound(exact, 64), r, c);
      }
    }
  }
}

TEST_P(CudaRowOpsTest, GatedLinearAgreesWithTheOracle) {
  std::vector<HostRows> parts = {{24, 64, half()}, {24, 64, half()}};
  const auto weights = Weights(parts, {}, true);
  HostRows x(9, 64, half()), out(9, 24, half());
  x.FillNormal(random_, 3.0f);
  const auto in = Put(x), dst = Poison(out);
  backend_->GatedLinear({.x = On(*in, x), .weights = weights.get(), .out = On(*dst, out)});
  Get(*dst, out);
  WorstError worst("GatedLinear");
  for (std::int64_t r = 0; r < 9; ++r) {
    for (std::int64_t c = 0; c < 24; ++c) {
      const reference::Sum gate = reference::Dot(x.Row(r), parts[0].Row(c), 0);
      const reference::Sum up = reference::Dot(x.Row(r), parts[1].Row(c), 0);
      const double silu = reference::Silu(gate.value), value = silu * up.value;
      const double up_error = SumBound(up, 64);
      worst.Compare(out.Get(r, c), value,
                    1.1 * SumBound(gate, 64) * (std::abs(up.value) + up_error) + std::abs(silu) * up_error +
                        (16 * kF32Eps + DTypeEps(half())) * std::abs(value) + DTypeTiny(half()) + 0x1p-120,
                    r, c);
    }
  }
}

TEST_P(CudaRowOpsTest, ALinearRowsBitsAreItsOwn) {
  std::vector<HostRows> parts = {{40, 64, half()}};
  const auto weights = Weights(parts, {}, false);
  HostRows x(150, 64, half());
  x.FillNormal(random_);
  const HostRows whole = Multiply(*weights, x, 0, 150);
  for (int i = 0; i < Repeats(6); ++i) {
    const std::int64_t rows = std::uniform_int_distribution<std::int64_t>(1, 150)(random_);
    const std::int64_t first = std::uniform_int_distribution<std::int64_t>(0, 150 - rows)(random_);
    ASSERT_TRUE(whole.HoldsRows(first, Multiply(*weights, x, first, rows))) << rows << " rows from " << first;
  }
}

TEST_P(CudaRowOpsTest, CopyPageRowsCopiesThoseRowsAlone) {
  const KvLayout layout{2, 2, 64, half()};
  std::vector<std::byte> pages(layout.page_bytes() * 2);
  for (std::byte& b : pages) b = static_cast<std::byte>(random_());
  for (const int tokens : {0, 1, 37, 64}) {
    std::vector<std::byte> expected = pages, got = pages;
    auto cpu = NewCpuBackend({.threads = 1});
    ASSERT_TRUE(cpu.ok());
    (*cpu)->CopyPageRows({expected.data(), 2, layout}, 1, 0, tokens);
    const auto mem = Put(pages.data(), pages.size());
    backend_->CopyPageRows({mem->data(), 2, layout}, 1, 0, tokens);
    ASSERT_TRUE(backend_->Download(got.data(), mem->data(), got.size()).ok());
    EXPECT_EQ(got, expected) << tokens << " tokens";
  }
}

TEST_P(CudaRowOpsTest, FreshMemoryIsZero) {
  for (int i = 0; i < 3; ++i) {
    auto buffer = backend_->Allocate(1000);
    ASSERT_TRUE(buffer.ok());
    std::vector<std::byte> bytes(1000, std::byte{1});
    ASSERT_TRUE(backend_->Download(bytes.data(), (*buffer)->data(), bytes.size()).ok());
    EXPECT_EQ(bytes, std::vector<std::byte>(1000));
    bytes.assign(1000, std::byte{7});  // what the next one is given
    ASSERT_TRUE(backend_->Upload((*buffer)->data(), bytes.data(), bytes.size()).ok());
  }
}

TEST_P(CudaRowOpsTest, SelfTestPasses) {
  const Status status = backend_->SelfTest();
  EXPECT_TRUE(status.ok()) << status.message();
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaRowOpsTest, kEachHalf, WhereName);

}  // namespace
}  // namespace kvshare::kernels::cuda
