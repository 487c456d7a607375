// WatchedModel: a real model that tells when a step begins that does not have all of its KV yet, and that a test can
// hold at the beginning of a step, or let fail there.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "runtime/model.h"

namespace kvshare::testing {

// What the test keeps of a model it gave away; outlives it.
struct StepWatch {
  std::atomic<bool> gated = false;       // a step has begun behind a gate
  std::atomic<bool> fails_once = false;  // the next step fails

  void AwaitGatedStep() const {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (!gated && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    EXPECT_TRUE(gated) << "no step began before its KV was there";
  }

  // The next step waits where it begins, until it is let go.
  void HoldNextStep() {
    const std::lock_guard lock(mutex_);
    holds_ = true;
  }
  void AwaitHeldStep() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [this] { return held_; })) << "no step began";
  }
  void LetGo() {
    const std::lock_guard lock(mutex_);
    holds_ = held_ = false;
    changed_.notify_all();
  }
  void Pass() {
    std::unique_lock lock(mutex_);
    if (!holds_) return;
    held_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !holds_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool holds_ = false, held_ = false;
};

class WatchedModel final : public runtime::Model {
 public:
  // `eos_ids`: what ends its answers; empty: what the model says.
  WatchedModel(std::unique_ptr<runtime::Model> model, std::shared_ptr<StepWatch> watch,
               std::vector<TokenId> eos_ids = {})
      : model_(std::move(model)), watch_(std::move(watch)), config_(model_->config()) {
    if (!eos_ids.empty()) config_.eos_ids = std::move(eos_ids);
  }

  const runtime::ModelConfig& config() const override { return config_; }
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
    watch_->Pass();
    if (watch_->fails_once.exchange(false)) return Internal("as the test asked for");
    return model_->Forward(batch, pages, logits);
  }

 private:
  const std::unique_ptr<runtime::Model> model_;
  const std::shared_ptr<StepWatch> watch_;
  runtime::ModelConfig config_;
};

}  // namespace kvshare::testing
