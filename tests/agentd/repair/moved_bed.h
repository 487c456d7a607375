// For tests of MovedPrompt: a tiny model, and pages for whatever a test puts there.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "agentd/repair/moved_prompt.h"
#include "kernels/paged_kv.h"
#include "tests/agentd/tiny_service.h"

namespace kvshare::agentd {

inline constexpr std::int64_t kNewTokens = 16;

inline std::int64_t PagesFor(std::int64_t tokens) { return (tokens + kernels::kPageTokens - 1) / kernels::kPageTokens; }

// A model and pages for whatever a test puts there.
class Bed {
 public:
  explicit Bed(kernels::DType dtype, int layers) : model_(testing::LoadTinyModel(dtype, 1024, 1, layers)) {
    constexpr kernels::PageIndex kPages = 128;
    auto memory = model_->backend().Allocate(kPages * model_->kv_layout().page_bytes());
    EXPECT_TRUE(memory.ok());
    memory_ = std::move(*memory);
    pages_ = {.base = memory_->data(), .num_pages = kPages, .layout = model_->kv_layout()};
  }

  runtime::Model& model() { return *model_; }
  const kernels::KvPages& pages() const { return pages_; }

  std::vector<kernels::PageIndex> Take(std::int64_t count) {
    std::vector<kernels::PageIndex> taken(static_cast<std::size_t>(count));
    std::iota(taken.begin(), taken.end(), next_);
    next_ += static_cast<kernels::PageIndex>(count);
    EXPECT_LE(next_, pages_.num_pages);
    return taken;
  }

  // Plain prefill in steps of `rows`; the last row's logits.
  std::vector<float> Plain(const std::vector<TokenId>& ids, std::vector<kernels::PageIndex>* where,
                           std::size_t rows = 100) {
    const std::vector<kernels::PageIndex> own = Take(PagesFor(static_cast<std::int64_t>(ids.size())));
    std::vector<float> logits(static_cast<std::size_t>(model_->config().vocab_size));
    for (std::size_t done = 0; done < ids.size();) {
      const std::size_t count = std::min(rows, ids.size() - done);
      runtime::ForwardBatch batch;
      for (std::size_t p = done; p < done + count; ++p) {
        batch.ids.push_back(ids[p]);
        batch.positions.push_back(static_cast<std::int64_t>(p));
        batch.slots.push_back({own[p / kernels::kPageTokens], static_cast<int>(p % kernels::kPageTokens)});
      }
      done += count;
      batch.segments.push_back(
          {.pages = own, .length = static_cast<std::int64_t>(done), .row_end = static_cast<std::int64_t>(count)});
      if (done == ids.size()) batch.logit_rows.push_back(static_cast<std::int64_t>(count) - 1);
      EXPECT_TRUE(model_->Forward(batch, pages_, logits.data()).ok());
    }
    if (where != nullptr) *where = own;
    return logits;
  }

  std::vector<float> Plain(const std::vector<TokenId>& ids) { return Plain(ids, nullptr); }

  // tokens [base, base + length) of a run whose pages are `run`, as they stand at `start` in a prompt.
  static MovedChunk Chunk(const std::vector<kernels::PageIndex>& run, std::int64_t base, std::int64_t length,
                          std::int64_t start, std::uint64_t name = 1) {
    MovedChunk chunk{.start = start, .length = length, .base = base};
    chunk.pages.assign(run.begin() + base / kernels::kPageTokens, run.begin() + PagesFor(base + length));
    chunk.first = static_cast<int>(base % kernels::kPageTokens);
    chunk.placeholder = "p";
    chunk.content = "c" + std::to_string(name);
    return chunk;
  }

  std::unique_ptr<MovedPrompt> Moved(const std::vector<TokenId>& prompt, std::vector<MovedChunk> chunks,
                                     const RepairOptions& options, anchors::AnchorPool* anchors = nullptr,
                                     std::vector<kernels::PageIndex>* where = nullptr) {
    auto moved = std::make_unique<MovedPrompt>(model_.get(), pages_, prompt, MovedPrompt::Prefix{}, std::move(chunks),
                                               options, anchors, "reader");
    const std::vector<kernels::PageIndex> own = Take(moved->PagesNeeded(kNewTokens));
    moved->GivePages(own, kNewTokens);
    if (where != nullptr) *where = own;
    return moved;
  }

  bool SameRow(kernels::KvSlot a, kernels::KvSlot b) const {
    const kernels::KvLayout& layout = pages_.layout;
    const std::size_t row = layout.slab_bytes() / kernels::kPageTokens;
    for (int layer = 0; layer < layout.num_layers; ++layer) {
      for (int slab = 0; slab < 2 * layout.num_kv_heads; ++slab) {
        const auto at = [&](kernels::KvSlot slot) {
          return pages_.slab(slot.page, layer, slab % 2, slab / 2) + row * static_cast<std::size_t>(slot.offset);
        };
        if (std::memcmp(at(a), at(b), row) != 0) return false;
      }
    }
    return true;
  }

  std::vector<float> Logits() const {
    return std::vector<float>(static_cast<std::size_t>(model_->config().vocab_size));
  }

 private:
  std::unique_ptr<runtime::Model> model_;
  std::unique_ptr<kernels::Buffer> memory_;
  kernels::KvPages pages_;
  kernels::PageIndex next_ = 0;
};

inline double WorstDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, static_cast<double>(std::abs(a[i] - b[i])));
  return worst;
}

inline double Scale(const std::vector<float>& a) {
  double largest = 0;
  for (const float value : a) largest = std::max(largest, static_cast<double>(std::abs(value)));
  return largest;
}

}  // namespace kvshare::agentd
