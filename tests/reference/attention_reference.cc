#include "tests/reference/attention_reference.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/half.h"

namespace kvshare::reference {
namespace {

double Element(const std::byte* slab, kernels::DType dtype, std::int64_t index) {
  if (dtype == kernels::DType::kF32) return reinterpret_cast<const float*>(slab)[index];
  return kernels::FromHalf(dtype, reinterpret_cast<const std::uint16_t*>(slab)[index]);
}

struct Key {
  double score;
  const std::byte* values;  // V slab
  std::int64_t token;       // within the page
  std::size_t segment;
  std::int64_t index;  // within the segment
};

// The keys that a row's head sees, in the order of the segments. `bound` becomes the greatest sum of |q_d| |k_d|,
// scaled.
std::vector<Key> SeenKeys(const kernels::AttentionParams& p, const std::vector<double>& inv_freq, std::int64_t i, int h,
                          double* bound) {
  const kernels::KvLayout& layout = p.pages.layout;
  const std::int64_t d = layout.head_dim;
  const std::int64_t half = static_cast<std::int64_t>(inv_freq.size());
  const std::int64_t position = p.positions[static_cast<std::size_t>(i)];
  const int kv_head = h / (p.num_heads / layout.num_kv_heads);
  const float* raw = p.q.row<float>(i) + h * d;
  std::vector<double> q(static_cast<std::size_t>(d));
  std::vector<Key> keys;
  *bound = 0;
  for (std::size_t n = 0; n < p.segments.size(); ++n) {
    const kernels::KvSegment& s = p.segments[n];
    if (i < s.row_begin || i >= s.row_end) continue;
    for (std::int64_t j = 0; j < d; ++j) q[static_cast<std::size_t>(j)] = raw[j];
    for (std::int64_t j = 0; j < half; ++j) {
      const double angle = static_cast<double>(position - s.shift) * inv_freq[static_cast<std::size_t>(j)];
      q[static_cast<std::size_t>(j)] = raw[j] * std::cos(angle) - raw[j + half] * std::sin(angle);
      q[static_cast<std::size_t>(j + half)] = raw[j + half] * std::cos(angle) + raw[j] * std::sin(angle);
    }
    for (std::int64_t t = 0; t < s.length; ++t) {
      const std::size_t page = static_cast<std::size_t>((s.first + t) / kernels::kPageTokens);
      const std::int64_t token = (s.first + t) % kernels::kPageTokens;
      const std::int64_t at = s.positions.empty() ? s.start + t : s.positions[static_cast<std::size_t>(t)];
      if (at > position || (p.window > 0 && at <= position - p.window)) continue;
      if (!s.skip.empty() && ((s.skip[page] >> token) & 1) != 0) continue;
      const std::byte* k = p.pages.slab(s.pages[page], p.layer, 0, kv_head);
      double score = 0;
      double sum = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        const double product = q[static_cast<std::size_t>(j)] * Element(k, layout.dtype, token * d + j);
        score += product;
        sum += std::abs(product);
      }
      keys.push_back({score * p.scale, p.pages.slab(s.pages[page], p.layer, 1, kv_head), token, n, t});
      *bound = std::max(*bound, sum * p.scale);
    }
  }
  return keys;
}

// Scores become weights.
void Softmax(std::vector<Key>* keys) {
  double top = (*keys)[0].score;
  for (const Key& key : *keys) top = std::max(top, key.score);
  double sum = 0;
  for (Key& key : *keys) sum += key.score = std::exp(key.score - top);
  for (Key& key : *keys) key.score /= sum;
}

}  // namespace

AttentionResult Attention(const kernels::AttentionParams& p, const std::vector<double>& inv_freq) {
  const std::int64_t d = p.pages.layout.head_dim;
  const std::int64_t rows = p.q.rows;
  const std::size_t cells = static_cast<std::size_t>(rows * p.num_heads);
  AttentionResult result;
  result.out.assign(cells * static_cast<std::size_t>(d), 0.0);
  result.weighted_abs = result.out;
  result.score_bound.assign(cells, 0.0);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (int h = 0; h < p.num_heads; ++h) {
      const std::size_t cell = static_cast<std::size_t>(i * p.num_heads + h);
      std::vector<Key> keys = SeenKeys(p, inv_freq, i, h, &result.score_bound[cell]);
      if (keys.empty()) continue;
      Softmax(&keys);
      double* out = result.out.data() + cell * static_cast<std::size_t>(d);
      double* abs = result.weighted_abs.data() + cell * static_cast<std::size_t>(d);
      for (const Key& key : keys) {
        for (std::int64_t j = 0; j < d; ++j) {
          const double v = Element(key.values, p.pages.layout.dtype, key.token * d + j);
          out[j] += key.score * v;
          abs[j] += key.score * std::abs(v);
        }
      }
    }
  }
  return result;
}

MassResult AttentionMass(const kernels::AttentionParams& p, const std::vector<double>& inv_freq,
                         const std::vector<std::int64_t>& rows) {
  MassResult result;
  for (const kernels::KvSegment& s : p.segments) result.mass.emplace_back(static_cast<std::size_t>(s.length), 0.0);
  for (const std::int64_t i : rows) {
    for (int h = 0; h < p.num_heads; ++h) {
      double bound = 0;
      std::vector<Key> keys = SeenKeys(p, inv_freq, i, h, &bound);
      result.score_bound = std::max(result.score_bound, bound);
      if (keys.empty()) continue;
      Softmax(&keys);
      for (const Key& key : keys) result.mass[key.segment][static_cast<std::size_t>(key.index)] += key.score;
    }
  }
  return result;
}

}  // namespace kvshare::reference
