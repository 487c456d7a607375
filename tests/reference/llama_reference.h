// The double-precision oracle of the Llama family's forward pass, written from the equations: dense causal attention
// over the whole prompt, no cache, no batches, no 16-bit anything.
//
//   x = E[ids];  for each layer:  x += Wo attention(rope(qknorm(Wq n1(x) + bq)), rope(qknorm(Wk n1(x) + bk)), Wv n1(x)
//   + bv)
//                                 x += Wdown (silu(Wgate n2(x)) * (Wup n2(x)))
//   logits = H norm(x)
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "kvshare/types.h"
#include "runtime/model_config.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::reference {

// One row for each token: k after the norm of QK-norm models and un-rotated, v.
struct LayerKv {
  std::vector<std::vector<double>> k, v;
};
// Shown what a layer has computed, before its attention looks at any of it. May put other rows in their place.
using LayerVisitor = std::function<void(int layer, LayerKv* rows)>;

// Logits [ids, vocab]. `weights` by their Hugging Face names; `inv_freq` [head_dim / 2] are RoPE's frequencies.
std::vector<double> LlamaLogits(const runtime::ModelConfig& config,
                                const std::map<std::string, testing::TinyTensor>& weights,
                                std::span<const double> inv_freq, double rope_factor, std::span<const TokenId> ids,
                                const LayerVisitor& visitor = nullptr);

// Row by row, what the first layer computes before RoPE: after the norms of QK-norm models, un-rotated.
struct Qkv {
  std::vector<double> q;     // [ids, num_heads * head_dim]
  std::vector<double> k, v;  // [ids, num_kv_heads * head_dim]
};
Qkv FirstLayerQkv(const runtime::ModelConfig& config, const std::map<std::string, testing::TinyTensor>& weights,
                  std::span<const TokenId> ids);

}  // namespace kvshare::reference
