#include "kernels/kv_rows.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/half.h"
#include "libkvshare/core/check.h"

namespace kvshare::kernels {
namespace {

std::size_t Index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::size_t HeadBytes(const KvLayout& layout) { return Index(layout.head_dim) * DTypeBytes(layout.dtype); }

// One head's part of a stored row.
std::byte* At(const KvPages& pages, int layer, KvPart part, KvSlot slot, int head) {
  return pages.slab(slot.page, layer, static_cast<int>(part), head) + Index(slot.offset) * HeadBytes(pages.layout);
}

void CheckRow(const KvPages& pages, int layer, KvSlot slot) {
  KVS_CHECK(slot.page < pages.num_pages && slot.offset >= 0 && slot.offset < kPageTokens);
  KVS_CHECK(layer >= 0 && layer < pages.layout.num_layers);
}

std::size_t RowWidth(const KvLayout& layout) { return Index(layout.num_kv_heads) * Index(layout.head_dim); }

// Multiplies every head of `row` by scale * e^{i angle}, with cos and sin of the table's row `position`, the angle
// negated where `sign` is -1.
void Turn(const RopeTable& rope, std::int64_t position, float sign, float scale, int head_dim, std::span<float> row) {
  KVS_CHECK(position >= 0 && position < rope.positions && 2 * rope.half <= head_dim);
  KVS_CHECK(head_dim > 0 && row.size() % Index(head_dim) == 0);
  const int half = rope.half;
  const float* cos = rope.cos.data() + position * half;
  const float* sin = rope.sin.data() + position * half;
  for (std::size_t head = 0; head < row.size(); head += Index(head_dim)) {
    float* x = row.data() + head;
    for (int j = 0; j < half; ++j) {
      const float a = x[j], b = x[j + half], c = cos[j] * scale, s = sign * sin[j] * scale;
      x[j] = a * c - b * s;
      x[j + half] = b * c + a * s;
    }
  }
}

// What the table's cos and sin are multiplied with: cos(0) = 1.
float Factor(const RopeTable& rope) { return rope.half == 0 ? 1.0f : rope.cos[0]; }

}  // namespace

void LoadRow(const KvPages& pages, int layer, KvPart part, KvSlot slot, std::span<float> row) {
  const KvLayout& layout = pages.layout;
  CheckRow(pages, layer, slot);
  KVS_CHECK(row.size() == RowWidth(layout));
  for (int head = 0; head < layout.num_kv_heads; ++head) {
    float* to = row.data() + head * layout.head_dim;
    const std::byte* from = At(pages, layer, part, slot, head);
    if (layout.dtype == DType::kF32) {
      std::memcpy(to, from, HeadBytes(layout));
      continue;
    }
    const auto* narrow = reinterpret_cast<const std::uint16_t*>(from);
    for (int i = 0; i < layout.head_dim; ++i) to[i] = FromHalf(layout.dtype, narrow[i]);
  }
}

void StoreRow(const KvPages& pages, int layer, KvPart part, KvSlot slot, std::span<const float> row) {
  const KvLayout& layout = pages.layout;
  CheckRow(pages, layer, slot);
  KVS_CHECK(row.size() == RowWidth(layout));
  for (int head = 0; head < layout.num_kv_heads; ++head) {
    const float* from = row.data() + head * layout.head_dim;
    std::byte* to = At(pages, layer, part, slot, head);
    if (layout.dtype == DType::kF32) {
      std::memcpy(to, from, HeadBytes(layout));
      continue;
    }
    auto* narrow = reinterpret_cast<std::uint16_t*>(to);
    for (int i = 0; i < layout.head_dim; ++i) narrow[i] = static_cast<std::uint16_t>(HalfBits(layout.dtype, from[i]));
  }
}

void CopyRows(const KvPages& pages, std::span<const KvSlot> from, std::span<const KvSlot> to, int layer_begin,
              int layer_end) {
  KVS_CHECK(from.size() == to.size() && 0 <= layer_begin && layer_end <= pages.layout.num_layers);
  const std::size_t bytes = HeadBytes(pages.layout);
  for (int layer = layer_begin; layer < layer_end; ++layer) {
    for (std::size_t i = 0; i < from.size(); ++i) {
      CheckRow(pages, layer, from[i]);
      CheckRow(pages, layer, to[i]);
      for (const KvPart part : {KvPart::kKey, KvPart::kValue}) {
        for (int head = 0; head < pages.layout.num_kv_heads; ++head) {
          std::memmove(At(pages, layer, part, to[i], head), At(pages, layer, part, from[i], head), bytes);
        }
      }
    }
  }
}

void MoveKey(const RopeTable& rope, std::int64_t delta, int head_dim, std::span<float> row) {
  // The stored key holds m already: the correcting rotation must not bring it once more.
  Turn(rope, delta < 0 ? -delta : delta, delta < 0 ? -1.0f : 1.0f, 1.0f / Factor(rope), head_dim, row);
}

void CanonicalKey(const RopeTable& rope, std::int64_t position, int head_dim, std::span<float> row) {
  // The inverse of m R(p) is R(-p) / m, and the table's row of p is m R(p).
  const float m = Factor(rope);
  Turn(rope, position, -1.0f, 1.0f / (m * m), head_dim, row);
}

void StoredKey(const RopeTable& rope, std::int64_t position, int head_dim, std::span<float> row) {
  Turn(rope, position, 1.0f, 1.0f, head_dim, row);
}

RowDeviation Deviation(std::span<const float> fresh, std::span<const float> stored) {
  KVS_CHECK(fresh.size() == stored.size());
  double squares = 0, dot = 0, fresh_norm = 0, stored_norm = 0;
  for (std::size_t i = 0; i < fresh.size(); ++i) {
    const double a = fresh[i], b = stored[i];
    squares += (a - b) * (a - b);
    dot += a * b;
    fresh_norm += a * a;
    stored_norm += b * b;
  }
  RowDeviation out{static_cast<float>(squares), 1.0f};
  if (fresh_norm > 0 && stored_norm > 0) out.cosine = static_cast<float>(dot / std::sqrt(fresh_norm * stored_norm));
  return out;
}

void ValueDeviation(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
                    std::span<RowDeviation> out) {
  const std::size_t width = RowWidth(pages.layout);
  KVS_CHECK(fresh.dtype == DType::kF32 && Index(fresh.cols) == width && Index(fresh.rows) == stored.size());
  KVS_CHECK(out.size() == stored.size());
  std::vector<float> row(width);
  for (std::size_t i = 0; i < stored.size(); ++i) {
    LoadRow(pages, layer, KvPart::kValue, stored[i], row);
    out[i] = Deviation({fresh.row<float>(static_cast<std::int64_t>(i)), width}, row);
  }
}

}  // namespace kvshare::kernels
