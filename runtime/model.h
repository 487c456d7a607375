// Model: a Llama-family model loaded onto a Backend, with its tokenizer and chat template.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "kernels/backend.h"
#include "kernels/paged_kv.h"
#include "kvshare/status.h"
#include "libkvshare/core/hash.h"
#include "runtime/chat_template.h"
#include "runtime/forward_batch.h"
#include "runtime/model_config.h"
#include "runtime/tokenizer.h"

namespace kvshare::runtime {

// Where a model computes. kAuto: on a GPU where there is one that can be used, else on the CPU.
enum class Device { kCpu, kCuda, kAuto };
Result<Device> ParseDevice(std::string_view name);  // cpu, cuda, auto

struct LoadOptions {
  kernels::DType dtype = kernels::DType::kBf16;  // float32 is for the CPU alone, float16 for a GPU
  int threads = 0;                               // 0: one per core this process may use
  bool random_weights = false;                   // from config.json alone: for speed, not for text
  // Rows of one forward step at most; sizes the activations.
  std::int64_t max_batch_rows = 1024;
  // A LoRA adapter in PEFT's format (a directory), merged into the weights before they are converted; empty: none.
  std::string lora = "";
  Device device = Device::kCpu;
};

// Forward() belongs to one thread; everything const is safe from any thread.
class Model {
 public:
  virtual ~Model() = default;

  virtual const ModelConfig& config() const = 0;
  // Null with random weights.
  virtual const Tokenizer* tokenizer() const = 0;
  // Null when the model has none.
  virtual const ChatTemplate* chat_template() const = 0;
  virtual const kernels::Backend& backend() const = 0;
  virtual kernels::Backend& backend() = 0;
  virtual kernels::KvLayout kv_layout() const = 0;
  virtual std::int64_t max_batch_rows() const = 0;
  virtual std::size_t weight_bytes() const = 0;  // read once per forward step, as stored

  // Digest of everything that makes KV comparable: weights, tokenizer, RoPE, layout, dtype, numerics id.
  virtual const Digest& space() const = 0;

  // Computes the batch: writes K and V of every row into `pages` and, for logit row r, vocab_size floats at
  // logits + r * vocab_size. Requires 1 <= T <= max_batch_rows, ids within the vocabulary, and slots and segments
  // within `pages`. `logits` may be null when batch.logit_rows is empty.
  // Returns the backend's failure, if it has any.
  virtual Status Forward(const ForwardBatch& batch, const kernels::KvPages& pages, float* logits) = 0;
};

// `path` is a Hugging Face directory or one .gguf file. Errors name the file and what is wrong with it.
Result<std::unique_ptr<Model>> LoadModel(const std::string& path, const LoadOptions& options);

// The same on a backend that is there; null: as LoadModel.
Result<std::unique_ptr<Model>> LoadModelOn(std::unique_ptr<kernels::Backend> backend, const std::string& path,
                                           const LoadOptions& options);

}  // namespace kvshare::runtime
