// PacedModel: a real model that takes as long for a step as a test says, and tells when a step runs that does not have
// all of its KV yet.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "gtest/gtest.h"
#include "runtime/model.h"

namespace kvshare::testing {

// What the test keeps of a model it gave away; outlives it.
struct Pace {
  std::atomic<std::chrono::milliseconds> sleep = std::chrono::milliseconds(0);  // before each step
  std::atomic<bool> gated = false;                                              // a step has begun behind a gate

  void AwaitGatedStep() const {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!gated && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    EXPECT_TRUE(gated) << "no step began before its KV was there";
  }
};

class PacedModel final : public runtime::Model {
 public:
  PacedModel(std::unique_ptr<runtime::Model> model, std::shared_ptr<Pace> pace)
      : model_(std::move(model)), pace_(std::move(pace)) {}

  const runtime::ModelConfig& config() const override { return model_->config(); }
  const runtime::Tokenizer* tokenizer() const override { return model_->tokenizer(); }
  const runtime::ChatTemplate* chat_template() const override { return model_->chat_template(); }
  const kernels::Backend& backend() const override { return std::as_const(*model_).backend(); }
  kernels::Backend& backend() override { return model_->backend(); }
  kernels::KvLayout kv_layout() const override { return model_->kv_layout(); }
  std::int64_t max_batch_rows() const override { return model_->max_batch_rows(); }
  std::size_t weight_bytes() const override { return model_->weight_bytes(); }
  const Digest& space() const override { return model_->space(); }

  Status Forward(const runtime::ForwardBatch& batch, const kernels::KvPages& pages, float* logits) override {
    std::this_thread::sleep_for(pace_->sleep.load());
    if (batch.gate != nullptr) pace_->gated = true;
    return model_->Forward(batch, pages, logits);
  }

 private:
  const std::unique_ptr<runtime::Model> model_;
  const std::shared_ptr<Pace> pace_;
};

}  // namespace kvshare::testing
