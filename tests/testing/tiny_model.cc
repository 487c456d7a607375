#include "tests/testing/tiny_model.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"
#include "tests/testing/ids.h"

namespace kvshare::testing {
namespace {

using nlohmann::json;

// SplitMix64 (Steele, Lea, Flood 2014): the same numbers on every platform, unlike std::normal_distribution.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t Next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Uniform in [-limit, limit), rounded towards zero to 8 significant bits: exact in bfloat16.
  float Uniform(double limit) {
    const double unit = static_cast<double>(Next() >> 11) * 0x1p-53;
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>((2 * unit - 1) * limit));
    return std::bit_cast<float>(bits & 0xffff0000u);
  }

 private:
  std::uint64_t state_;
};

// GPT-2's byte alphabet (bytes_to_unicode): printable bytes stand for themselves, the others for U+0100 onwards.
std::vector<std::string> ByteAlphabet() {
  std::vector<std::string> alphabet(256);
  int next = 256;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const int code = printable ? b : next++;
    if (code < 0x80) {
      alphabet[b] = std::string(1, static_cast<char>(code));
    } else {
      alphabet[b] = {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3f))};
    }
  }
  return alphabet;
}

constexpr std::pair<const char*, const char*> kMerges[] = {
    {" ", "t"}, {"h", "e"}, {" t", "he"}, {" ", "a"}, {"i", "n"},  {"e", "r"}, {"o", "n"},   {"r", "e"},
    {" ", "s"}, {"a", "t"}, {"o", "r"},   {"e", "n"}, {"e", "s"},  {"i", "s"}, {" ", "c"},   {"o", "u"},
    {"i", "t"}, {"a", "n"}, {" a", "n"},  {"l", "l"}, {"in", "g"}, {" ", "w"}, {" an", "d"}, {"s", "t"},
    {" ", "b"}, {" ", "o"}, {"e", "d"},   {" ", "m"}, {" ", "in"},
};
static_assert(256 + std::size(kMerges) == kTinyEndOfText);

json AddedTokens() {
  json added = json::array();
  const std::pair<int, const char*> tokens[] = {
      {kTinyEndOfText, "<|endoftext|>"}, {kTinyImStart, "<|im_start|>"}, {kTinyImEnd, "<|im_end|>"}};
  for (const auto& [id, text] : tokens) {
    added.push_back({{"id", id},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  return added;
}

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  if (const auto at = text.find(from); at != std::string::npos) text.replace(at, from.size(), to);
  return text;
}

}  // namespace

std::vector<TokenId> TinyRole(std::mt19937& rng, int tokens) {
  return Join({{kTinyImStart, 's'}, RandomIds(rng, tokens - 3), {kTinyImEnd}});
}

std::map<std::string, TinyTensor> TinyWeights(const TinyModelOptions& o) {
  Random random(o.seed);
  std::map<std::string, TinyTensor> tensors;
  // Uniform within +-sqrt(3) * deviation. Layers keep the residual stream at unit scale; the embedding's scale makes
  // logits differ by several units, so that greedy choices do not hang on rounding.
  const auto matrix = [&](const std::string& name, std::int64_t rows, std::int64_t cols, double deviation) {
    TinyTensor t{{rows, cols}, std::vector<float>(static_cast<std::size_t>(rows * cols))};
    for (float& v : t.values) v = random.Uniform(std::sqrt(3.0) * deviation);
    tensors[name] = std::move(t);
  };
  const auto vector = [&](const std::string& name, std::int64_t size, float centre, double spread) {
    TinyTensor t{{size}, std::vector<float>(static_cast<std::size_t>(size))};
    for (float& v : t.values) {
      v = std::bit_cast<float>(std::bit_cast<std::uint32_t>(centre + random.Uniform(spread)) & 0xffff0000u);
    }
    tensors[name] = std::move(t);
  };
  const std::int64_t q = std::int64_t{o.heads} * o.head_dim, kv = std::int64_t{o.kv_heads} * o.head_dim;
  const double in = 1.0 / std::sqrt(o.hidden);
  matrix("model.embed_tokens.weight", kTinyVocab + o.padding, o.hidden, 0.4);
  for (int l = 0; l < o.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    vector(p + "input_layernorm.weight", o.hidden, 1.0f, 0.3);
    matrix(p + "self_attn.q_proj.weight", q, o.hidden, 1.5 * in);
    matrix(p + "self_attn.k_proj.weight", kv, o.hidden, 1.5 * in);
    matrix(p + "self_attn.v_proj.weight", kv, o.hidden, in);
    matrix(p + "self_attn.o_proj.weight", o.hidden, q, 1.0 / std::sqrt(q));
    if (o.attention_bias || o.family == "qwen2") {
      vector(p + "self_attn.q_proj.bias", q, 0.0f, 0.5);
      vector(p + "self_attn.k_proj.bias", kv, 0.0f, 0.5);
      vector(p + "self_attn.v_proj.bias", kv, 0.0f, 0.5);
      if (o.family != "qwen2") vector(p + "self_attn.o_proj.bias", o.hidden, 0.0f, 0.1);
    }
    if (o.family == "qwen3") {
      vector(p + "self_attn.q_norm.weight", o.head_dim, 1.0f, 0.3);
      vector(p + "self_attn.k_norm.weight", o.head_dim, 1.0f, 0.3);
    }
    vector(p + "post_attention_layernorm.weight", o.hidden, 1.0f, 0.3);
    matrix(p + "mlp.gate_proj.weight", o.intermediate, o.hidden, in);
    matrix(p + "mlp.up_proj.weight", o.intermediate, o.hidden, in);
    matrix(p + "mlp.down_proj.weight", o.hidden, o.intermediate, 1.0 / std::sqrt(o.intermediate));
  }
  vector("model.norm.weight", o.hidden, 1.0f, 0.3);
  if (!o.tied) matrix("lm_head.weight", kTinyVocab + o.padding, o.hidden, 3 * in);
  return tensors;
}

std::string TinyConfigJson(const TinyModelOptions& o) {
  std::string architecture = o.family;
  architecture[0] = static_cast<char>(architecture[0] - 'a' + 'A');
  json config = {{"architectures", {architecture + "ForCausalLM"}},
                 {"model_type", o.family},
                 {"hidden_act", "silu"},
                 {"bos_token_id", kTinyEndOfText},
                 {"eos_token_id", kTinyImEnd},
                 {"torch_dtype", "bfloat16"},
                 {"vocab_size", kTinyVocab + o.padding},
                 {"hidden_size", o.hidden},
                 {"intermediate_size", o.intermediate},
                 {"num_hidden_layers", o.layers},
                 {"num_attention_heads", o.heads},
                 {"num_key_value_heads", o.kv_heads},
                 {"head_dim", o.head_dim},
                 {"rms_norm_eps", 1e-6},
                 {"rope_theta", o.rope_theta},
                 {"rope_scaling", nullptr},
                 {"max_position_embeddings", o.max_positions},
                 {"tie_word_embeddings", o.tied}};
  if (o.family != "qwen2") config["attention_bias"] = o.attention_bias;
  if (o.sliding_window > 0) config["sliding_window"] = o.sliding_window;
  return config.dump(1);
}

std::string TinyTokenizerJson() {
  const std::vector<std::string> alphabet = ByteAlphabet();
  const std::string space = alphabet[' '];
  json vocab = json::object();
  for (int b = 0; b < 256; ++b) vocab[alphabet[b]] = b;
  json merges = json::array();
  int next = 256;
  for (const auto& [left, right] : kMerges) {
    const std::string l = Replaced(left, " ", space), r = Replaced(right, " ", space);
    KVS_CHECK(vocab.contains(l) && vocab.contains(r));
    vocab[l + r] = next++;
    merges.push_back(json::array({l, r}));
  }
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  const json tokenizer = {{"version", "1.0"},
                          {"truncation", nullptr},
                          {"padding", nullptr},
                          {"added_tokens", AddedTokens()},
                          {"normalizer", nullptr},
                          {"pre_tokenizer", byte_level},
                          {"post_processor", nullptr},
                          {"decoder", byte_level},
                          {"model",
                           {{"type", "BPE"},
                            {"dropout", nullptr},
                            {"unk_token", nullptr},
                            {"continuing_subword_prefix", nullptr},
                            {"end_of_word_suffix", nullptr},
                            {"fuse_unk", false},
                            {"byte_fallback", false},
                            {"ignore_merges", false},
                            {"vocab", vocab},
                            {"merges", merges}}}};
  return tokenizer.dump();
}

std::string TinyTokenizerConfigJson() {
  const json config = {
      {"tokenizer_class", "PreTrainedTokenizerFast"},
      {"bos_token", "<|endoftext|>"},
      {"eos_token", "<|im_end|>"},
      {"add_bos_token", false},
      {"chat_template",
       "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
       "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"}};
  return config.dump(1);
}

std::string SafetensorsBytes(const std::map<std::string, TinyTensor>& tensors, bool bf16) {
  json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t begin = data.size();
    for (float v : tensor.values) {
      const auto bits = std::bit_cast<std::uint32_t>(v);
      char bytes[4];
      std::memcpy(bytes, &bits, 4);
      if (bf16) {
        data.append(bytes + 2, 2);
      } else {
        data.append(bytes, 4);
      }
    }
    header[name] = {{"dtype", bf16 ? "BF16" : "F32"}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  while (text.size() % 8 != 0) text += ' ';
  const std::uint64_t size = text.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &size, 8);
  return bytes + text + data;
}

Status WriteFile(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  if (!out) return Unavailable(path.string() + ": cannot be written");
  return OkStatus();
}

Status WriteTinyModel(const std::filesystem::path& dir, const TinyModelOptions& options) {
  KVS_RETURN_IF_ERROR(WriteFile(dir / "config.json", TinyConfigJson(options)));
  KVS_RETURN_IF_ERROR(WriteFile(dir / "model.safetensors", SafetensorsBytes(TinyWeights(options))));
  KVS_RETURN_IF_ERROR(WriteFile(dir / "tokenizer.json", TinyTokenizerJson()));
  return WriteFile(dir / "tokenizer_config.json", TinyTokenizerConfigJson());
}

}  // namespace kvshare::testing
