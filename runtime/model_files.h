// ModelFiles: what a model's files say, before any of it is computed with. Two openers, one result.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvshare/status.h"
#include "runtime/lora.h"
#include "runtime/mapped_file.h"
#include "runtime/model_config.h"
#include "runtime/safetensors.h"
#include "runtime/tokenizer.h"

namespace kvshare::runtime {

struct ModelFiles {
  ModelConfig config;
  std::vector<std::unique_ptr<MappedFile>> mappings;  // what the tensors' views point into
  TensorMap tensors;                                  // by their Hugging Face names
  Status unclaimed;                                   // not OK: bytes of a weights file that are no tensor's
  // llama.cpp stores the rows of Llama's q and k so that RoPE's pairs are neighbours; transformers pairs a row with the
  // one half a head further down. True: rows have to be put back (weights.cc).
  bool interleaved_rope = false;
  LoraAdapter lora;  // what is added to the tensors; no updates: nothing
  std::optional<TokenizerSpec> tokenizer;
  std::string chat_template;  // empty: none
  std::string bos_text, eos_text;
};

// A directory with config.json and, unless `config_only`, the weights as model.safetensors or the shards that
// model.safetensors.index.json lists; generation_config.json, tokenizer.json, tokenizer_config.json and
// chat_template.jinja where present.
Result<ModelFiles> OpenHfDirectory(const std::string& path, bool config_only);

// One .gguf file of architecture llama, qwen2 or qwen3.
Result<ModelFiles> OpenGguf(const std::string& path);

// The same from bytes already in memory (`mappings` stays empty): what OpenGguf and its fuzz target share.
Result<ModelFiles> ParseGgufModel(std::span<const std::byte> bytes);

}  // namespace kvshare::runtime
