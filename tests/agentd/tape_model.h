// TapeModel: a model whose "attention" is a hash of every token before, read back from the KV pages. Its answers are
// right only if each row of KV the engine shows it is the right token at the right position, so it finds any mistake of
// paging, sharing, copying or eviction, in microseconds and on any machine. Tests also stop it between steps to arrange
// who waits for whom.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "runtime/model.h"
#include "tests/agentd/late_copies.h"

namespace kvshare::testing {

struct TapeModelOptions {
  std::int64_t vocab_size = 50;
  std::int64_t max_positions = 1024;
  std::int64_t max_batch_rows = 256;
  TokenId eos = -1;  // -1: none
  int weights = 0;   // another number: another model, whose KV is not this one's
  // Pages as large as real ones. The tape lies in the last layer.
  int layers = 1;
  int head_dim = 1;
  // Its memory is not for the host: whoever reads or writes a page in place meets every bit turned round.
  bool on_device = false;
  bool device_kv = true;                            // there is one for its pages, which copies them (late_copies.h)
  std::size_t pinned_bytes = std::size_t{1} << 40;  // that it has for that
};

// What the test sees of a model it gave away; outlives it.
struct TapeProbe {
  std::function<void()> before_forward;  // set before the model is in use; on the engine's thread
  std::atomic<int> fail_next_forwards = 0;
  std::atomic<int> forward_without_numbers = 0;  // this one from now, 1 the next, has NaN for logits
  std::atomic<bool> device_lost = false;         // set by the test; where the model is on a device
  CopyProbe copies;                              // likewise
  std::atomic<std::int64_t> forwards = 0;
  std::atomic<std::int64_t> rows = 0;
  std::atomic<std::int64_t> gated_layers = 0;  // begun behind a gate
  std::atomic<std::int64_t> wrong_rows = 0;    // rows of KV that were not what they should have been
};

std::unique_ptr<runtime::Model> NewTapeModel(const TapeModelOptions& options, std::shared_ptr<TapeProbe> probe);

// What the model answers to `prompt` with greedy sampling: `count` tokens, fewer where it says eos.
std::vector<TokenId> TapeContinuation(const TapeModelOptions& options, std::vector<TokenId> prompt, std::int64_t count);

}  // namespace kvshare::testing
