// The weights of a Llama-family model: which tensors its files must hold, and these tensors on a backend.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kvshare/status.h"
#include "libkvshare/core/hash.h"
#include "runtime/model_files.h"

namespace kvshare::runtime {

struct LayerWeights {
  std::span<const float> input_norm;                // [hidden]
  std::unique_ptr<kernels::LinearWeights> qkv;      // [q heads | k heads | v heads] x hidden
  std::span<const float> q_norm, k_norm;            // [head_dim] or empty
  std::unique_ptr<kernels::LinearWeights> output;   // hidden x q heads
  std::span<const float> post_attention_norm;       // [hidden]
  std::unique_ptr<kernels::LinearWeights> gate_up;  // gated, 2 x intermediate x hidden
  std::unique_ptr<kernels::LinearWeights> down;     // hidden x intermediate
};

// Must not outlive the backend.
struct ModelWeights {
  kernels::MatrixView embedding;  // [vocab, hidden], in the compute dtype
  std::vector<LayerWeights> layers;
  std::span<const float> final_norm;                // [hidden]
  std::unique_ptr<kernels::LinearWeights> lm_head;  // vocab x hidden
  std::unique_ptr<kernels::Buffer> embedding_buffer, norms_buffer;

  // Read by every forward step: all linear layers, as stored.
  std::size_t linear_bytes() const;
};

// The linear layers, "model.layers.0.self_attn.q_proj" and so on, with [out, in] of each; the output layer among them
// where it is not the embedding.
std::map<std::string, std::vector<std::int64_t>> LinearShapes(const ModelConfig& config);

// InvalidArgument naming the first tensor that is missing, of another shape than `config` asks for, or not part of such
// a model: a tensor that would silently not be used would give wrong answers.
Status CheckTensors(const ModelConfig& config, const TensorMap& tensors);

// Names the weights: SHA-256 over name, type, shape and bytes of every tensor that the model uses. Cost: one pass over
// the files, on `threads` threads.
Digest WeightsDigest(const ModelConfig& config, const TensorMap& tensors, int threads);

// Decodes and packs all weights, an adapter merged in. Requires CheckTensors to have passed. Cost beyond the result:
// the largest group of tensors in fp32. Returns the backend's failure, if it has any.
Result<ModelWeights> LoadWeights(const ModelFiles& files, kernels::Backend* backend, int threads);

// The same from `config` alone: normal with deviation 0.02, norms 1, biases 0. The same seed gives the same weights.
Result<ModelWeights> MakeRandomWeights(const ModelConfig& config, kernels::Backend* backend, int threads,
                                       std::uint64_t seed);

}  // namespace kvshare::runtime
