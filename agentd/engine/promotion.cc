#include "agentd/engine/promotion.h"

#include <algorithm>
#include <chrono>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

MissKind ReasonOf(const Status& status) {
  switch (status.code()) {
    case StatusCode::kNotFound: return MissKind::kColdEvicted;
    case StatusCode::kDataLoss: return MissKind::kColdDamaged;
    default: return MissKind::kColdUnreadable;
  }
}

}  // namespace

void LoadProgress::PartsAre(int ready) {
  {
    const std::lock_guard lock(mutex_);
    parts_ = std::max(parts_, ready);
  }
  changed_.notify_all();
}

void LoadProgress::Ended(std::vector<ColdLoaded> loaded) {
  {
    const std::lock_guard lock(mutex_);
    loaded_ = std::move(loaded);
  }
  changed_.notify_all();
}

int LoadProgress::parts() const {
  const std::lock_guard lock(mutex_);
  return parts_;
}

bool LoadProgress::AwaitParts(int parts) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return parts_ >= parts || loaded_.has_value(); });
  return parts_ >= parts ||
         std::all_of(loaded_->begin(), loaded_->end(), [](const ColdLoaded& page) { return page.status.ok(); });
}

std::vector<ColdLoaded> LoadProgress::AwaitEnd() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return loaded_.has_value(); });
  return *std::move(loaded_);
}

LoadGate::LoadGate(const ColdTier* tier, const kernels::KvLayout& layout) {
  if (tier == nullptr) return;
  for (int layer = 0; layer < layout.num_layers; ++layer) {
    const std::size_t end = layer + 1 < layout.num_layers ? layout.slab_offset(layer + 1, 0, 0) : layout.page_bytes();
    parts_.push_back(tier->PartsFor(end));
  }
}

void LoadGate::Clear() {
  loads_.clear();
  detours_.clear();
  waited_seconds_ = 0;
  lost_ = false;
}

void LoadGate::BeforeLayer(int layer) {
  const SteadyTime begin = std::chrono::steady_clock::now();
  for (const auto& load : loads_) lost_ |= !load->AwaitParts(parts_[static_cast<std::size_t>(layer)]);
  for (Detour* const detour : detours_) detour->AwaitLayer(layer);
  waited_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::vector<PageIndex> PlacesOf(const ColdRun& run, std::int64_t start, const KvHandle& kv) {
  const auto places = kv.pages().subspan(static_cast<std::size_t>(start / kPageTokens), run.pages.size());
  return {places.begin(), places.end()};
}

std::vector<ColdLoad> LoadsOf(const ColdRun& run, std::span<const PageIndex> places, const kernels::KvPages& pages) {
  std::vector<ColdLoad> loads;
  loads.reserve(run.pages.size());
  for (std::size_t i = 0; i < run.pages.size(); ++i) {
    std::byte* const destination = pages.slab(places[i], 0, 0, 0);
    loads.push_back(
        {.context = run.pages[i].context, .destination = std::span(destination, pages.layout.page_bytes())});
  }
  return loads;
}

std::size_t CountGood(const Promotion& promotion, std::span<const ColdLoaded> loaded, MissKind* why) {
  KVS_CHECK(loaded.size() == promotion.run.pages.size());
  std::int64_t at = promotion.start;
  for (std::size_t i = 0; i < loaded.size(); ++i) {
    const ColdRun::Page& wanted = promotion.run.pages[i];
    if (!loaded[i].status.ok()) {
      *why = ReasonOf(loaded[i].status);
      return i;
    }
    const ColdPage& page = loaded[i].page;
    const auto tokens =
        std::span(promotion.tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(wanted.tokens));
    const bool same = page.parent == wanted.parent && page.start == at && page.tokens.size() <= kPageTokens &&
                      page.tokens.size() >= tokens.size() &&
                      std::equal(tokens.begin(), tokens.end(), page.tokens.begin());
    if (!same) {
      *why = MissKind::kColdDamaged;
      return i;
    }
    at += wanted.tokens;
  }
  return loaded.size();
}

}  // namespace kvshare::agentd
