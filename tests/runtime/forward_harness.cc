#include "tests/runtime/forward_harness.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::runtime {

ForwardHarness::ForwardHarness(Model* model, kernels::PageIndex num_pages) : model_(model) {
  const kernels::KvLayout layout = model->kv_layout();
  auto memory = model->backend().Allocate(num_pages * layout.page_bytes());
  KVS_CHECK(memory.ok());
  memory_ = std::move(*memory);
  const std::vector<std::byte> huge(memory_->size(), std::byte{0x7f});  // huge numbers, in bf16 and in fp32
  KVS_CHECK(model->backend().Upload(memory_->data(), huge.data(), huge.size()).ok());
  pages_ = {memory_->data(), num_pages, layout};
}

std::vector<float> ForwardHarness::Step(const std::vector<Sequence*>& sequences,
                                        const std::vector<std::int64_t>& counts, std::vector<std::int64_t> logit_rows) {
  ForwardBatch batch;
  batch.logit_rows = std::move(logit_rows);
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    Sequence& q = *sequences[s];
    if (counts[s] == 0) continue;
    const auto begin = static_cast<std::int64_t>(batch.ids.size());
    for (std::int64_t i = 0; i < counts[s]; ++i, ++q.done) {
      batch.ids.push_back(q.ids[static_cast<std::size_t>(q.done)]);
      batch.positions.push_back(q.done);
      batch.slots.push_back({q.pages[static_cast<std::size_t>(q.done / kernels::kPageTokens)],
                             static_cast<int>(q.done % kernels::kPageTokens)});
    }
    const auto end = static_cast<std::int64_t>(batch.ids.size());
    batch.segments.push_back(
        {.pages = q.pages, .start = 0, .length = q.done, .shift = 0, .row_begin = begin, .row_end = end, .skip = {}});
  }
  std::vector<float> logits(batch.logit_rows.size() * static_cast<std::size_t>(model_->config().vocab_size));
  KVS_CHECK(model_->Forward(batch, pages_, logits.data()).ok());
  return logits;
}

std::vector<float> ForwardHarness::Logits(std::span<const TokenId> ids, std::int64_t chunk) {
  Sequence sequence{.ids = {ids.begin(), ids.end()}, .pages = {}, .done = 0};
  for (std::size_t p = 0; p * kernels::kPageTokens < ids.size(); ++p) {
    sequence.pages.push_back(static_cast<kernels::PageIndex>(p));
  }
  std::vector<float> logits;
  while (sequence.done < static_cast<std::int64_t>(ids.size())) {
    const std::int64_t left = static_cast<std::int64_t>(ids.size()) - sequence.done;
    std::vector<std::int64_t> all(static_cast<std::size_t>(std::min(left, chunk)));
    std::iota(all.begin(), all.end(), 0);
    const std::vector<float> piece = Step({&sequence}, {std::min(left, chunk)}, all);
    logits.insert(logits.end(), piece.begin(), piece.end());
  }
  return logits;
}

std::unique_ptr<Model> LoadOrDie(const std::string& path, kernels::DType dtype, int threads,
                                 std::int64_t max_batch_rows) {
  auto model = LoadModel(path, {.dtype = dtype, .threads = threads, .max_batch_rows = max_batch_rows});
  if (!model.ok()) {
    std::fprintf(stderr, "%s\n", model.status().message().c_str());
    std::abort();
  }
  return std::move(*model);
}

}  // namespace kvshare::runtime
