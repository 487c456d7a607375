// Element types of tensors in model files, and their decoding to fp32: a table, one row per type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"

namespace kvshare::runtime {

// Values lie in blocks: one value for the plain types, 32 values sharing a scale for the quantised ones. A row of a
// matrix is a whole number of blocks.
struct TensorType {
  const char* name;  // as safetensors and ggml write it
  int gguf_id;       // ggml's number of the type
  bool in_safetensors;
  std::int64_t block_values;
  std::size_t block_bytes;
  // Decodes `blocks` blocks from `in` to blocks * block_values floats.
  void (*decode)(const std::byte* in, std::int64_t blocks, float* out);
};

// Null for a type we cannot decode.
const TensorType* FindGgufType(std::uint32_t id);
const TensorType* FindSafetensorsType(std::string_view name);

// A tensor as it lies in a mapped file, row-major. Invariant: bytes.size() == TensorBytes(*type, shape).
struct TensorView {
  const TensorType* type = nullptr;
  std::vector<std::int64_t> shape;  // outermost first; a vector has one dimension
  std::span<const std::byte> bytes;

  std::int64_t rows() const { return shape.size() < 2 ? 1 : shape[0]; }
  std::int64_t cols() const { return shape.empty() ? 1 : shape.back(); }
};

std::string ShapeText(std::span<const std::int64_t> shape);  // "[3, 5]"

// Bytes of a tensor. InvalidArgument for a dimension that is negative or not made of whole blocks, or a size beyond
// 2^62.
Result<std::uint64_t> TensorBytes(const TensorType& type, std::span<const std::int64_t> shape);

// Decodes rows [begin, end) of a tensor of one or two dimensions to out[(r - begin) * cols].
void DecodeRows(const TensorView& tensor, std::int64_t begin, std::int64_t end, float* out);

}  // namespace kvshare::runtime
