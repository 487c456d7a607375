#include "runtime/dequant.h"

#include <algorithm>
#include <cstring>

#include "kernels/half.h"
#include "libkvshare/core/check.h"

namespace kvshare::runtime {
namespace {

constexpr int kQuantBlock = 32;  // ggml's QK4_0, QK4_1 and QK8_0

template <typename T>
T Load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

void DecodeF32(const std::byte* in, std::int64_t blocks, float* out) {
  std::memcpy(out, in, static_cast<std::size_t>(blocks) * 4);
}

void DecodeF16(const std::byte* in, std::int64_t blocks, float* out) {
  for (std::int64_t i = 0; i < blocks; ++i) out[i] = kernels::FromF16(Load<std::uint16_t>(in + 2 * i));
}

void DecodeBf16(const std::byte* in, std::int64_t blocks, float* out) {
  for (std::int64_t i = 0; i < blocks; ++i) {
    out[i] = kernels::FromBf16(Load<std::uint16_t>(in + 2 * i));
  }
}

// Block {half d; 16 bytes}: byte j holds value j in its low and value j + 16 in its high half; x = (q - 8) d.
void DecodeQ4_0(const std::byte* in, std::int64_t blocks, float* out) {
  for (std::int64_t b = 0; b < blocks; ++b, in += 18, out += kQuantBlock) {
    const float d = kernels::FromF16(Load<std::uint16_t>(in));
    for (int j = 0; j < kQuantBlock / 2; ++j) {
      const int q = std::to_integer<int>(in[2 + j]);
      out[j] = static_cast<float>((q & 15) - 8) * d;
      out[j + kQuantBlock / 2] = static_cast<float>((q >> 4) - 8) * d;
    }
  }
}

// Block {half d; half m; 16 bytes}: as Q4_0, x = q d + m.
void DecodeQ4_1(const std::byte* in, std::int64_t blocks, float* out) {
  for (std::int64_t b = 0; b < blocks; ++b, in += 20, out += kQuantBlock) {
    const float d = kernels::FromF16(Load<std::uint16_t>(in));
    const float m = kernels::FromF16(Load<std::uint16_t>(in + 2));
    for (int j = 0; j < kQuantBlock / 2; ++j) {
      const int q = std::to_integer<int>(in[4 + j]);
      out[j] = static_cast<float>(q & 15) * d + m;
      out[j + kQuantBlock / 2] = static_cast<float>(q >> 4) * d + m;
    }
  }
}

// Block {half d; 32 signed bytes}: x = q d.
void DecodeQ8_0(const std::byte* in, std::int64_t blocks, float* out) {
  for (std::int64_t b = 0; b < blocks; ++b, in += 34, out += kQuantBlock) {
    const float d = kernels::FromF16(Load<std::uint16_t>(in));
    for (int j = 0; j < kQuantBlock; ++j) out[j] = static_cast<float>(Load<std::int8_t>(in + 2 + j)) * d;
  }
}

constexpr TensorType kTypes[] = {
    {"F32", 0, true, 1, 4, DecodeF32},
    {"F16", 1, true, 1, 2, DecodeF16},
    {"BF16", 30, true, 1, 2, DecodeBf16},
    {"Q4_0", 2, false, kQuantBlock, 18, DecodeQ4_0},
    {"Q4_1", 3, false, kQuantBlock, 20, DecodeQ4_1},
    {"Q8_0", 8, false, kQuantBlock, 34, DecodeQ8_0},
};

}  // namespace

const TensorType* FindGgufType(std::uint32_t id) {
  for (const TensorType& type : kTypes) {
    if (static_cast<std::uint32_t>(type.gguf_id) == id) return &type;
  }
  return nullptr;
}

const TensorType* FindSafetensorsType(std::string_view name) {
  for (const TensorType& type : kTypes) {
    if (type.in_safetensors && type.name == name) return &type;
  }
  return nullptr;
}

std::string ShapeText(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

Result<std::uint64_t> TensorBytes(const TensorType& type, std::span<const std::int64_t> shape) {
  constexpr std::uint64_t kLimit = std::uint64_t{1} << 62;
  std::uint64_t values = 1;
  for (const std::int64_t dim : shape) {
    if (dim < 0) return InvalidArgument("shape " + ShapeText(shape) + " has a negative dimension");
    if (dim != 0 && values > kLimit / static_cast<std::uint64_t>(dim)) {
      return InvalidArgument("shape " + ShapeText(shape) + " is larger than any memory");
    }
    values *= static_cast<std::uint64_t>(dim);
  }
  const std::int64_t cols = shape.empty() ? 1 : shape.back();
  if (cols % type.block_values != 0) {
    return InvalidArgument("shape " + ShapeText(shape) + ": a row is not made of whole " + type.name + " blocks of " +
                           std::to_string(type.block_values));
  }
  const std::uint64_t blocks = values / static_cast<std::uint64_t>(type.block_values);
  if (blocks > kLimit / type.block_bytes) {
    return InvalidArgument("shape " + ShapeText(shape) + " is larger than any memory");
  }
  return blocks * type.block_bytes;
}

void DecodeRows(const TensorView& tensor, std::int64_t begin, std::int64_t end, float* out) {
  KVS_CHECK(tensor.shape.size() <= 2 && 0 <= begin && begin <= end && end <= tensor.rows());
  const std::int64_t row_blocks = tensor.cols() / tensor.type->block_values;
  if (begin == end || row_blocks == 0) return;  // `out` may be null where there is nothing to write
  const std::byte* in = tensor.bytes.data() + static_cast<std::size_t>(begin * row_blocks) * tensor.type->block_bytes;
  tensor.type->decode(in, (end - begin) * row_blocks, out);
}

}  // namespace kvshare::runtime
