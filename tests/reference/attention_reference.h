// The double-precision oracle of attention, written from the equation alone: no tiles, splits or running maxima.
//   out[i, h] = sum_j softmax_j(scale * <R(pos_i - shift_s) q[i, h], k_j>) v_j
#pragma once

#include <vector>

#include "kernels/backend.h"

namespace kvshare::reference {

struct AttentionResult {
  // All [T, num_heads * head_dim].
  std::vector<double> out;
  std::vector<double> weighted_abs;  // sum_j w_j |v_j|: what a relative error of the weights is multiplied by
  // [T, num_heads]: max_j scale * sum_d |q_d| |k_jd|, what a relative error of q or k is multiplied by in a score.
  std::vector<double> score_bound;
};

// `inv_freq` [rope half] replaces p.rope, whose table is rounded to fp32. Rows without keys get zeros.
AttentionResult Attention(const kernels::AttentionParams& p, const std::vector<double>& inv_freq);

struct MassResult {
  std::vector<std::vector<double>> mass;  // [segment][its length]: sum of the weights that the rows' heads give the key
  double score_bound = 0;                 // as above, over all rows and heads
};

// Of the query rows `rows` alone.
MassResult AttentionMass(const kernels::AttentionParams& p, const std::vector<double>& inv_freq,
                         const std::vector<std::int64_t>& rows);

}  // namespace kvshare::reference
