// Engine: pages on their way from the cold tier into memory.
#include <algorithm>
#include <utility>

#include "agentd/engine/engine.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {

// `kv` is the promotion's own, or its sequence's.
void Engine::BeginPromotion(std::unique_ptr<Promotion> promotion, KvHandle& kv) {
  const std::uint64_t id = next_promotion_++;
  if (promotion->sequence != nullptr) promotion->sequence->loading = id;
  pool_->Extend(kv, promotion->start + promotion->run.tokens());
  arena_->ExpectUse(pool_->high_water());
  promotion->begun = std::chrono::steady_clock::now();
  const kernels::KvPages& pages = arena_->pages();
  std::vector<PageIndex> places = PlacesOf(promotion->run, promotion->start, kv);
  if (!arena_->in_place()) {
    promotion->detour = std::make_unique<Detour>(std::move(places), arena_, &pinned_);
    ReadOn(id, *promotions_.emplace(id, std::move(promotion)).first->second);
    return;
  }
  std::vector<ColdLoad> loads = LoadsOf(promotion->run, places, pages);
  const std::shared_ptr<LoadProgress> progress = promotion->progress;
  const bool awaited = promotion->sequence != nullptr || promotion->request != 0;
  const bool in_parts = options_.load_in_parts && awaited && gate_.all_parts() > 1;
  promotions_.emplace(id, std::move(promotion));
  PartsReady on_parts;
  if (in_parts) {
    on_parts = [this, progress, all = gate_.all_parts()](int ready) {
      progress->PartsAre(ready);
      if (ready < all) Post([this] { replan_ = true; });  // a step may begin
    };
  }
  StartReads(
      std::move(loads), progress, [this, id] { EndPromotion(id); }, std::move(on_parts));
}

void Engine::StartReads(std::vector<ColdLoad> loads, std::shared_ptr<LoadProgress> progress, std::function<void()> then,
                        PartsReady on_parts) {
  cold_->Load(
      std::move(loads),
      [this, progress = std::move(progress), then = std::move(then)](std::vector<ColdLoaded> loaded) {
        // In this order: once the load has ended for it, the engine waits for nobody here, and may be gone.
        Post(then);
        progress->Ended(std::move(loaded));
      },
      std::move(on_parts));
}

// With a detour: reads on, where there is something left to read and room for it.
void Engine::ReadOn(std::uint64_t id, Promotion& promotion) {
  std::vector<ColdLoad> loads = promotion.detour->NextLoads(promotion.run);
  if (loads.empty()) return;
  promotion.progress = std::make_shared<LoadProgress>();
  StartReads(
      std::move(loads), promotion.progress, [this, id] { SendOn(id); }, nullptr);
}

// With a detour, which ends no sooner: its read is at its end.
void Engine::SendOn(std::uint64_t id) {
  Promotion& promotion = *promotions_.at(id);
  Detour& detour = *promotion.detour;
  detour.SendOn(promotion.progress->AwaitEnd());
  MissKind why = MissKind::kColdUnreadable;
  promotion.whole = detour.all_sent() && CountGood(promotion, detour.sent(), &why) == detour.sent().size();
}

// Looks after what is being copied onto a device: what has come makes room for the next read, or ends its load.
void Engine::FollowCopies() {
  std::vector<std::uint64_t> ended;
  for (const auto& [id, promotion] : promotions_) {
    if (promotion->detour == nullptr) continue;
    promotion->detour->Look();
    ReadOn(id, *promotion);
    if (promotion->detour->all_sent() && !promotion->detour->copying()) ended.push_back(id);
  }
  for (const std::uint64_t id : ended) EndPromotion(id);
}

// Until all of it is read, by what has been until now; nothing while that says nothing.
std::optional<double> Engine::SecondsLeft(const Promotion& promotion) const {
  const int ready = promotion.progress->parts();
  if (ready == 0) return std::nullopt;
  const std::chrono::duration<double> so_far = std::chrono::steady_clock::now() - promotion.begun;
  return so_far.count() / ready * (gate_.all_parts() - ready);
}

// Whether a step of this sequence's next rows may begin although its pages are not all there: when computing takes at
// least as long as what is still to be read, so that the step does not wait (and everybody else with it). Copies onto a
// device are short beside any step, and may be awaited once all that they bring is known to be good.
bool Engine::MayOverlap(const Sequence& sequence, std::int64_t rows) const {
  const Promotion& promotion = *promotions_.at(sequence.loading);
  if (promotion.detour != nullptr) return options_.load_in_parts && promotion.whole;
  const std::optional<double> left = SecondsLeft(promotion);
  const std::int64_t wanted = sequence.prompt_tokens - sequence.plan.stored.tokens();
  return left.has_value() && *left <= costs_.seconds_per_token() * static_cast<double>(std::min(rows, wanted));
}

// What was loaded well is stored, whoever asked for it and whether anybody still does. The load has ended, or is about
// to. Does nothing when this was done already.
void Engine::EndPromotion(std::uint64_t id) {
  const auto found = promotions_.find(id);
  if (found == promotions_.end()) return;
  const std::unique_ptr<Promotion> promotion = std::move(found->second);
  promotions_.erase(found);
  const std::vector<ColdLoaded> loaded =
      promotion->detour != nullptr ? promotion->detour->TakeLoaded() : promotion->progress->AwaitEnd();
  MissKind why = MissKind::kColdUnreadable;
  const std::size_t good = CountGood(*promotion, loaded, &why);
  if (Sequence* const sequence = promotion->sequence; sequence != nullptr) {
    PublishLoaded(*promotion, sequence->kv, std::span(loaded).first(good));
    sequence->loading = 0;
    StoredPrefix stored = std::move(sequence->plan.stored);
    const Declined lost = {.end = stored.tokens(), .why = why};
    if (good < stored.cold.pages.size()) {
      stored.cold.pages.resize(good);
      stored.diverges = false;
    }
    sequence->computed = stored.tokens();
    sequence->published = static_cast<std::size_t>(promotion->start / kPageTokens);
    sequence->plan = planner_.Plan(sequence->request.prompt, sequence->request.reuse, std::move(stored), lost);
    RememberPlan(*sequence);
  } else {
    PublishLoaded(*promotion, promotion->kv, std::span(loaded).first(good));
    promotion->kv = KvHandle();
    // Nothing is evicted between here and what `done` does with it.
    if (promotion->done) promotion->done(OkStatus(), good < loaded.size() ? std::optional(why) : std::nullopt);
  }
  replan_ = true;
  RetryFetches();
  PublishLoad();
}

void Engine::PublishLoaded(const Promotion& promotion, KvHandle& kv, std::span<const ColdLoaded> good) {
  auto end = static_cast<std::size_t>(promotion.start);
  for (std::size_t i = 0; i < good.size(); ++i) {
    const ColdPage& page = good[i].page;
    // A request's last page, where it is not whole, holds what others wrote behind the rows it wants and will be
    // written to: it is not shared. Without a request, the page is stored as it is, with its own tokens.
    if (page.tokens.size() != static_cast<std::size_t>(promotion.run.pages[i].tokens) &&
        promotion.sequence != nullptr) {
      return;
    }
    std::vector<TokenId> tokens(promotion.tokens.begin(), promotion.tokens.begin() + static_cast<std::ptrdiff_t>(end));
    tokens.insert(tokens.end(), page.tokens.begin(), page.tokens.end());
    end = tokens.size();
    const AgentId source = promotion.run.pages[i].source;
    if (page.tokens.size() == kPageTokens) {
      pool_->Publish(kv, tokens, source);
      demoter_.Loaded(kv.pages()[end / kPageTokens - 1], page.content_chain);
    } else if (promotion.sequence == nullptr) {
      const PageIndex last = kv.pages()[end / kPageTokens];
      pool_->Retire(std::move(kv), tokens, source);
      if (pool_->index().Contains(last)) demoter_.Loaded(last, page.content_chain);
    }
  }
}

void Engine::Fetch(Wish wish) {
  if (!StartFetch(wish)) fetches_.push_back(std::move(wish));
}

void Engine::RetryFetches() {
  for (Wish& wish : std::exchange(fetches_, {})) Fetch(std::move(wish));
}

// False when the same pages are on their way already: then a promotion's end is to be waited for.
bool Engine::StartFetch(Wish& wish) {
  std::vector<TokenId>& tokens = wish.tokens;
  FetchDone& done = wish.done;
  StoredPrefix stored = cold_ == nullptr ? StoredPrefix{} : planner_.Find(tokens);
  if (stored.cold.pages.empty()) {
    done(OkStatus(), std::nullopt);
    return true;
  }
  const std::int64_t start = stored.host.full_tokens();
  for (const auto& [id, other] : promotions_) {
    const auto end = static_cast<std::size_t>(std::min(start + kPageTokens, other->start + other->run.tokens()));
    if (end <= static_cast<std::size_t>(start) || end > tokens.size()) continue;
    if (std::equal(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(end), other->tokens.begin())) {
      return false;
    }
  }
  Result<KvHandle> kv = pool_->Acquire(stored.host, start + stored.cold.tokens());
  if (!kv.ok()) {
    done(OkStatus(), MissKind::kPoolFull);
    return true;
  }
  auto promotion = std::make_unique<Promotion>();
  promotion->tokens = std::move(tokens);
  promotion->start = start;
  promotion->run = std::move(stored.cold);
  promotion->kv = std::move(*kv);
  promotion->done = std::move(done);
  promotion->request = wish.request;
  KvHandle& own = promotion->kv;
  BeginPromotion(std::move(promotion), own);
  return true;
}

}  // namespace kvshare::agentd
