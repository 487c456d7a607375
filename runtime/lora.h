// LoRA adapters (Hu et al., arXiv 2106.09685) as PEFT saves them: adapter_config.json and adapter_model.safetensors.
// They are merged into the weights while these are decoded, W += s B A, so that nothing after the loader knows of them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "kvshare/status.h"
#include "libkvshare/core/hash.h"
#include "runtime/dequant.h"
#include "runtime/mapped_file.h"
#include "runtime/model_config.h"

namespace kvshare::runtime {

// What is added to one matrix W [rows, cols]: scale * b a.
struct LoraUpdate {
  TensorView a;  // [r, cols]
  TensorView b;  // [rows, r]
  float scale = 0;
};

struct LoraAdapter {
  std::unique_ptr<MappedFile> mapping;        // what the updates' views point into; null: no adapter
  std::map<std::string, LoraUpdate> updates;  // by the Hugging Face name of the matrix, "model.layers.0. ... .weight"
  Digest digest;                              // over names, shapes, scales and bytes of all updates
};

// Opens the adapter in directory `path` for a model of shape `config`.
// Returns NotFound for missing files, Unimplemented for a variant that is more than W + s B A (DoRA, trained biases,
// modules saved whole, ...), InvalidArgument for what does not fit the model; the message names file, cause and fix.
Result<LoraAdapter> OpenLora(const std::string& path, const ModelConfig& config);

// weights [rows, cols] += scale * b a, in fp32, on `threads` threads.
void MergeLora(const LoraUpdate& update, int threads, float* weights);

}  // namespace kvshare::runtime
