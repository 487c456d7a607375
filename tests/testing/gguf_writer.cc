#include "tests/testing/gguf_writer.h"

#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

namespace kvshare::testing {
namespace {

constexpr std::size_t kAlignment = 32;
constexpr std::uint32_t kTypeU32 = 4, kTypeI32 = 5, kTypeF32 = 6, kTypeBool = 7, kTypeString = 8, kTypeArray = 9;

std::string Text(std::string_view text) { return LittleEndian64(text.size()) + std::string(text); }

std::string FloatBytes(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

// Rows of q or k from Hugging Face's order to llama.cpp's (convert_hf_to_gguf.py, LlamaModel.permute): in each head
// [2, d / 2] becomes [d / 2, 2].
std::vector<float> Permuted(const std::vector<float>& values, std::int64_t rows, std::int64_t head_dim) {
  const auto cols = static_cast<std::int64_t>(values.size()) / rows;
  std::vector<float> out;
  for (std::int64_t head = 0; head < rows / head_dim; ++head) {
    for (std::int64_t j = 0; j < head_dim / 2; ++j) {
      for (std::int64_t s = 0; s < 2; ++s) {
        const auto* row = values.data() + (head * head_dim + s * head_dim / 2 + j) * cols;
        out.insert(out.end(), row, row + cols);
      }
    }
  }
  return out;
}

std::string GgufName(std::string name) {
  const std::pair<const char*, const char*> renames[] = {
      {"model.embed_tokens", "token_embd"},
      {"model.norm", "output_norm"},
      {"lm_head", "output"},
      {"model.layers.", "blk."},
      {"input_layernorm", "attn_norm"},
      {"post_attention_layernorm", "ffn_norm"},
      {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"},
      {"self_attn.q_norm", "attn_q_norm"},
      {"self_attn.k_norm", "attn_k_norm"},
      {"mlp.gate_proj", "ffn_gate"},
      {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"},
  };
  for (const auto& [hf, gguf] : renames) {
    if (const auto at = name.find(hf); at != std::string::npos) name.replace(at, std::strlen(hf), gguf);
  }
  return name;
}

void AddTokenizer(GgufWriter* writer) {
  const auto json = nlohmann::json::parse(TinyTokenizerJson());
  std::vector<std::string> tokens(kTinyVocab), merges;
  std::vector<std::int32_t> types(kTinyVocab, 1);
  for (const auto& [token, id] : json["model"]["vocab"].items()) tokens[id.get<std::size_t>()] = token;
  for (const auto& added : json["added_tokens"]) {
    tokens[added["id"].get<std::size_t>()] = added["content"].get<std::string>();
    types[added["id"].get<std::size_t>()] = 3;
  }
  for (const auto& merge : json["model"]["merges"]) {
    merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  writer->AddString("tokenizer.ggml.model", "gpt2");
  writer->AddString("tokenizer.ggml.pre", "gpt-2");
  writer->AddStrings("tokenizer.ggml.tokens", tokens);
  writer->AddInts("tokenizer.ggml.token_type", types);
  writer->AddStrings("tokenizer.ggml.merges", merges);
  writer->AddU32("tokenizer.ggml.bos_token_id", kTinyEndOfText);
  writer->AddU32("tokenizer.ggml.eos_token_id", kTinyImEnd);
  writer->AddString("tokenizer.chat_template",
                    nlohmann::json::parse(TinyTokenizerConfigJson())["chat_template"].get<std::string>());
}

}  // namespace

std::string LittleEndian32(std::uint32_t value) { return {reinterpret_cast<const char*>(&value), sizeof value}; }
std::string LittleEndian64(std::uint64_t value) { return {reinterpret_cast<const char*>(&value), sizeof value}; }

void GgufWriter::AddRaw(std::string_view key, std::string_view bytes) {
  values_ += Text(key);
  values_ += bytes;
  ++num_values_;
}

void GgufWriter::AddString(std::string_view key, std::string_view value) {
  AddRaw(key, LittleEndian32(kTypeString) + Text(value));
}

void GgufWriter::AddU32(std::string_view key, std::uint32_t value) {
  AddRaw(key, LittleEndian32(kTypeU32) + LittleEndian32(value));
}

void GgufWriter::AddF32(std::string_view key, float value) {
  AddRaw(key, LittleEndian32(kTypeF32) + FloatBytes({value}));
}

void GgufWriter::AddBool(std::string_view key, bool value) {
  AddRaw(key, LittleEndian32(kTypeBool) + std::string(1, value ? '\1' : '\0'));
}

void GgufWriter::AddStrings(std::string_view key, const std::vector<std::string>& values) {
  std::string bytes = LittleEndian32(kTypeArray) + LittleEndian32(kTypeString) + LittleEndian64(values.size());
  for (const std::string& value : values) bytes += Text(value);
  AddRaw(key, bytes);
}

void GgufWriter::AddInts(std::string_view key, const std::vector<std::int32_t>& values) {
  std::string bytes = LittleEndian32(kTypeArray) + LittleEndian32(kTypeI32) + LittleEndian64(values.size());
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(std::int32_t));
  AddRaw(key, bytes);
}

void GgufWriter::AddTensor(std::string_view name, const std::vector<std::int64_t>& shape, std::uint32_t type,
                           std::string bytes) {
  std::string entry = Text(name) + LittleEndian32(static_cast<std::uint32_t>(shape.size()));
  for (auto dim = shape.rbegin(); dim != shape.rend(); ++dim) entry += LittleEndian64(static_cast<std::uint64_t>(*dim));
  tensors_.push_back({entry + LittleEndian32(type), std::move(bytes)});
}

std::string GgufWriter::Finish() const {
  std::string head = "GGUF" + LittleEndian32(version_) + LittleEndian64(tensors_.size()) + LittleEndian64(num_values_);
  head += values_;
  std::string data;
  for (const Tensor& tensor : tensors_) {
    head += tensor.entry + LittleEndian64(data.size());
    data += tensor.bytes;
    data.resize((data.size() + kAlignment - 1) / kAlignment * kAlignment);
  }
  head.resize((head.size() + kAlignment - 1) / kAlignment * kAlignment);
  return head + data;
}

std::string TinyGguf(const TinyModelOptions& o) {
  GgufWriter writer;
  const std::string prefix = o.family + ".";
  writer.AddString("general.architecture", o.family);
  writer.AddString("general.name", "tiny");
  writer.AddU32(prefix + "block_count", static_cast<std::uint32_t>(o.layers));
  writer.AddU32(prefix + "context_length", static_cast<std::uint32_t>(o.max_positions));
  writer.AddU32(prefix + "embedding_length", static_cast<std::uint32_t>(o.hidden));
  writer.AddU32(prefix + "feed_forward_length", static_cast<std::uint32_t>(o.intermediate));
  writer.AddU32(prefix + "attention.head_count", static_cast<std::uint32_t>(o.heads));
  writer.AddU32(prefix + "attention.head_count_kv", static_cast<std::uint32_t>(o.kv_heads));
  writer.AddU32(prefix + "attention.key_length", static_cast<std::uint32_t>(o.head_dim));
  writer.AddU32(prefix + "attention.value_length", static_cast<std::uint32_t>(o.head_dim));
  writer.AddF32(prefix + "attention.layer_norm_rms_epsilon", 1e-6f);
  writer.AddF32(prefix + "rope.freq_base", static_cast<float>(o.rope_theta));
  AddTokenizer(&writer);
  for (const auto& [name, tensor] : TinyWeights(o)) {
    const bool rotated = name.find("q_proj") != std::string::npos || name.find("k_proj") != std::string::npos;
    const bool permute = o.family == "llama" && rotated;
    writer.AddTensor(GgufName(name), tensor.shape, 0,
                     FloatBytes(permute ? Permuted(tensor.values, tensor.shape[0], o.head_dim) : tensor.values));
  }
  return writer.Finish();
}

}  // namespace kvshare::testing
