#include "tests/reference/llama_reference.h"

#include <algorithm>
#include <cmath>

namespace kvshare::reference {
namespace {

using Row = std::vector<double>;
using Weights = std::map<std::string, testing::TinyTensor>;

// W x + b; b may be absent.
Row Linear(const Weights& weights, const std::string& name, const Row& x) {
  const testing::TinyTensor& w = weights.at(name + ".weight");
  Row out(static_cast<std::size_t>(w.shape[0]));
  for (std::size_t n = 0; n < out.size(); ++n) {
    for (std::size_t k = 0; k < x.size(); ++k) out[n] += static_cast<double>(w.values[n * x.size() + k]) * x[k];
  }
  if (const auto b = weights.find(name + ".bias"); b != weights.end()) {
    for (std::size_t n = 0; n < out.size(); ++n) out[n] += static_cast<double>(b->second.values[n]);
  }
  return out;
}

Row RmsNorm(const Weights& weights, const std::string& name, std::span<const double> x, double eps) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
  Row out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    out[i] = x[i] * scale * static_cast<double>(weights.at(name).values[i]);
  }
  return out;
}

// The norm of every head of a q or k row, where the model has one.
void Norm(const runtime::ModelConfig& c, const Weights& weights, const std::string& norm, Row* row) {
  const auto d = static_cast<std::size_t>(c.head_dim);
  for (std::size_t h = 0; c.qk_norm && h < row->size() / d; ++h) {
    const std::span<double> head(row->data() + h * d, d);
    const Row normed = RmsNorm(weights, norm, head, static_cast<double>(c.rms_norm_eps));
    std::copy(normed.begin(), normed.end(), head.begin());
  }
}

void Rotate(const runtime::ModelConfig& c, int position, std::span<const double> inv_freq, double factor, Row* row) {
  const auto d = static_cast<std::size_t>(c.head_dim);
  for (std::size_t h = 0; h < row->size() / d; ++h) {
    const std::span<double> head(row->data() + h * d, d);
    for (std::size_t j = 0; j < d / 2; ++j) {
      const double cos = factor * std::cos(position * inv_freq[j]), sin = factor * std::sin(position * inv_freq[j]);
      const double a = head[j], b = head[j + d / 2];
      head[j] = a * cos - b * sin;
      head[j + d / 2] = b * cos + a * sin;
    }
  }
}

// Row i, which sees keys and values 0 to i.
Row Attend(const runtime::ModelConfig& c, const Row& q, std::size_t i, const std::vector<Row>& keys,
           const std::vector<Row>& values) {
  const auto d = static_cast<std::size_t>(c.head_dim);
  const auto group = static_cast<std::size_t>(c.num_heads / c.num_kv_heads);
  const auto window = static_cast<std::size_t>(c.sliding_window);
  const std::size_t first = window > 0 && i + 1 > window ? i + 1 - window : 0;
  Row out(q.size());
  for (std::size_t h = 0; h < q.size() / d; ++h) {
    const std::size_t kv = h / group * d;
    Row scores;
    for (std::size_t j = first; j <= i; ++j) {
      double dot = 0;
      for (std::size_t e = 0; e < d; ++e) dot += q[h * d + e] * keys[j][kv + e];
      scores.push_back(dot / std::sqrt(static_cast<double>(d)));
    }
    const double max = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& s : scores) total += s = std::exp(s - max);
    for (std::size_t j = first; j <= i; ++j) {
      for (std::size_t e = 0; e < d; ++e) out[h * d + e] += scores[j - first] / total * values[j][kv + e];
    }
  }
  return out;
}

void AddTo(Row* x, const Row& y) {
  for (std::size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
}

}  // namespace

std::vector<double> LlamaLogits(const runtime::ModelConfig& c, const Weights& weights, std::span<const double> inv_freq,
                                double rope_factor, std::span<const TokenId> ids, const LayerVisitor& visitor) {
  const auto hidden = static_cast<std::size_t>(c.hidden_size);
  const auto eps = static_cast<double>(c.rms_norm_eps);
  const testing::TinyTensor& embedding = weights.at("model.embed_tokens.weight");
  std::vector<Row> x;
  for (const TokenId id : ids) {
    const float* row = embedding.values.data() + static_cast<std::size_t>(id) * hidden;
    x.emplace_back(row, row + hidden);
  }
  for (int l = 0; l < c.num_layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    std::vector<Row> queries;
    LayerKv kv;
    for (const Row& row : x) {
      const Row n = RmsNorm(weights, p + "input_layernorm.weight", row, eps);
      queries.push_back(Linear(weights, p + "self_attn.q_proj", n));
      kv.k.push_back(Linear(weights, p + "self_attn.k_proj", n));
      kv.v.push_back(Linear(weights, p + "self_attn.v_proj", n));
      Norm(c, weights, p + "self_attn.q_norm.weight", &queries.back());
      Norm(c, weights, p + "self_attn.k_norm.weight", &kv.k.back());
    }
    if (visitor) visitor(l, &kv);
    for (std::size_t i = 0; i < x.size(); ++i) {
      Rotate(c, static_cast<int>(i), inv_freq, rope_factor, &queries[i]);
      Rotate(c, static_cast<int>(i), inv_freq, rope_factor, &kv.k[i]);
    }
    for (std::size_t i = 0; i < x.size(); ++i) {
      AddTo(&x[i], Linear(weights, p + "self_attn.o_proj", Attend(c, queries[i], i, kv.k, kv.v)));
      const Row m = RmsNorm(weights, p + "post_attention_layernorm.weight", x[i], eps);
      Row gate = Linear(weights, p + "mlp.gate_proj", m);
      const Row up = Linear(weights, p + "mlp.up_proj", m);
      for (std::size_t e = 0; e < gate.size(); ++e) gate[e] = gate[e] / (1 + std::exp(-gate[e])) * up[e];
      AddTo(&x[i], Linear(weights, p + "mlp.down_proj", gate));
    }
  }
  const std::string head = c.tied_embeddings ? "model.embed_tokens" : "lm_head";
  std::vector<double> logits;
  for (const Row& row : x) {
    const Row out = Linear(weights, head, RmsNorm(weights, "model.norm.weight", row, eps));
    logits.insert(logits.end(), out.begin(), out.end());
  }
  return logits;
}

Qkv FirstLayerQkv(const runtime::ModelConfig& c, const Weights& weights, std::span<const TokenId> ids) {
  const std::string p = "model.layers.0.";
  const auto hidden = static_cast<std::size_t>(c.hidden_size);
  Qkv out;
  for (const TokenId id : ids) {
    const float* row = weights.at("model.embed_tokens.weight").values.data() + static_cast<std::size_t>(id) * hidden;
    const Row n =
        RmsNorm(weights, p + "input_layernorm.weight", Row(row, row + hidden), static_cast<double>(c.rms_norm_eps));
    Row q = Linear(weights, p + "self_attn.q_proj", n), k = Linear(weights, p + "self_attn.k_proj", n);
    Norm(c, weights, p + "self_attn.q_norm.weight", &q);
    Norm(c, weights, p + "self_attn.k_norm.weight", &k);
    const Row v = Linear(weights, p + "self_attn.v_proj", n);
    out.q.insert(out.q.end(), q.begin(), q.end());
    out.k.insert(out.k.end(), k.begin(), k.end());
    out.v.insert(out.v.end(), v.begin(), v.end());
  }
  return out;
}

}  // namespace kvshare::reference
