// Single rows of paged KV, for code that repairs some of them: reading, writing and copying them, moving a key to
// another position, and telling by how much a stored row is off. On the host, in fp32; the pages must lie in memory
// that the host reads.
//
// A key has two frames. Stored: m R(p) k, rotated at its base position p, where m is the factor that yarn multiplies
// cos and sin with (1 for other kinds). Canonical: k itself, after QK-norm and before RoPE, in which keys of different
// positions compare and offsets add up. A "row" is all kv heads of one token: [num_kv_heads * head_dim].
#pragma once

#include <cstdint>
#include <span>

#include "kernels/backend.h"

namespace kvshare::kernels {

enum class KvPart : int { kKey = 0, kValue = 1 };

// Widens one stored row to fp32. Requires row.size() == num_kv_heads * head_dim.
void LoadRow(const KvPages& pages, int layer, KvPart part, KvSlot slot, std::span<float> row);
// The inverse, rounded to nearest even as the forward pass rounds.
void StoreRow(const KvPages& pages, int layer, KvPart part, KvSlot slot, std::span<const float> row);

// Copies K and V, byte for byte, of layers [layer_begin, layer_end) from from[i] to to[i], in ascending i.
void CopyRows(const KvPages& pages, std::span<const KvSlot> from, std::span<const KvSlot> to, int layer_begin,
              int layer_end);

// A stored key of position p becomes the stored key of position p + delta. The factor m stays as it is.
// Requires |delta| < rope.positions and a row of whole heads.
void MoveKey(const RopeTable& rope, std::int64_t delta, int head_dim, std::span<float> row);
// Stored at `position` -> canonical.
void CanonicalKey(const RopeTable& rope, std::int64_t position, int head_dim, std::span<float> row);
// Canonical -> stored at `position`: with the bits that the forward pass stores for the same canonical key, once
// StoreRow has rounded it, where the arithmetic is the same (fp32, no fused multiply-add).
void StoredKey(const RopeTable& rope, std::int64_t position, int head_dim, std::span<float> row);

// How far a stored row is from a fresh one.
struct RowDeviation {
  float squares = 0;  // sum of (fresh - stored)^2
  float cosine = 1;   // of the angle between the two; 1 where either is zero
};

RowDeviation Deviation(std::span<const float> fresh, std::span<const float> stored);

// out[i] = Deviation(V of row i in `fresh` [n, num_kv_heads * head_dim] fp32, V stored at stored[i]) of one layer.
void ValueDeviation(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
                    std::span<RowDeviation> out);

}  // namespace kvshare::kernels
