// HookedTier: the real cold tier, with a test's hand on it: loads can be held back, pages can be lost, damaged or
// exchanged on the way, stores can be refused, and the estimate of a load's time is what the test says.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agentd/tiers/cold_tier.h"
#include "gtest/gtest.h"
#include "runtime/model.h"

namespace kvshare::testing {

// What the test keeps of a tier it gave away; outlives it.
struct TierHooks {
  // On a thread of the tier; changes what was loaded before the engine sees it.
  std::function<void(std::vector<agentd::ColdLoaded>&)> on_loaded;
  std::optional<std::size_t> lost;  // a page whose last part is damaged, in every load
  std::optional<double> estimate_seconds;
  std::chrono::milliseconds before_load{0};  // that a read takes longer: a slow disk
  std::atomic<bool> refuse_stores = false;
  std::atomic<bool> slow_stores = false;        // what is stored is there once somebody flushes
  std::atomic<int> stores_per_flush = 1 << 30;  // as if it had so few buffers
  std::atomic<int> stored = 0;                  // since the last flush
  std::atomic<int> loads = 0;                   // calls of Load
  std::atomic<std::int64_t> loaded_pages = 0;

  void HoldLoads() {
    const std::lock_guard lock(mutex);
    held = true;
  }
  void ReleaseLoads() {
    const std::lock_guard lock(mutex);
    held = false;
    changed.notify_all();
  }
  void AwaitLoads(int n) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return loads >= n; });
  }
  void AwaitHiding() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return hidings > 0; });
  }

  // While loads are held, what was read last is not there: its place has other bytes. Of page `lost` it never comes.
  void HideLastPart(const std::vector<agentd::ColdLoad>& pages) {
    std::unique_lock lock(mutex);
    if (!held) return;
    std::vector<std::vector<std::byte>> hidden;
    for (const agentd::ColdLoad& page : pages) {
      const auto last = page.destination.last(page.destination.size() / 4);
      hidden.emplace_back(last.begin(), last.end());
      std::fill(last.begin(), last.end(), std::byte{0x5a});
    }
    ++hidings;
    changed.notify_all();
    changed.wait(lock, [&] { return !held; });
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (lost == i) continue;
      const auto last = pages[i].destination.last(hidden[i].size());
      std::copy(hidden[i].begin(), hidden[i].end(), last.begin());
    }
  }

  std::mutex mutex;
  std::condition_variable changed;
  bool held = false;  // these two guarded by mutex
  int hidings = 0;
};

class HookedTier final : public agentd::ColdTier {
 public:
  HookedTier(std::unique_ptr<agentd::ColdTier> tier, std::shared_ptr<TierHooks> hooks)
      : tier_(std::move(tier)), hooks_(std::move(hooks)) {}

  bool Contains(const Digest& context) const override { return tier_->Contains(context); }
  agentd::ColdTail FindTail(const Digest& parent, std::span<const TokenId> tokens) const override {
    return tier_->FindTail(parent, tokens);
  }
  Result<agentd::ColdEntry> Find(const Digest& context) const override { return tier_->Find(context); }
  bool Store(const agentd::ColdPage& page, std::span<const std::byte> kv) override {
    if (Refuses()) return false;
    ++hooks_->stored;
    if (!hooks_->slow_stores) return tier_->Store(page, kv);
    const std::lock_guard lock(hooks_->mutex);
    on_their_way_.emplace_back(page, std::vector<std::byte>(kv.begin(), kv.end()));
    return true;
  }
  bool CanStore() const override { return !Refuses() && tier_->CanStore(); }
  using ColdTier::Load;
  void Load(std::vector<agentd::ColdLoad> pages, agentd::LoadDone done, agentd::PartsReady on_parts) override {
    const auto begun = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() < begun + hooks_->before_load) std::this_thread::yield();
    hooks_->loaded_pages += static_cast<std::int64_t>(pages.size());
    {
      const std::lock_guard lock(hooks_->mutex);
      ++hooks_->loads;
      hooks_->changed.notify_all();
    }
    agentd::PartsReady hooked_parts;
    if (on_parts) {
      const int all = tier_->PartsFor(pages.front().destination.size());
      hooked_parts = [hooks = hooks_, on_parts = std::move(on_parts), all, pages](int ready) {
        if (ready == all) {
          if (all > 1) on_parts(all - 1);  // where it was passed over
          hooks->HideLastPart(pages);
        }
        if (ready < all || !hooks->lost.has_value()) on_parts(ready);
      };
    }
    tier_->Load(
        std::move(pages),
        [hooks = hooks_, done = std::move(done)](std::vector<agentd::ColdLoaded> loaded) {
          {
            std::unique_lock lock(hooks->mutex);
            hooks->changed.wait(lock, [&] { return !hooks->held; });
          }
          if (hooks->on_loaded) hooks->on_loaded(loaded);
          if (hooks->lost.has_value()) loaded[*hooks->lost].status = DataLoss("the test lost it");
          done(std::move(loaded));
        },
        std::move(hooked_parts));
  }
  int PartsFor(std::size_t bytes) const override { return tier_->PartsFor(bytes); }
  double EstimateLoadSeconds(std::size_t pages) const override {
    return hooks_->estimate_seconds.value_or(tier_->EstimateLoadSeconds(pages));
  }
  void Touch(const Digest& context) override { tier_->Touch(context); }
  void Remove(const Digest& context) override { tier_->Remove(context); }
  void Clear() override { tier_->Clear(); }
  Status Flush() override {
    std::vector<std::pair<agentd::ColdPage, std::vector<std::byte>>> pages;
    {
      const std::lock_guard lock(hooks_->mutex);
      pages.swap(on_their_way_);
    }
    for (const auto& [page, kv] : pages) EXPECT_TRUE(tier_->Store(page, kv));
    hooks_->stored = 0;
    return tier_->Flush();
  }
  agentd::ScrubReport Scrub() override { return tier_->Scrub(); }
  agentd::ColdTierStats stats() const override { return tier_->stats(); }
  void ForEach(std::int64_t limit, const std::function<void(const agentd::ColdEntry&)>& callback) const override {
    tier_->ForEach(limit, callback);
  }
  bool StoredUnderAnotherSpace(const Digest& content_chain) const override {
    return tier_->StoredUnderAnotherSpace(content_chain);
  }
  Status CheckIntegrity() override {
    static_cast<void>(Flush());
    return tier_->CheckIntegrity();
  }

 private:
  bool Refuses() const { return hooks_->refuse_stores || hooks_->stored >= hooks_->stores_per_flush; }

  const std::unique_ptr<agentd::ColdTier> tier_;
  const std::shared_ptr<TierHooks> hooks_;
  std::vector<std::pair<agentd::ColdPage, std::vector<std::byte>>> on_their_way_;  // guarded by the hooks' mutex
};

// A tier for this model in `directory`.
inline std::unique_ptr<agentd::ColdTier> OpenHookedTier(const runtime::Model& model, const std::string& directory,
                                                        std::shared_ptr<TierHooks> hooks) {
  agentd::ColdTierOptions options;
  options.directory = directory;
  options.max_bytes = std::int64_t{256} << 20;
  options.space = model.space();
  options.page_bytes = model.kv_layout().page_bytes();
  Result<std::unique_ptr<agentd::ColdTier>> tier = agentd::ColdTier::Open(options);
  EXPECT_TRUE(tier.ok()) << tier.status().message();
  if (!tier.ok()) return nullptr;
  return std::make_unique<HookedTier>(std::move(*tier), std::move(hooks));
}

}  // namespace kvshare::testing
