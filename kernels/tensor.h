// Non-owning views of dense row-major matrices on a backend's device, and their element types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace kvshare::kernels {

enum class DType : std::uint8_t { kF32 = 0, kBf16 = 1, kF16 = 2 };

constexpr std::size_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr std::string_view DTypeName(DType dtype) {
  return dtype == DType::kF32 ? "float32" : dtype == DType::kBf16 ? "bfloat16" : "float16";
}
constexpr std::optional<DType> DTypeNamed(std::string_view name) {
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    if (DTypeName(dtype) == name) return dtype;
  }
  return std::nullopt;
}

// [rows, cols], row r starts at data + r * stride elements. Does not own; the device is the backend's.
struct MatrixView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;  // in elements; >= cols

  template <typename T>
  T* row(std::int64_t r) const {
    return static_cast<T*>(data) + r * stride;
  }
};

}  // namespace kvshare::kernels
