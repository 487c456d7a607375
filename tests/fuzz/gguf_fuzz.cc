// A GGUF file of any bytes: container, metadata, tokenizer and tensors, as LoadModel would read them.
#include <algorithm>
#include <cstdlib>

#include "runtime/model_files.h"
#include "runtime/weights.h"
#include "tests/fuzz/seeded.h"
#include "tests/testing/gguf_writer.h"

namespace kvshare {
namespace {

std::string SmallModel(std::uint32_t type, std::size_t row_bytes, const char* scaling) {
  testing::GgufWriter w;
  w.AddString("general.architecture", "llama");
  w.AddU32("llama.block_count", 1);
  w.AddU32("llama.context_length", 64);
  w.AddU32("llama.embedding_length", 32);
  w.AddU32("llama.feed_forward_length", 32);
  w.AddU32("llama.attention.head_count", 2);
  w.AddU32("llama.attention.head_count_kv", 1);
  w.AddF32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  w.AddF32("llama.rope.freq_base", 1e4f);
  w.AddString("llama.rope.scaling.type", scaling);
  w.AddF32("llama.rope.scaling.factor", 2.0f);
  w.AddString("tokenizer.ggml.model", "gpt2");
  w.AddString("tokenizer.ggml.pre", "smollm");
  w.AddStrings("tokenizer.ggml.tokens", {"a", "b", "ab", "<|x|>"});
  w.AddInts("tokenizer.ggml.token_type", {1, 1, 1, 3});
  w.AddStrings("tokenizer.ggml.merges", {"a b"});
  w.AddU32("tokenizer.ggml.bos_token_id", 3);
  w.AddString("tokenizer.chat_template", "{{ messages }}");
  w.AddBool("tokenizer.ggml.add_bos_token", false);
  w.AddTensor("token_embd.weight", {4, 32}, type, std::string(4 * row_bytes, '\x21'));
  w.AddTensor("output_norm.weight", {32}, 0, std::string(128, '\x21'));
  w.AddTensor("rope_freqs.weight", {8}, 0, std::string(32, '\x21'));
  return w.Finish();
}

std::vector<std::string> Seeds() {
  return {SmallModel(0, 128, "none"), SmallModel(1, 64, "linear"), SmallModel(2, 18, "yarn"),
          SmallModel(3, 20, "none"),  SmallModel(8, 34, "none"),   SmallModel(30, 64, "none")};
}

}  // namespace
}  // namespace kvshare

KVS_FUZZ_SEEDS(kvshare::Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kvshare;
  // A copy of its own length, so that reading past the end is seen.
  const std::vector<std::uint8_t> bytes(data, data + size);
  const auto files = runtime::ParseGgufModel(std::as_bytes(std::span(bytes)));
  if (!files.ok()) return 0;
  if (!files->config.Validate().ok()) std::abort();
  if (runtime::CheckTensors(files->config, files->tensors).ok()) {
    runtime::WeightsDigest(files->config, files->tensors, 1);
  }
  std::vector<float> row;
  for (const auto& [name, tensor] : files->tensors) {
    if (tensor.shape.size() > 2 || tensor.rows() == 0) continue;
    row.resize(static_cast<std::size_t>(tensor.cols()));
    runtime::DecodeRows(tensor, 0, 1, row.data());
    runtime::DecodeRows(tensor, tensor.rows() - 1, tensor.rows(), row.data());
  }
  if (files->tokenizer.has_value()) {
    const auto tokenizer = runtime::NewTokenizer(*files->tokenizer);
    if (tokenizer.ok()) (*tokenizer)->Encode("ab <|x|> \xf0\x9f\x98\x80");
  }
  return 0;
}
