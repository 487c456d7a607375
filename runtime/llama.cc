#include "runtime/llama.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <numeric>
#include <optional>
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
using kernels::KvSlot;
using kernels::MatrixView;

// Rows of a buffer of max_batch_rows rows.
struct Activation {
  std::unique_ptr<Buffer> buffer;
  DType dtype = DType::kF32;
  std::int64_t cols = 0;

  MatrixView Rows(std::int64_t rows) const { return {buffer->data(), dtype, rows, cols, cols}; }
};

// The rows a stage works on: all of the batch, those that the hook lets go on, and from the last attention on only
// those whose logits are wanted.
struct ActiveRows {
  MatrixView x;  // [rows, hidden] fp32: the residual stream
  MatrixView q;  // [rows, >= q width] fp32
  std::span<const std::int64_t> positions;
  std::span<const KvSlot> slots;
  std::span<const KvSegment> segments;
};

// to[i] = from[kept[i]]. `from` may be `to` itself: kept ascends, so nothing is read after it is overwritten.
template <typename T>
std::span<const T> Pick(std::span<const T> from, std::span<const std::int64_t> kept, std::vector<T>* to) {
  to->resize(std::max(to->size(), kept.size()));
  for (std::size_t i = 0; i < kept.size(); ++i) (*to)[i] = from[static_cast<std::size_t>(kept[i])];
  to->resize(kept.size());
  return *to;
}

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
  void CheckSegments(std::span<const KvSegment> segments, std::int64_t rows, const KvPages& pages) const;
  MatrixView Columns(std::int64_t rows, std::int64_t first, std::int64_t count) const;
  std::optional<std::vector<std::int64_t>> CallHook(LayerHook* hook, int layer, const KvPages& pages, ActiveRows* rows);
  void Keep(std::span<const std::int64_t> kept, ActiveRows* rows);
  std::span<const KvSegment> SeenInLayer(int layer, std::span<const KvSegment> segments);
  std::vector<std::int64_t> LogitRows(const ForwardBatch& batch,
                                      const std::optional<std::vector<std::int64_t>>& kept) const;
  float Scale() const { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(parts_.config.head_dim))); }

  ModelParts parts_;
  const std::int64_t max_rows_;
  Activation residual_, normed_, qkv_, attended_, gated_, kept_residual_, kept_q_;
  std::unique_ptr<Buffer> rope_buffer_;
  kernels::RopeTable rope_;
  // The active rows where they are not those of the batch; kept for their capacity.
  std::vector<std::int64_t> active_;  // their indices in the batch; only with a hook
  std::vector<std::int64_t> active_positions_;
  std::vector<KvSlot> active_slots_;
  std::vector<KvSegment> active_segments_;
  std::vector<KvSegment> layer_segments_;  // those that are seen in one layer, where that is not all
  std::vector<std::int32_t> gather_;
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
  std::vector<float> table(2 * values);
  FillRopeTable(c.rope, c.head_dim, c.max_positions, threads, table.data(), table.data() + values);
  KVS_RETURN_IF_ERROR(backend.Upload(rope_buffer_->data(), table.data(), table.size() * sizeof(float)));
  const auto* cos = reinterpret_cast<const float*>(rope_buffer_->data());
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
    const KvSlot& slot = batch.slots[i];
    KVS_CHECK(slot == kernels::kNoSlot ||
              (slot.page < pages.num_pages && slot.offset >= 0 && slot.offset < kernels::kPageTokens));
  }
  CheckSegments(batch.segments, rows, pages);
  KVS_CHECK(batch.stop_after_layer >= -1 && batch.stop_after_layer < parts_.config.num_layers);
  KVS_CHECK(batch.stop_after_layer < 0 || batch.logit_rows.empty());
  if (batch.resume_after_layer >= 0) {
    const ModelConfig& c = parts_.config;
    KVS_CHECK(batch.resume_after_layer < c.num_layers);
    KVS_CHECK(batch.stop_after_layer < 0 || batch.resume_after_layer < batch.stop_after_layer);
    KVS_CHECK(batch.residual.dtype == DType::kF32 && batch.residual.cols == c.hidden_size);
    KVS_CHECK(batch.queries.dtype == DType::kF32 && batch.queries.cols == std::int64_t{c.num_heads} * c.head_dim);
    KVS_CHECK(batch.resumed_rows.size() == batch.ids.size());
    for (const std::int32_t row : batch.resumed_rows) {
      KVS_CHECK(row >= 0 && row < batch.residual.rows && row < batch.queries.rows);
    }
  }
  std::int64_t previous = -1;
  for (const std::int64_t row : batch.logit_rows) {
    KVS_CHECK(row > previous && row < rows);
    previous = row;
  }
  KVS_CHECK(logits != nullptr || batch.logit_rows.empty());
}

void LlamaModel::CheckSegments(std::span<const KvSegment> segments, std::int64_t rows, const KvPages& pages) const {
  for (const KvSegment& s : segments) {
    KVS_CHECK(0 <= s.row_begin && s.row_begin <= s.row_end && s.row_end <= rows);
    KVS_CHECK(0 <= s.first && s.first < kernels::kPageTokens && s.length >= 0);
    KVS_CHECK(s.first + s.length <= static_cast<std::int64_t>(s.pages.size()) * kernels::kPageTokens);
    for (const kernels::PageIndex page : s.pages) KVS_CHECK(page < pages.num_pages);
    if (s.positions.empty()) continue;
    KVS_CHECK(static_cast<std::int64_t>(s.positions.size()) == s.length);
    KVS_CHECK(std::adjacent_find(s.positions.begin(), s.positions.end(), std::greater_equal<>()) == s.positions.end());
  }
}

// `count` columns of the fused q, k, v from column `first` on.
MatrixView LlamaModel::Columns(std::int64_t rows, std::int64_t first, std::int64_t count) const {
  MatrixView view = qkv_.Rows(rows);
  view.data = view.row<float>(0) + first;
  view.cols = count;
  return view;
}

// Shows the hook this layer; afterwards `rows` sees the segments that the hook left. Returns the rows that go on.
std::optional<std::vector<std::int64_t>> LlamaModel::CallHook(LayerHook* hook, int layer, const KvPages& pages,
                                                              ActiveRows* rows) {
  const ModelConfig& c = parts_.config;
  const std::int64_t n = rows->x.rows, q = std::int64_t{c.num_heads} * c.head_dim;
  const std::int64_t kv = std::int64_t{c.num_kv_heads} * c.head_dim;
  auto kept = hook->OnLayer(layer, {.rows = active_,
                                    .positions = rows->positions,
                                    .slots = active_slots_,
                                    .x = rows->x,
                                    .q = Columns(n, 0, q),
                                    .k = Columns(n, q, kv),
                                    .v = Columns(n, q + kv, kv),
                                    .segments = &active_segments_,
                                    .pages = pages,
                                    .rope = rope_,
                                    .num_heads = c.num_heads,
                                    .scale = Scale(),
                                    .window = c.sliding_window});
  CheckSegments(active_segments_, n, pages);
  rows->segments = active_segments_;
  if (kept.has_value()) {
    std::int64_t previous = -1;
    for (const std::int64_t row : *kept) {
      KVS_CHECK(row > previous && row < n);
      previous = row;
    }
  }
  return kept;
}

// Only the rows `kept` (ascending) go on, side by side. Nobody sees another row's output from here on, and by batch
// invariance a row's result does not depend on who left.
void LlamaModel::Keep(std::span<const std::int64_t> kept, ActiveRows* rows) {
  const auto count = static_cast<std::int64_t>(kept.size());
  if (count == rows->x.rows) return;
  // Picking rows is what an embedding does. The residual stream moves back and forth between two buffers.
  Backend& backend = *parts_.backend;
  const bool from_residual = rows->x.data == residual_.Rows(0).data;
  const MatrixView x = (from_residual ? kept_residual_ : residual_).Rows(count), q = kept_q_.Rows(count);
  MatrixView old_q = rows->q;
  old_q.cols = q.cols;
  gather_.assign(kept.begin(), kept.end());
  backend.Embed({.ids = gather_, .table = rows->x, .out = x});
  backend.Embed({.ids = gather_, .table = old_q, .out = q});
  rows->x = x;
  rows->q = q;
  if (!active_.empty()) Pick<std::int64_t>(active_, kept, &active_);
  rows->positions = Pick<std::int64_t>(rows->positions, kept, &active_positions_);
  rows->slots = Pick<KvSlot>(rows->slots, kept, &active_slots_);
  if (rows->segments.data() != active_segments_.data()) {
    active_segments_.assign(rows->segments.begin(), rows->segments.end());
  }
  const auto index_of = [&kept](std::int64_t row) {
    return std::lower_bound(kept.begin(), kept.end(), row) - kept.begin();
  };
  for (KvSegment& s : active_segments_) {
    s.row_begin = index_of(s.row_begin);
    s.row_end = index_of(s.row_end);
  }
  rows->segments = active_segments_;
}

std::span<const KvSegment> LlamaModel::SeenInLayer(int layer, std::span<const KvSegment> segments) {
  const auto seen = [layer](const KvSegment& s) { return kernels::SeenIn(s, layer); };
  if (std::all_of(segments.begin(), segments.end(), seen)) return segments;
  layer_segments_.clear();
  std::copy_if(segments.begin(), segments.end(), std::back_inserter(layer_segments_), seen);
  return layer_segments_;
}

// The batch's logit rows as indices into the active ones, among which the hook has left them.
std::vector<std::int64_t> LlamaModel::LogitRows(const ForwardBatch& batch,
                                                const std::optional<std::vector<std::int64_t>>& kept) const {
  if (batch.hook == nullptr) return batch.logit_rows;
  std::vector<std::int64_t> rows;
  for (const std::int64_t row : batch.logit_rows) {
    const auto it = std::lower_bound(active_.begin(), active_.end(), row);
    KVS_CHECK(it != active_.end() && *it == row);
    rows.push_back(it - active_.begin());
    KVS_CHECK(!kept.has_value() || std::binary_search(kept->begin(), kept->end(), rows.back()));
  }
  return rows;
}

Status LlamaModel::Forward(const ForwardBatch& batch, const KvPages& pages, float* logits) {
  CheckBatch(batch, pages, logits);
  const ModelConfig& c = parts_.config;
  const ModelWeights& weights = parts_.weights;
  Backend& backend = *parts_.backend;
  const float scale = Scale();
  const float eps = c.rms_norm_eps;
  const auto all_rows = static_cast<std::int64_t>(batch.ids.size());
  ActiveRows rows{residual_.Rows(all_rows), {}, batch.positions, batch.slots, batch.segments};
  active_.clear();
  if (batch.hook != nullptr) {
    active_.resize(batch.ids.size());
    std::iota(active_.begin(), active_.end(), 0);
    active_slots_.assign(batch.slots.begin(), batch.slots.end());
    active_segments_.assign(batch.segments.begin(), batch.segments.end());
    rows.slots = active_slots_;
    rows.segments = active_segments_;
  }

  const bool resumed = batch.resume_after_layer >= 0;
  if (resumed) {
    backend.Embed({.ids = batch.resumed_rows, .table = batch.residual, .out = rows.x});  // which picks rows
  } else {
    backend.Embed({.ids = batch.ids, .table = weights.embedding, .out = rows.x});
  }
  for (int layer = resumed ? batch.resume_after_layer : 0; layer < c.num_layers; ++layer) {
    if (batch.gate != nullptr) batch.gate->BeforeLayer(layer);
    const LayerWeights& w = weights.layers[static_cast<std::size_t>(layer)];
    const std::int64_t before = rows.x.rows;
    rows.q = qkv_.Rows(before);
    std::optional<std::vector<std::int64_t>> kept;
    if (layer == batch.resume_after_layer) {
      backend.Embed({.ids = batch.resumed_rows, .table = batch.queries, .out = Columns(before, 0, batch.queries.cols)});
    } else {
      backend.RmsNorm({rows.x, w.input_norm, eps, normed_.Rows(before)});
      backend.Linear({.x = normed_.Rows(before), .weights = w.qkv.get(), .out = rows.q});
      backend.StoreKv({.qkv = rows.q,
                       .num_heads = c.num_heads,
                       .layer = layer,
                       .q_norm = w.q_norm,
                       .k_norm = w.k_norm,
                       .eps = eps,
                       .rope = rope_,
                       .positions = rows.positions,
                       .slots = rows.slots,
                       .pages = pages});
      if (batch.hook != nullptr) kept = CallHook(batch.hook, layer, pages, &rows);
    }
    const bool last = layer == c.num_layers - 1;
    if ((last && batch.logit_rows.empty()) || layer == batch.stop_after_layer) return backend.Sync();
    if (last) {
      Keep(LogitRows(batch, kept), &rows);
    } else if (kept.has_value()) {
      if (kept->empty() && batch.logit_rows.empty()) return backend.Sync();
      KVS_CHECK(!kept->empty());
      Keep(*kept, &rows);
    }
    const std::int64_t n = rows.x.rows;
    backend.Attention({.q = rows.q,
                       .num_heads = c.num_heads,
                       .layer = layer,
                       .scale = scale,
                       .window = c.sliding_window,
                       .rope = rope_,
                       .positions = rows.positions,
                       .segments = SeenInLayer(layer, rows.segments),
                       .pages = pages,
                       .out = attended_.Rows(n)});
    backend.Linear({.x = attended_.Rows(n), .weights = w.output.get(), .out = rows.x, .accumulate = true});
    backend.RmsNorm({rows.x, w.post_attention_norm, eps, normed_.Rows(n)});
    backend.GatedLinear({.x = normed_.Rows(n), .weights = w.gate_up.get(), .out = gated_.Rows(n)});
    backend.Linear({.x = gated_.Rows(n), .weights = w.down.get(), .out = rows.x, .accumulate = true});
  }
  const std::int64_t n = rows.x.rows;
  backend.RmsNorm({rows.x, weights.final_norm, eps, normed_.Rows(n)});
  const auto project = [&](void* out) {
    backend.Linear({.x = normed_.Rows(n),
                    .weights = weights.lm_head.get(),
                    .out = {out, DType::kF32, n, c.vocab_size, c.vocab_size}});
  };
  if (backend.capabilities().host_memory) {
    project(logits);
    return backend.Sync();
  }
  const std::size_t bytes = static_cast<std::size_t>(n * c.vocab_size) * sizeof(float);
  KVS_ASSIGN_OR_RETURN(const auto product, backend.Allocate(bytes));
  project(product->data());
  return backend.Download(logits, product->data(), bytes);
}

}  // namespace

Result<std::unique_ptr<Model>> NewLlamaModel(ModelParts parts, std::int64_t max_batch_rows, int threads) {
  auto model = std::make_unique<LlamaModel>(std::move(parts), max_batch_rows);
  KVS_RETURN_IF_ERROR(model->Allocate(threads));
  return std::unique_ptr<Model>(std::move(model));
}

}  // namespace kvshare::runtime
