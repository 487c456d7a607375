#include "runtime/llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/rope.h"

namespace kvshare::runtime {
namespace {

using kernels::Backend;
using kernels::Buffer;
using kernels::DType;
using kernels::KvPages;
using kernels::KvSegment;
using kernels::MatrixView;

// Rows of a buffer of max_batch_rows rows.
struct Activation {
  std::unique_ptr<Buffer> buffer;
  DType dtype = DType::kF32;
  std::int64_t cols = 0;

  MatrixView Rows(std::int64_t rows) const { return {buffer->data(), dtype, rows, cols, cols}; }
};

// The rows a stage works on: all of the batch, or from the last attention on only those whose logits are wanted.
struct ActiveRows {
  MatrixView x;  // [rows, hidden] fp32: the residual stream
  MatrixView q;  // [rows, >= q width] fp32
  std::span<const std::int64_t> positions;
  std::span<const KvSegment> segments;
};

class LlamaModel final : public Model {
 public:
  LlamaModel(ModelParts parts, std::int64_t max_batch_rows) : parts_(std::move(parts)), max_rows_(max_batch_rows) {}

  Status Allocate(int threads);

  const ModelConfig& config() const override { return parts_.config; }
  const Tokenizer* tokenizer() const override { return parts_.tokenizer.get(); }
  const ChatTemplate* chat_template() const override { return parts_.chat_template.get(); }
  const Backend& backend() const override { return *parts_.backend; }
  Backend& backend() override { return *parts_.backend; }
  kernels::KvLayout kv_layout() const override {
    const ModelConfig& c = parts_.config;
    return {c.num_layers, c.num_kv_heads, c.head_dim, backend().capabilities().compute};
  }
  std::int64_t max_batch_rows() const override { return max_rows_; }
  std::size_t weight_bytes() const override { return parts_.weights.linear_bytes(); }
  const Digest& space() const override { return parts_.space; }

  Status Forward(const ForwardBatch& batch, const KvPages& pages, float* logits) override;

 private:
  void CheckBatch(const ForwardBatch& batch, const KvPages& pages, const float* logits) const;
  ActiveRows KeepLogitRows(const ForwardBatch& batch, const ActiveRows& all);

  ModelParts parts_;
  const std::int64_t max_rows_;
  Activation residual_, normed_, qkv_, attended_, gated_, kept_residual_, kept_q_;
  std::unique_ptr<Buffer> rope_buffer_;
  kernels::RopeTable rope_;
  // The logit rows as the gather and the last layer's attention see them; kept for their capacity.
  std::vector<std::int32_t> kept_rows_;
  std::vector<std::int64_t> kept_positions_;
  std::vector<KvSegment> kept_segments_;
};

Status LlamaModel::Allocate(int threads) {
  const ModelConfig& c = parts_.config;
  Backend& backend = *parts_.backend;
  const DType compute = backend.capabilities().compute;
  const std::int64_t q = std::int64_t{c.num_heads} * c.head_dim;
  const std::int64_t qkv = q + 2 * std::int64_t{c.num_kv_heads} * c.head_dim;
  const auto make = [&](Activation* out, std::int64_t cols, DType dtype) -> Status {
    const auto values = static_cast<std::size_t>(max_rows_) * static_cast<std::size_t>(cols);
    KVS_ASSIGN_OR_RETURN(out->buffer, backend.Allocate(values * DTypeBytes(dtype)));
    out->dtype = dtype;
    out->cols = cols;
    return OkStatus();
  };
  KVS_RETURN_IF_ERROR(make(&residual_, c.hidden_size, DType::kF32));
  KVS_RETURN_IF_ERROR(make(&normed_, c.hidden_size, compute));
  KVS_RETURN_IF_ERROR(make(&qkv_, qkv, DType::kF32));
  KVS_RETURN_IF_ERROR(make(&attended_, q, compute));
  KVS_RETURN_IF_ERROR(make(&gated_, c.intermediate_size, compute));
  KVS_RETURN_IF_ERROR(make(&kept_residual_, c.hidden_size, DType::kF32));
  KVS_RETURN_IF_ERROR(make(&kept_q_, q, DType::kF32));

  const auto half = static_cast<std::size_t>(c.head_dim / 2);
  const std::size_t values = static_cast<std::size_t>(c.max_positions) * half;
  KVS_ASSIGN_OR_RETURN(rope_buffer_, backend.Allocate(2 * values * sizeof(float)));
  auto* cos = reinterpret_cast<float*>(rope_buffer_->data());
  FillRopeTable(c.rope, c.head_dim, c.max_positions, threads, cos, cos + values);
  rope_ = {{cos, values}, {cos + values, values}, c.max_positions, c.head_dim / 2};
  return OkStatus();
}

void LlamaModel::CheckBatch(const ForwardBatch& batch, const KvPages& pages, const float* logits) const {
  const auto rows = static_cast<std::int64_t>(batch.ids.size());
  KVS_CHECK(rows >= 1 && rows <= max_rows_);
  KVS_CHECK(batch.positions.size() == batch.ids.size() && batch.slots.size() == batch.ids.size());
  KVS_CHECK(pages.layout == kv_layout());
  for (std::size_t i = 0; i < batch.ids.size(); ++i) {
    KVS_CHECK(batch.ids[i] >= 0 && batch.ids[i] < parts_.config.vocab_size);
    KVS_CHECK(batch.positions[i] >= 0 && batch.positions[i] < parts_.config.max_positions);
    KVS_CHECK(batch.slots[i].page < pages.num_pages && batch.slots[i].offset >= 0);
    KVS_CHECK(batch.slots[i].offset < kernels::kPageTokens);
  }
  for (const KvSegment& s : batch.segments) {
    KVS_CHECK(0 <= s.row_begin && s.row_begin <= s.row_end && s.row_end <= rows);
    KVS_CHECK(s.length >= 0 && s.length <= static_cast<std::int64_t>(s.pages.size()) * kernels::kPageTokens);
    for (const kernels::PageIndex page : s.pages) KVS_CHECK(page < pages.num_pages);
  }
  std::int64_t previous = -1;
  for (const std::int64_t row : batch.logit_rows) {
    KVS_CHECK(row > previous && row < rows);
    previous = row;
  }
  KVS_CHECK(logits != nullptr || batch.logit_rows.empty());
}

// The logit rows alone, side by side. Nobody sees another row's output from here on, and by batch invariance a row's
// result does not depend on who left.
ActiveRows LlamaModel::KeepLogitRows(const ForwardBatch& batch, const ActiveRows& all) {
  const std::vector<std::int64_t>& rows = batch.logit_rows;
  if (static_cast<std::int64_t>(rows.size()) == all.x.rows) return all;
  kept_rows_.assign(rows.begin(), rows.end());
  kept_positions_.clear();
  for (const std::int64_t row : rows) kept_positions_.push_back(batch.positions[static_cast<std::size_t>(row)]);
  kept_segments_.assign(batch.segments.begin(), batch.segments.end());
  const auto index_of = [&rows](std::int64_t row) {
    return std::lower_bound(rows.begin(), rows.end(), row) - rows.begin();
  };
  for (KvSegment& s : kept_segments_) {
    s.row_begin = index_of(s.row_begin);
    s.row_end = index_of(s.row_end);
  }
  const auto count = static_cast<std::int64_t>(rows.size());
  const ActiveRows kept{kept_residual_.Rows(count), kept_q_.Rows(count), kept_positions_, kept_segments_};
  // Picking rows is what an embedding does.
  Backend& backend = *parts_.backend;
  MatrixView q = all.q;
  q.cols = kept.q.cols;
  backend.Embed({.ids = kept_rows_, .table = all.x, .out = kept.x});
  backend.Embed({.ids = kept_rows_, .table = q, .out = kept.q});
  return kept;
}

Status LlamaModel::Forward(const ForwardBatch& batch, const KvPages& pages, float* logits) {
  CheckBatch(batch, pages, logits);
  const ModelConfig& c = parts_.config;
  const ModelWeights& weights = parts_.weights;
  Backend& backend = *parts_.backend;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.head_dim)));
  const float eps = c.rms_norm_eps;
  const auto all_rows = static_cast<std::int64_t>(batch.ids.size());
  const MatrixView qkv = qkv_.Rows(all_rows);
  ActiveRows rows{residual_.Rows(all_rows), qkv, batch.positions, batch.segments};

  backend.Embed({.ids = batch.ids, .table = weights.embedding, .out = rows.x});
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const LayerWeights& w = weights.layers[static_cast<std::size_t>(layer)];
    backend.RmsNorm({rows.x, w.input_norm, eps, normed_.Rows(all_rows)});
    backend.Linear({.x = normed_.Rows(all_rows), .weights = w.qkv.get(), .out = qkv});
    backend.StoreKv({.qkv = qkv,
                     .num_heads = c.num_heads,
                     .layer = layer,
                     .q_norm = w.q_norm,
                     .k_norm = w.k_norm,
                     .eps = eps,
                     .rope = rope_,
                     .positions = batch.positions,
                     .slots = batch.slots,
                     .pages = pages});
    if (layer == c.num_layers - 1) {
      if (batch.logit_rows.empty()) return backend.Sync();
      rows = KeepLogitRows(batch, rows);
    }
    const std::int64_t n = rows.x.rows;
    backend.Attention({.q = rows.q,
                       .num_heads = c.num_heads,
                       .layer = layer,
                       .scale = scale,
                       .window = c.sliding_window,
                       .rope = rope_,
                       .positions = rows.positions,
                       .segments = rows.segments,
                       .pages = pages,
                       .out = attended_.Rows(n)});
    backend.Linear({.x = attended_.Rows(n), .weights = w.output.get(), .out = rows.x, .accumulate = true});
    backend.RmsNorm({rows.x, w.post_attention_norm, eps, normed_.Rows(n)});
    backend.GatedLinear({.x = normed_.Rows(n), .weights = w.gate_up.get(), .out = gated_.Rows(n)});
    backend.Linear({.x = gated_.Rows(n), .weights = w.down.get(), .out = rows.x, .accumulate = true});
  }
  const std::int64_t n = rows.x.rows;
  backend.RmsNorm({rows.x, weights.final_norm, eps, normed_.Rows(n)});
  backend.Linear({.x = normed_.Rows(n),
                  .weights = weights.lm_head.get(),
                  .out = {logits, DType::kF32, n, c.vocab_size, c.vocab_size}});
  return backend.Sync();
}

}  // namespace

Result<std::unique_ptr<Model>> NewLlamaModel(ModelParts parts, std::int64_t max_batch_rows, int threads) {
  auto model = std::make_unique<LlamaModel>(std::move(parts), max_batch_rows);
  KVS_RETURN_IF_ERROR(model->Allocate(threads));
  return std::unique_ptr<Model>(std::move(model));
}

}  // namespace kvshare::runtime
