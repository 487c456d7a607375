// One sequence on a model with its own pages: what a command needs to run a prompt without a daemon.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvshare/status.h"
#include "runtime/model.h"

namespace kvshare::kvctl {

class Sequence {
 public:
  // Room for `max_tokens`. `model` must outlive it. ResourceExhausted when memory does not suffice.
  static Result<Sequence> New(runtime::Model* model, std::int64_t max_tokens);

  // Computes `ids` after what is there: 1 .. max_batch_rows tokens within the vocabulary. Writes vocab_size floats per
  // entry of `logit_rows` (rows of this call, ascending).
  Status Append(std::span<const TokenId> ids, std::span<const std::int64_t> logit_rows, float* logits);
  // Forgets all tokens.
  void Clear() { length_ = 0; }
  std::int64_t length() const { return length_; }

 private:
  Sequence(runtime::Model* model, std::unique_ptr<kernels::Buffer> buffer, std::vector<kernels::PageIndex> table)
      : model_(model), buffer_(std::move(buffer)), table_(std::move(table)) {}

  runtime::Model* model_;
  std::unique_ptr<kernels::Buffer> buffer_;
  std::vector<kernels::PageIndex> table_;
  std::int64_t length_ = 0;
};

}  // namespace kvshare::kvctl
