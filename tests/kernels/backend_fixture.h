// What the backend's tests share: one backend per instruction set and dtype, host buffers of any dtype, random
// numbers.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/isa.h"
#include "kernels/half.h"

namespace kvshare::kernels {

inline constexpr double kF32Eps = 0x1p-24;  // half a unit in the last place, relative
inline constexpr double kBf16Eps = 0x1p-8;
inline constexpr double kF16Eps = 0x1p-11;

inline double DTypeEps(DType dtype) {
  return dtype == DType::kF32 ? kF32Eps : dtype == DType::kBf16 ? kBf16Eps : kF16Eps;
}
// What rounding adds to that near zero: half of float16's smallest step; the others' are nothing.
inline double DTypeTiny(DType dtype) { return dtype == DType::kF16 ? 0x1p-25 : 0; }

// A [rows, cols] matrix of any dtype in host memory.
class HostRows {
 public:
  HostRows(std::int64_t rows, std::int64_t cols, DType dtype)
      : rows_(rows), cols_(cols), dtype_(dtype), bytes_(static_cast<std::size_t>(rows * cols) * DTypeBytes(dtype)) {}

  MatrixView View() { return View(0, rows_); }
  MatrixView View(std::int64_t first, std::int64_t rows) {
    return {bytes_.data() + static_cast<std::size_t>(first * cols_) * DTypeBytes(dtype_), dtype_, rows, cols_, cols_};
  }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }

  void Set(std::int64_t r, std::int64_t c, float value) {
    const std::size_t i = static_cast<std::size_t>(r * cols_ + c);
    if (dtype_ == DType::kF32) {
      std::memcpy(bytes_.data() + 4 * i, &value, 4);
      return;
    }
    const auto half = static_cast<std::uint16_t>(HalfBits(dtype_, value));
    std::memcpy(bytes_.data() + 2 * i, &half, 2);
  }
  float Get(std::int64_t r, std::int64_t c) const {
    const std::size_t i = static_cast<std::size_t>(r * cols_ + c);
    if (dtype_ == DType::kF32) {
      float value;
      std::memcpy(&value, bytes_.data() + 4 * i, 4);
      return value;
    }
    std::uint16_t half;
    std::memcpy(&half, bytes_.data() + 2 * i, 2);
    return FromHalf(dtype_, half);
  }
  std::vector<float> Row(std::int64_t r) const {
    std::vector<float> row;
    for (std::int64_t c = 0; c < cols_; ++c) row.push_back(Get(r, c));
    return row;
  }
  void FillNormal(std::mt19937_64& random, float sigma = 1.0f) {
    std::normal_distribution<float> normal(0.0f, sigma);
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < cols_; ++c) Set(r, c, normal(random));
    }
  }
  bool SameBytes(const HostRows& other) const { return bytes_ == other.bytes_; }
  // Rows [first, first + part.rows()) of this are the bytes of `part`.
  bool HoldsRows(std::int64_t first, const HostRows& part) const {
    return std::memcmp(bytes_.data() + static_cast<std::size_t>(first * cols_) * DTypeBytes(dtype_), part.bytes_.data(),
                       part.bytes_.size()) == 0;
  }

 private:
  std::int64_t rows_, cols_;
  DType dtype_;
  std::vector<std::byte> bytes_;
};

// Compares many elements with their bounds and names the worst: the one whose error is most times its bound.
class WorstError {
 public:
  explicit WorstError(std::string what) : what_(std::move(what)) {}
  ~WorstError() { EXPECT_LE(ratio_, 1.0) << what_ << ": worst of " << count_ << " is " << where_; }

  void Compare(double got, double wanted, double bound, std::int64_t row, std::int64_t col) {
    ++count_;
    const double error = std::abs(got - wanted);
    const double ratio = error == 0 ? 0 : error / bound;  // NaN and a bound of zero are worse than all
    if (ratio <= ratio_) return;
    ratio_ = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
    std::ostringstream text;
    text << "[" << row << ", " << col << "]: " << got << " instead of " << wanted << ", off by " << error
         << ", allowed " << bound;
    where_ = text.str();
  }

 private:
  std::string what_, where_;
  std::int64_t count_ = 0;
  double ratio_ = 0;
};

struct BackendCase {
  CpuIsa isa;
  DType dtype;
};

inline std::string BackendCaseName(const ::testing::TestParamInfo<BackendCase>& info) {
  std::string name = std::string(CpuIsaName(info.param.isa)) + "_" + std::string(DTypeName(info.param.dtype));
  for (char& c : name) {
    if (c == '-') c = '_';
  }
  return name;
}

// Every instruction set of this machine, with either dtype.
inline std::vector<BackendCase> BackendCases() {
  std::vector<BackendCase> cases;
  for (const CpuIsa isa : AvailableIsas()) {
    for (const DType dtype : {DType::kF32, DType::kBf16}) cases.push_back({isa, dtype});
  }
  return cases;
}

class BackendTest : public ::testing::TestWithParam<BackendCase> {
 protected:
  static std::unique_ptr<Backend> MakeBackend(int threads) {
    auto backend = NewCpuBackend({.compute = GetParam().dtype, .threads = threads, .isa = GetParam().isa});
    EXPECT_TRUE(backend.ok()) << backend.status().message();
    return std::move(backend).value();
  }
  static DType dtype() { return GetParam().dtype; }

  std::mt19937_64 random_{20240611};
  std::unique_ptr<Backend> backend_ = MakeBackend(2);
};

}  // namespace kvshare::kernels
