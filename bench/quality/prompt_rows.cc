#include "bench/quality/prompt_rows.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "libkvshare/core/status_macros.h"

namespace kvshare::quality {
namespace {

using kernels::kPageTokens;

class RowsHook final : public runtime::LayerHook {
 public:
  explicit RowsHook(anchors::KvBlock* block) : block_(block) {}
  std::optional<std::vector<std::int64_t>> OnLayer(int layer, const runtime::LayerRows& rows) override {
    for (std::int64_t r = 0; r < rows.v.rows; ++r) {
      std::copy_n(rows.k.row<float>(r), rows.k.cols, block_->row(layer, 0, r).begin());
      std::copy_n(rows.v.row<float>(r), rows.v.cols, block_->row(layer, 1, r).begin());
    }
    return std::nullopt;
  }

 private:
  anchors::KvBlock* block_;
};

}  // namespace

Result<anchors::KvBlock> PromptRows(runtime::Model& model, std::span<const TokenId> ids) {
  const kernels::KvLayout layout = model.kv_layout();
  const std::size_t count = (ids.size() + kPageTokens - 1) / kPageTokens;
  KVS_ASSIGN_OR_RETURN(const auto memory, model.backend().Allocate(layout.page_bytes() * count));
  std::vector<kernels::PageIndex> table(count);
  std::iota(table.begin(), table.end(), 0);
  runtime::ForwardBatch batch;
  for (std::size_t t = 0; t < ids.size(); ++t) {
    batch.ids.push_back(ids[t]);
    batch.positions.push_back(static_cast<std::int64_t>(t));
    batch.slots.push_back({table[t / kPageTokens], static_cast<int>(t % kPageTokens)});
  }
  const auto rows = static_cast<std::int64_t>(ids.size());
  batch.segments.push_back({.pages = table, .length = rows, .row_begin = 0, .row_end = rows});
  anchors::KvBlock block(layout.num_layers, rows, layout.num_kv_heads * layout.head_dim);
  RowsHook hook(&block);
  batch.hook = &hook;
  const kernels::KvPages pages = {
      .base = memory->data(), .num_pages = static_cast<kernels::PageIndex>(count), .layout = layout};
  KVS_RETURN_IF_ERROR(model.Forward(batch, pages, nullptr));
  return block;
}

double SquaredDistance(const anchors::KvBlock& a, std::int64_t a_token, const anchors::KvBlock& b, std::int64_t b_token,
                       int layer, int part) {
  const std::span<const float> x = a.row(layer, part, a_token);
  const std::span<const float> y = b.row(layer, part, b_token);
  return std::inner_product(x.begin(), x.end(), y.begin(), 0.0, std::plus<>(),
                            [](double p, double q) { return (p - q) * (p - q); });
}

}  // namespace kvshare::quality
