#include "runtime/weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <string_view>
#include <utility>

#include "kernels/round_weights.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/parallel.h"

namespace kvshare::runtime {
namespace {

using kernels::Backend;
using kernels::HostMatrix;
using kernels::LinearWeights;

// What becomes of a tensor's rows on the way in.
enum class Rows { kAsStored, kRopePairs };

struct Need {
  std::string name;
  std::vector<std::int64_t> shape;
  Rows rows = Rows::kAsStored;
};

std::string LayerName(int layer, const char* rest) { return "model.layers." + std::to_string(layer) + "." + rest; }

constexpr char kEmbedding[] = "model.embed_tokens.weight";
constexpr char kFinalNorm[] = "model.norm.weight";
constexpr char kLmHead[] = "lm_head.weight";

// Every tensor that the model reads.
std::vector<Need> Needs(const ModelConfig& c) {
  const std::int64_t q = std::int64_t{c.num_heads} * c.head_dim, kv = std::int64_t{c.num_kv_heads} * c.head_dim;
  const std::int64_t hidden = c.hidden_size, inner = c.intermediate_size;
  std::vector<Need> needs = {{kEmbedding, {c.vocab_size, hidden}}, {kFinalNorm, {hidden}}};
  if (!c.tied_embeddings) needs.push_back({kLmHead, {c.vocab_size, hidden}});
  for (int l = 0; l < c.num_layers; ++l) {
    const auto need = [&](const char* name, std::vector<std::int64_t> shape, Rows rows = Rows::kAsStored) {
      needs.push_back({LayerName(l, name), std::move(shape), rows});
    };
    need("input_layernorm.weight", {hidden});
    need("self_attn.q_proj.weight", {q, hidden}, Rows::kRopePairs);
    need("self_attn.k_proj.weight", {kv, hidden}, Rows::kRopePairs);
    need("self_attn.v_proj.weight", {kv, hidden});
    if (c.qkv_bias) {
      need("self_attn.q_proj.bias", {q}, Rows::kRopePairs);
      need("self_attn.k_proj.bias", {kv}, Rows::kRopePairs);
      need("self_attn.v_proj.bias", {kv});
    }
    if (c.qk_norm) {
      need("self_attn.q_norm.weight", {c.head_dim});
      need("self_attn.k_norm.weight", {c.head_dim});
    }
    need("self_attn.o_proj.weight", {hidden, q});
    if (c.output_bias) need("self_attn.o_proj.bias", {hidden});
    need("post_attention_layernorm.weight", {hidden});
    need("mlp.gate_proj.weight", {inner, hidden});
    need("mlp.up_proj.weight", {inner, hidden});
    need("mlp.down_proj.weight", {hidden, inner});
    if (c.mlp_bias) {
      need("mlp.gate_proj.bias", {inner});
      need("mlp.up_proj.bias", {inner});
      need("mlp.down_proj.bias", {hidden});
    }
  }
  return needs;
}

// Fills `out` with the named tensor's values, row-major, rows in Hugging Face's order.
using Fill = std::function<void(const Need& need, float* out)>;

// GGUF's row h d + 2 j + s is Hugging Face's row h d + s d/2 + j: llama.cpp's conversion reshapes a head's rows to
// [2, d/2] and swaps the two (convert_hf_to_gguf.py, LlamaModel.permute).
std::int64_t StoredRow(std::int64_t row, int head_dim) {
  const std::int64_t head = row / head_dim * head_dim, in_head = row % head_dim, half = head_dim / 2;
  return head + 2 * (in_head % half) + in_head / half;
}

Fill FillFromFiles(const ModelFiles& files, int threads) {
  return [&files, threads](const Need& need, float* out) {
    const TensorView& tensor = files.tensors.at(need.name);
    const bool permute = files.interleaved_rope && need.rows == Rows::kRopePairs;
    const int head_dim = files.config.head_dim;
    if (tensor.shape.size() == 1) {
      std::vector<float> values(static_cast<std::size_t>(tensor.cols()));
      DecodeRows(tensor, 0, 1, values.data());
      for (std::int64_t i = 0; i < tensor.cols(); ++i) {
        out[i] = values[static_cast<std::size_t>(permute ? StoredRow(i, head_dim) : i)];
      }
      return;
    }
    ParallelFor(tensor.rows(), 64, threads, [&](std::int64_t begin, std::int64_t end) {
      if (!permute) return DecodeRows(tensor, begin, end, out + begin * tensor.cols());
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int64_t stored = StoredRow(r, head_dim);
        DecodeRows(tensor, stored, stored + 1, out + r * tensor.cols());
      }
    });
    // Only now that the rows are in Hugging Face's order, in which the adapter was trained.
    const auto update = files.lora.updates.find(need.name);
    if (update != files.lora.updates.end()) MergeLora(update->second, threads, out);
  };
}

std::uint64_t SplitMix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// About normal with deviation 0.02: the sum of four 16-bit uniforms (Irwin-Hall), one hash per value.
float RandomNormal(std::uint64_t key) {
  const std::uint64_t bits = SplitMix64(key);
  const std::int64_t sum =
      static_cast<std::int64_t>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
  constexpr float kScale = 0.02f / (65536.0f * 0.57735027f);  // four uniforms of variance 1/12 each
  return static_cast<float>(sum - 131070) * kScale;
}

Fill FillRandom(std::uint64_t seed, int threads) {
  return [seed, threads](const Need& need, float* out) {
    std::int64_t values = 1;
    for (const std::int64_t dim : need.shape) values *= dim;
    if (need.shape.size() == 1) {
      const bool norm = need.name.find("norm.") != std::string::npos;
      std::fill(out, out + values, norm ? 1.0f : 0.0f);
      return;
    }
    std::uint64_t key = seed;
    for (const char c : need.name) key = SplitMix64(key ^ static_cast<std::uint8_t>(c));
    ParallelFor(values, 1 << 16, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) out[i] = RandomNormal(key + static_cast<std::uint64_t>(i));
    });
  };
}

// Builds ModelWeights out of what a Fill gives.
class Builder {
 public:
  Builder(const ModelConfig& config, const Fill& fill, Backend* backend, int threads)
      : config_(config), fill_(fill), backend_(*backend), threads_(threads) {
    for (Need& need : Needs(config)) {
      std::string name = need.name;
      needs_.emplace(std::move(name), std::move(need));
    }
  }

  Result<ModelWeights> Build() {
    KVS_RETURN_IF_ERROR(MakeNorms());
    KVS_RETURN_IF_ERROR(MakeEmbedding());
    for (int l = 0; l < config_.num_layers; ++l) KVS_RETURN_IF_ERROR(MakeLayer(l, &out_.layers[Index(l)]));
    return std::move(out_);
  }

 private:
  static std::size_t Index(std::int64_t i) { return static_cast<std::size_t>(i); }
  const Need& Named(const std::string& name) const { return needs_.at(name); }
  bool Has(const std::string& name) const { return needs_.count(name) > 0; }

  // All norm vectors share one buffer.
  Status MakeNorms() {
    const std::int64_t heads = config_.qk_norm ? 2 * std::int64_t{config_.head_dim} : 0;
    const std::int64_t values = config_.num_layers * (2 * config_.hidden_size + heads) + config_.hidden_size;
    KVS_ASSIGN_OR_RETURN(out_.norms_buffer, backend_.Allocate(Index(values) * sizeof(float)));
    const auto* norms = reinterpret_cast<const float*>(out_.norms_buffer->data());
    std::vector<float> filled(Index(values));
    std::size_t at = 0;
    const auto take = [&](const std::string& name, std::span<const float>* out) {
      if (!Has(name)) return;
      const Need& need = Named(name);
      fill_(need, filled.data() + at);
      *out = {norms + at, Index(need.shape[0])};
      at += Index(need.shape[0]);
    };
    out_.layers.resize(Index(config_.num_layers));
    for (int l = 0; l < config_.num_layers; ++l) {
      LayerWeights& layer = out_.layers[Index(l)];
      take(LayerName(l, "input_layernorm.weight"), &layer.input_norm);
      take(LayerName(l, "self_attn.q_norm.weight"), &layer.q_norm);
      take(LayerName(l, "self_attn.k_norm.weight"), &layer.k_norm);
      take(LayerName(l, "post_attention_layernorm.weight"), &layer.post_attention_norm);
    }
    take(kFinalNorm, &out_.final_norm);
    return backend_.Upload(out_.norms_buffer->data(), filled.data(), filled.size() * sizeof(float));
  }

  // The table in the compute dtype and, where it is tied to it, the output layer from the same decoded values.
  Status MakeEmbedding() {
    const kernels::DType dtype = backend_.capabilities().compute;
    const std::int64_t vocab = config_.vocab_size, hidden = config_.hidden_size;
    KVS_ASSIGN_OR_RETURN(out_.embedding_buffer, backend_.Allocate(Index(vocab * hidden) * DTypeBytes(dtype)));
    std::byte* table = out_.embedding_buffer->data();
    out_.embedding = {table, dtype, vocab, hidden, hidden};
    const float* values = Decode({kEmbedding});
    if (dtype == kernels::DType::kF32) {
      KVS_RETURN_IF_ERROR(backend_.Upload(table, values, Index(vocab * hidden) * sizeof(float)));
    } else {
      KVS_RETURN_IF_ERROR(UploadRounded(dtype, values, vocab, hidden, table));
    }
    if (!config_.tied_embeddings) return MakeLinear({kLmHead}, {}, false, &out_.lm_head);
    const HostMatrix part{values, vocab, hidden};
    KVS_ASSIGN_OR_RETURN(out_.lm_head, backend_.MakeLinear({.parts = {&part, 1}, .bias = {}, .gated = false}));
    return OkStatus();
  }

  // Some rows at a time, which bounds what is held beside the table.
  Status UploadRounded(kernels::DType dtype, const float* values, std::int64_t rows, std::int64_t cols,
                       std::byte* table) {
    constexpr std::int64_t kRows = 4096;
    std::vector<std::uint16_t> rounded(Index(std::min(rows, kRows) * cols));
    for (std::int64_t first = 0; first < rows; first += kRows) {
      const std::int64_t count = std::min(kRows, rows - first);
      std::atomic<const float*> beyond = nullptr;
      ParallelFor(count, 256, threads_, [&](std::int64_t begin, std::int64_t end) {
        const std::span from(values + (first + begin) * cols, Index((end - begin) * cols));
        const float* const found = kernels::RoundWeights(dtype, from, rounded.data() + begin * cols);
        if (found != nullptr) beyond = found;
      });
      if (beyond != nullptr) return kernels::BeyondRange(dtype, *beyond);
      KVS_RETURN_IF_ERROR(backend_.Upload(table + Index(first * cols) * 2, rounded.data(), Index(count * cols) * 2));
    }
    return OkStatus();
  }

  Status MakeLayer(int l, LayerWeights* out) {
    const auto name = [l](const char* rest) { return LayerName(l, rest); };
    KVS_RETURN_IF_ERROR(
        MakeLinear({name("self_attn.q_proj.weight"), name("self_attn.k_proj.weight"), name("self_attn.v_proj.weight")},
                   {name("self_attn.q_proj.bias"), name("self_attn.k_proj.bias"), name("self_attn.v_proj.bias")}, false,
                   &out->qkv));
    KVS_RETURN_IF_ERROR(
        MakeLinear({name("self_attn.o_proj.weight")}, {name("self_attn.o_proj.bias")}, false, &out->output));
    KVS_RETURN_IF_ERROR(MakeLinear({name("mlp.gate_proj.weight"), name("mlp.up_proj.weight")},
                                   {name("mlp.gate_proj.bias"), name("mlp.up_proj.bias")}, true, &out->gate_up));
    return MakeLinear({name("mlp.down_proj.weight")}, {name("mlp.down_proj.bias")}, false, &out->down);
  }

  // The named tensors one after the other, in fp32; valid until the next call.
  const float* Decode(const std::vector<std::string>& names) {
    std::size_t values = 0;
    for (const std::string& name : names) values += Values(Named(name));
    if (scratch_.size() < values) scratch_ = std::vector<float>(values);
    float* next = scratch_.data();
    for (const std::string& name : names) {
      fill_(Named(name), next);
      next += Values(Named(name));
    }
    return scratch_.data();
  }

  static std::size_t Values(const Need& need) {
    std::size_t values = 1;
    for (const std::int64_t dim : need.shape) values *= Index(dim);
    return values;
  }

  Status MakeLinear(const std::vector<std::string>& names, const std::vector<std::string>& biases, bool gated,
                    std::unique_ptr<LinearWeights>* out) {
    const float* next = Decode(names);
    std::vector<HostMatrix> parts;
    for (const std::string& name : names) {
      const Need& need = Named(name);
      parts.push_back({next, need.shape[0], need.shape[1]});
      next += Values(need);
    }
    std::vector<float> bias;
    for (const std::string& name : biases) {
      if (!Has(name)) continue;
      bias.resize(bias.size() + Values(Named(name)));
      fill_(Named(name), bias.data() + bias.size() - Values(Named(name)));
    }
    KVS_ASSIGN_OR_RETURN(*out, backend_.MakeLinear({.parts = parts, .bias = bias, .gated = gated}));
    return OkStatus();
  }

  const ModelConfig& config_;
  const Fill& fill_;
  Backend& backend_;
  const int threads_;
  std::map<std::string, Need> needs_;
  std::vector<float> scratch_;
  ModelWeights out_;
};

}  // namespace

std::size_t ModelWeights::linear_bytes() const {
  std::size_t bytes = lm_head->bytes();
  for (const LayerWeights& l : layers)
    bytes += l.qkv->bytes() + l.output->bytes() + l.gate_up->bytes() + l.down->bytes();
  return bytes;
}

std::map<std::string, std::vector<std::int64_t>> LinearShapes(const ModelConfig& config) {
  constexpr std::string_view kWeight = ".weight";
  std::map<std::string, std::vector<std::int64_t>> shapes;
  for (const Need& need : Needs(config)) {
    if (need.shape.size() != 2 || need.name == kEmbedding) continue;
    shapes.emplace(need.name.substr(0, need.name.size() - kWeight.size()), need.shape);
  }
  return shapes;
}

Status CheckTensors(const ModelConfig& config, const TensorMap& tensors) {
  std::map<std::string, const TensorView*> unused;
  for (const auto& [name, tensor] : tensors) unused.emplace(name, &tensor);
  for (const Need& need : Needs(config)) {
    const auto it = tensors.find(need.name);
    if (it == tensors.end()) return InvalidArgument("tensor '" + need.name + "' is missing");
    if (it->second.shape != need.shape) {
      return InvalidArgument("tensor '" + need.name + "' has shape " + ShapeText(it->second.shape) +
                             ", the model's configuration asks for " + ShapeText(need.shape));
    }
    unused.erase(need.name);
  }
  for (const auto& [name, tensor] : unused) {
    // Files carry the output layer beside a tied embedding, and buffers of RoPE that follow from the configuration.
    if (name == kLmHead || name.ends_with("rotary_emb.inv_freq")) continue;
    return InvalidArgument("tensor '" + name + "' is not part of a " + config.family + " model with " +
                           std::to_string(config.num_layers) + " layers as its configuration describes it");
  }
  return OkStatus();
}

Digest WeightsDigest(const ModelConfig& config, const TensorMap& tensors, int threads) {
  const std::vector<Need> needs = Needs(config);
  std::vector<Digest> digests(needs.size());
  ParallelFor(static_cast<std::int64_t>(needs.size()), 1, threads, [&](std::int64_t begin, std::int64_t) {
    const auto i = static_cast<std::size_t>(begin);
    digests[i] = DigestBuilder("tensor").Bytes(tensors.at(needs[i].name).bytes).Finish();
  });
  DigestBuilder builder("weights");
  for (std::size_t i = 0; i < needs.size(); ++i) {
    const TensorView& tensor = tensors.at(needs[i].name);
    builder.Text(needs[i].name).Text(tensor.type->name).U64(tensor.shape.size());
    for (const std::int64_t dim : tensor.shape) builder.U64(static_cast<std::uint64_t>(dim));
    builder.Child(digests[i]);
  }
  return builder.Finish();
}

Result<ModelWeights> LoadWeights(const ModelFiles& files, Backend* backend, int threads) {
  Result<ModelWeights> weights = Builder(files.config, FillFromFiles(files, threads), backend, threads).Build();
  if (weights.ok() && !files.unclaimed.ok()) return files.unclaimed;
  return weights;
}

Result<ModelWeights> MakeRandomWeights(const ModelConfig& config, Backend* backend, int threads, std::uint64_t seed) {
  return Builder(config, FillRandom(seed, threads), backend, threads).Build();
}

}  // namespace kvshare::runtime
