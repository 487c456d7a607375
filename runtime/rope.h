// Rotary position embedding: the frequencies of its static kinds and the table of cos and sin that kernels read.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/model_config.h"

namespace kvshare::runtime {

// inv_freq[j], j < head_dim / 2: radians per position of the pair (j, j + head_dim / 2), as transformers'
// modeling_rope_utils computes it for the kind (there in fp32, here in double).
//   default  theta^(-2j / head_dim)
//   linear   default / factor
//   llama3   default where the wavelength is short against the original context, / factor where it is long, a ramp
//   between yarn     the same by the number of turns within the original context (arXiv 2309.00071, eq. 23)
std::vector<double> RopeFrequencies(const RopeConfig& rope, int head_dim);

// What cos and sin are multiplied with: yarn's attention factor, else 1.
double RopeAttentionFactor(const RopeConfig& rope);

// 0.1 mscale ln(factor) + 1 (arXiv 2309.00071, eq. 22), 1 for a factor up to 1.
double YarnAttentionFactor(double factor, double mscale);

// cos[p * half + j] = factor * cos(p * inv_freq[j]), sin likewise, for p < positions: double precision, rounded once.
void FillRopeTable(const RopeConfig& rope, int head_dim, std::int64_t positions, int threads, float* cos, float* sin);

}  // namespace kvshare::runtime
