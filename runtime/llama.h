// The forward pass of the Llama family (Llama, Mistral, Qwen2, Qwen3): weights, buffers and the order of the ops.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kvshare/status.h"
#include "libkvshare/core/hash.h"
#include "runtime/chat_template.h"
#include "runtime/model.h"
#include "runtime/model_config.h"
#include "runtime/tokenizer.h"
#include "runtime/weights.h"

namespace kvshare::runtime {

// Everything a model is made of. The backend comes first, so that it goes last.
struct ModelParts {
  std::unique_ptr<kernels::Backend> backend;
  ModelConfig config;
  ModelWeights weights;
  std::unique_ptr<Tokenizer> tokenizer;         // or null
  std::unique_ptr<ChatTemplate> chat_template;  // or null
  Digest space;
};

// Allocates the activations for `max_batch_rows` rows and the RoPE table for all positions; Forward() allocates
// nothing. Returns the backend's failure, if it has any.
Result<std::unique_ptr<Model>> NewLlamaModel(ModelParts parts, std::int64_t max_batch_rows, int threads);

}  // namespace kvshare::runtime
