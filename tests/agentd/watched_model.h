// WatchedModel: a real model that tells when a step begins that does not have all of its KV yet.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>

#include "gtest/gtest.h"
#include "runtime/model.h"

namespace kvshare::testing {

// What the test keeps of a model it gave away; outlives it.
struct StepWatch {
  std::atomic<bool> gated = false;  // a step has begun behind a gate

  void AwaitGatedStep() const {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!gated && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    EXPECT_TRUE(gated) << "no step began before its KV was there";
  }
};

class WatchedModel final : public runtime::Model {
 public:
  WatchedModel(std::unique_ptr<runtime::Model> model, std::shared_ptr<StepWatch> watch)
      : model_(std::move(model)), watch_(std::move(watch)) {}

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
    if (batch.gate != nullptr) watch_->gated = true;
    return model_->Forward(batch, pages, logits);
  }

 private:
  const std::unique_ptr<runtime::Model> model_;
  const std::shared_ptr<StepWatch> watch_;
};

}  // namespace kvshare::testing
