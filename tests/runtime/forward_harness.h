// Runs a model over prompts through a small pool of pages of its own, in whatever pieces, order and places a test
// wants.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/model.h"

namespace kvshare::runtime {

// One prompt's way through the cache: which pages it uses and how far it has come.
struct Sequence {
  std::vector<TokenId> ids;
  std::vector<kernels::PageIndex> pages;  // enough for all ids
  std::int64_t done = 0;
};

class ForwardHarness {
 public:
  // `num_pages` pages, filled with a pattern that would show if it were read before it is written.
  ForwardHarness(Model* model, kernels::PageIndex num_pages);

  // Computes the next `counts[s]` tokens of every sequence s (0: it sits this step out) in one batch, in the order
  // given, and returns the logits of the rows `logit_rows` of that batch.
  std::vector<float> Step(const std::vector<Sequence*>& sequences, const std::vector<std::int64_t>& counts,
                          std::vector<std::int64_t> logit_rows);

  // One sequence's next `count` tokens; the logits of the last of them.
  std::vector<float> Advance(Sequence* sequence, std::int64_t count) { return Step({sequence}, {count}, {count - 1}); }

  // All logits [ids, vocab] of one prompt in pieces of `chunk` tokens, on pages 0, 1, 2, ...
  std::vector<float> Logits(std::span<const TokenId> ids, std::int64_t chunk);

 private:
  Model* model_;
  std::unique_ptr<kernels::Buffer> memory_;
  kernels::KvPages pages_;
};

// Loads a model or ends the test program with the reason.
std::unique_ptr<Model> LoadOrDie(const std::string& path, kernels::DType dtype, int threads = 2,
                                 std::int64_t max_batch_rows = 512);

}  // namespace kvshare::runtime
