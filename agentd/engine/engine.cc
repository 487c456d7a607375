#include "agentd/engine/engine.h"

#include <algorithm>
#include <future>
#include <limits>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

// Plans kept for `explain --request`; admission.cc forgets the oldest.
constexpr std::size_t kRememberedPlans = 1024;

// Rows of logits there is room for at start; more companions make it grow once.
constexpr std::int64_t kFirstLogitRows = 16;

// Copied to the cold tier after each step, at least one page: a few milliseconds of a core.
constexpr std::size_t kDemotedBytesPerStep = std::size_t{8} << 20;

// When the cold tier takes no more for the moment, and nothing else is to be done.
constexpr std::chrono::milliseconds kDemotionRetry{5};

// How long a copy onto a device may be over before somebody looks, when nothing else is to be done: it takes a few
// times as long, and a step need not wait for it.
constexpr std::chrono::microseconds kCopyPoll{200};

// Agents ask again within milliseconds of an answer; only when they do not is there time for other things.
constexpr std::chrono::milliseconds kQuiet{50};

// What the guards learn is saved when idle, at most so often.
constexpr std::chrono::seconds kBetweenSaves{10};

// Nothing waits longer than this without looking around.
constexpr std::chrono::hours kLongSleep{1};

}  // namespace

Engine::Engine(runtime::Model* model, KvPool* pool, PageArena* arena, ColdTier* cold, StatsBook* stats,
               const EngineOptions& options)
    : model_(model),
      pool_(pool),
      arena_(arena),
      cold_(cold),
      stats_(stats),
      options_(options),
      planner_(pool, cold, stats),
      demoter_(cold, pool, arena, stats),
      leases_(pool, options.leases),
      costs_(options.seconds_per_token),
      moved_(model, pool, arena->pages(), stats, options.moved,
             [this](std::function<void()> task) { Post(std::move(task)); }),
      healer_(model, pool, arena, HealerEvents()),
      shadow_(
          model, pool, arena, &moved_, [this] { return NoNews(); }, [stats](double kl) { stats->ShadowAudited(kl); }),
      pinned_(cold == nullptr ? nullptr : arena->movers(), model->kv_layout().page_bytes(),
              static_cast<std::size_t>((model->config().max_positions + kPageTokens - 1) / kPageTokens)),
      gate_(cold, model->kv_layout()),
      recall_(cold, stats) {
  KVS_CHECK(options.max_running >= 1 && options.max_waiting >= 1 && options.prefill_chunk_tokens >= 1);
  KVS_CHECK(options.max_running <= model->max_batch_rows());
  GrowLogits(std::min(options.max_running, kFirstLogitRows));  // touched here, not in a request
  PublishLoad();
  thread_ = std::thread([this] { Run(); });
}

Engine::~Engine() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    draining_ = true;
  }
  inbox_changed_.notify_one();
  thread_.join();
}

Result<std::uint64_t> Engine::Submit(EngineRequest request) {
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (!device_lost_.ok()) return device_lost_;
    if (draining_) return Unavailable("the daemon is shutting down and takes no new requests");
    if (waiting_count_ >= options_.max_waiting) {
      return ResourceExhausted("the queue is full: " + std::to_string(waiting_count_) +
                               " requests are waiting; try again later");
    }
    id = request.id = next_id_++;
    arrived_.push_back(std::move(request));
    ++waiting_count_;
    ++outstanding_count_;
  }
  inbox_changed_.notify_one();
  return id;
}

void Engine::Cancel(std::uint64_t request_id) {
  {
    const std::lock_guard lock(mutex_);
    if (outstanding_count_ == 0) return;  // so that cancelling what has ended cannot fill the inbox
    cancelled_.push_back(request_id);
  }
  inbox_changed_.notify_one();
}

void Engine::Post(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  inbox_changed_.notify_one();
}

void Engine::OnEngineThread(const std::function<void()>& task) {
  // Shared: the waiting thread may be gone before set_value has returned.
  const auto done = std::make_shared<std::promise<void>>();
  Post([&task, done] {
    task();
    done->set_value();
  });
  done->get_future().wait();
}

Explanation Engine::Explain(std::span<const TokenId> prompt, ReuseMode mode, bool exact_agent,
                            const std::string* session) {
  Explanation explanation;
  EngineRequest request;
  request.prompt.assign(prompt.begin(), prompt.end());
  request.reuse = mode;
  request.exact_agent = exact_agent;
  request.max_tokens = 1;
  if (session != nullptr) request.session = std::make_shared<const std::string>(*session);
  OnEngineThread([&] {
    StoredPrefix stored = planner_.FindReusable(prompt, mode);
    MovedPlan moved =
        PlanMoved(request, stored, cold_ == nullptr ? Disk::kUnread : Disk::kAsMemory, MissKind::kEvicted);
    if (!moved.plan.has_value()) moved.plan = planner_.Plan(prompt, mode, std::move(stored));
    explanation = ExplanationOf(*moved.plan, *stats_);
  });
  return explanation;
}

Result<Explanation> Engine::ExplainRequest(std::uint64_t request_id) {
  Result<Explanation> result = NotFound("request " + std::to_string(request_id) + " is not among the last " +
                                        std::to_string(kRememberedPlans) + " requests that were started");
  OnEngineThread([&] {
    const auto plan = plans_.find(request_id);
    if (plan != plans_.end()) result = ExplanationOf(plan->second, *stats_);
  });
  return result;
}

AnchorStats Engine::anchor_stats() const {
  AnchorStats stats = moved_.anchors().stats();
  const anchors::AnchorFault fault = moved_.guard_fault();
  if (fault != anchors::AnchorFault::kNone) ++stats.misses[std::string(anchors::AnchorFaultName(fault))];
  return stats;
}

void Engine::RememberPlan(const Sequence& sequence) {
  const bool known = plans_.contains(sequence.request.id);
  plans_[sequence.request.id] = sequence.plan;
  plans_[sequence.request.id].stored = {};  // not asked for, and it names pages
  if (known) return;
  plan_order_.push_back(sequence.request.id);
  if (plan_order_.size() <= kRememberedPlans) return;
  plans_.erase(plan_order_.front());
  plan_order_.pop_front();
}

void Engine::ClearPool() {
  OnEngineThread([&] {
    // These first: what they hold could not be dropped.
    moved_.Clear();
    recall_.Clear();
    healer_.Clear();
    shadow_.Clear();
    pool_->Clear();
    demoter_.ForgetEvicted();
    moved_.anchors().ForgetSaved();
    replan_ = true;
    PublishLoad();
  });
  moved_.anchors().Flush();
  if (cold_ != nullptr) cold_->Clear();
}

Status Engine::CheckIntegrity() {
  Status status;
  OnEngineThread([&] { status = pool_->CheckIntegrity(); });
  if (status.ok() && cold_ != nullptr) status = cold_->CheckIntegrity();
  return status;
}

void Engine::Drain() {
  {
    std::unique_lock lock(mutex_);
    draining_ = true;
    all_ended_.wait(lock, [this] { return outstanding_count_ == 0; });
  }
  moved_.anchors().Flush();  // first what is still being read back: it is saved with the rest
  OnEngineThread([&] {
    moved_.anchors().Save();
    moved_.SaveGuards();
  });
  moved_.anchors().Flush();
  DemoteAll();
}

std::vector<std::string> Engine::Warnings() const {
  std::vector<std::string> warnings;
  const auto slow = [&warnings](const Status& missing, const std::string& what) {
    if (!missing.ok()) warnings.push_back(what + " between two steps, not beside them: " + missing.message());
  };
  slow(pinned_.missing(), "what the cold tier has is copied onto the device");
  slow(demoter_.missing_memory(), "what the cold tier is to keep is copied out of the device");
  return warnings;
}

// Flush waits until what the tier has taken is on disk; then it has room for more. It may have none for other reasons
// (a full disk): then what is left stays as it is.
void Engine::DemoteAll() {
  if (cold_ == nullptr) return;
  std::size_t left = std::numeric_limits<std::size_t>::max(), before = 0;
  do {
    before = left;
    OnEngineThread([&] {
      while (demoter_.Work(kDemotedBytesPerStep) || demoter_.Finish()) {
      }
      left = demoter_.backlog();
    });
    static_cast<void>(cold_->Flush());  // what could not be written, the tier counts
  } while (left > 0 && left < before);
}

void Engine::Run() {
  while (Step()) {
  }
  Stop();
}

void Engine::FailAll(const Status& status) {
  for (const auto& sequence : running_) {
    if (!sequence->ended) Fail(*sequence, status);
  }
  DropEnded();
  std::vector<EngineRequest> arrived;
  {
    const std::lock_guard lock(mutex_);
    arrived.swap(arrived_);
  }
  for (EngineRequest& request : arrived) waiting_.Push(std::move(request));
  waiting_.EraseIf([&](const EngineRequest& request) {
    FailWaiting(request, status);
    return true;
  });
}

bool Engine::DeviceIsLost() {
  if (arena_->in_place()) return false;
  if (!device_lost_.ok()) return true;
  const Status failed = model_->backend().Sync();
  if (failed.ok()) return false;
  const Status lost = Unavailable("the device has failed, and " + options_.after_device_loss + ": " + failed.message());
  {
    const std::lock_guard lock(mutex_);
    device_lost_ = lost;  // so nobody is told later than FailAll tells
  }
  FailAll(lost);
  if (options_.on_device_lost) options_.on_device_lost(lost);
  return true;
}

// Ends everything; returns when the tier has nothing of ours in its hands any more.
void Engine::Stop() {
  const Status stopped = Unavailable("the daemon stopped before this request was done");
  while (true) {
    FailAll(stopped);
    for (const Wish& wish : std::exchange(fetches_, {})) wish.done(stopped, std::nullopt);
    FollowCopies();  // the last step may have left it at what tasks brought
    std::vector<std::function<void()>> tasks;
    {
      std::unique_lock lock(mutex_);
      inbox_changed_.wait_until(lock, NextCopy(), [this] { return promotions_.empty() || !tasks_.empty(); });
      tasks.swap(tasks_);
    }
    if (tasks.empty() && promotions_.empty()) return;
    for (const auto& task : tasks) task();
  }
}

bool Engine::Step() {
  if (!Receive()) return false;
  FollowCopies();
  Plan();
  ComputeMoved();
  if (!work_.empty()) {
    Materialize();
    const SteadyTime begin = std::chrono::steady_clock::now();
    const Status forward = Forward();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::int64_t rows = 0, prefill_rows = 0;
    for (const Work& work : work_) {
      rows += work.count;
      if (work.sequence->prefilling()) prefill_rows += work.count;
    }
    if (forward.ok()) costs_.Measured(prefill_rows, rows, seconds - gate_.waited_seconds());
    if (forward.ok() || !DeviceIsLost()) Commit(forward);
  }
  const bool demoted = demoter_.Work(kDemotedBytesPerStep);
  bool idle_work = false;
  if (!work_.empty()) {
    last_work_ = std::chrono::steady_clock::now();
  } else if (std::chrono::steady_clock::now() >= last_work_ + kQuiet) {
    idle_work = WorkWhileIdle();
  }
  DeviceIsLost();  // whoever met it
  may_sleep_ = work_.empty() && !demoted && !replan_ && !idle_work;
  return true;
}

bool Engine::WorkWhileIdle() {
  const bool worked = healer_.idle() ? shadow_.Work() : healer_.Work();
  if (worked) PublishLoad();
  if (const SteadyTime now = std::chrono::steady_clock::now(); now >= guards_saved_ + kBetweenSaves) {
    moved_.SaveGuards();
    guards_saved_ = now;
  }
  return worked;
}

bool Engine::NoNews() {
  const std::lock_guard lock(mutex_);
  return arrived_.empty() && cancelled_.empty() && tasks_.empty() && !stopping_;
}

// Takes what other threads left in the inbox; sleeps when there is nothing to compute and nothing to copy.
bool Engine::Receive() {
  std::vector<EngineRequest> arrived;
  std::vector<std::uint64_t> cancelled;
  std::vector<std::function<void()>> tasks;
  bool stopping = false;
  {
    const auto has_news = [this] { return !arrived_.empty() || !cancelled_.empty() || !tasks_.empty() || stopping_; };
    const SteadyTime wake_up = may_sleep_ ? NextWakeUp() : SteadyTime{};
    std::unique_lock lock(mutex_);
    if (may_sleep_) inbox_changed_.wait_until(lock, wake_up, has_news);
    arrived.swap(arrived_);
    cancelled.swap(cancelled_);
    tasks.swap(tasks_);
    stopping = stopping_;
  }
  const SteadyTime now = std::chrono::steady_clock::now();
  pool_->SetTime(std::chrono::duration_cast<std::chrono::milliseconds>(now - start_).count());
  if (!arrived.empty() || !cancelled.empty()) replan_ = true;
  for (EngineRequest& request : arrived) waiting_.Push(std::move(request));
  EndLateAndCancelled(cancelled);
  if (leases_.Expire(now)) {
    replan_ = true;
    PublishLoad();
  }
  for (const auto& task : tasks) task();
  return !stopping;
}

// When copies onto a device are to be looked after.
SteadyTime Engine::NextCopy() const {
  const bool copying = std::any_of(promotions_.begin(), promotions_.end(), [](const auto& entry) {
    return entry.second->detour && entry.second->detour->copying();
  });
  return std::chrono::steady_clock::now() +
         (copying ? SteadyTime::duration(kCopyPoll) : SteadyTime::duration(kLongSleep));
}

SteadyTime Engine::NextWakeUp() const {
  const SteadyTime now = std::chrono::steady_clock::now();
  SteadyTime next = NextCopy();
  if (demoter_.backlog() > 0) next = std::min(next, now + kDemotionRetry);
  if (!healer_.idle() || !shadow_.idle()) next = std::min(next, last_work_ + kQuiet);
  if (moved_.guards_to_save()) next = std::min(next, std::max(guards_saved_ + kBetweenSaves, last_work_ + kQuiet));
  if (const auto deadline = leases_.NextDeadline(); deadline.has_value()) next = std::min(next, *deadline);
  for (const auto& sequence : running_) next = std::min(next, sequence->request.deadline);
  waiting_.ForEach([&next](const EngineRequest& request) { next = std::min(next, request.deadline); });
  return next;
}

void Engine::EndLateAndCancelled(const std::vector<std::uint64_t>& cancelled) {
  const SteadyTime now = std::chrono::steady_clock::now();
  const auto verdict = [&](const EngineRequest& request) -> Status {
    if (std::find(cancelled.begin(), cancelled.end(), request.id) != cancelled.end()) {
      return Cancelled("the request was cancelled");
    }
    if (now >= request.deadline) return DeadlineExceeded("the request's timeout passed before it was done");
    return OkStatus();
  };
  for (const auto& sequence : running_) {
    if (const Status status = verdict(sequence->request); !status.ok()) Fail(*sequence, status);
  }
  DropEnded();
  waiting_.EraseIf([&](const EngineRequest& request) {
    const Status status = verdict(request);
    if (!status.ok()) FailWaiting(request, status);
    return !status.ok();
  });
}

// Makes real what was planned: page tables long enough for this step's rows, and private copies of partly matching
// pages.
void Engine::Materialize() {
  for (const Work& work : work_) {
    if (work.sequence->moved.prompt != nullptr) continue;  // has all its pages from the start
    KvHandle& kv = work.sequence->kv;
    pool_->Extend(kv, work.begin + work.count);
    if (kv.tail() == kNoPage) continue;
    model_->backend().CopyPageRows(arena_->pages(), kv.tail(), kv.pages()[work.sequence->plan.stored.host.pages.size()],
                                   kv.tail_tokens());
    pool_->ReleaseTail(kv);
  }
  arena_->ExpectUse(pool_->high_water());
}

Status Engine::Forward() {
  BuildBatch(work_, &batch_);
  gate_.Clear();
  for (const Work& work : work_) {
    if (work.sequence->loading == 0) continue;
    const Promotion& promotion = *promotions_.at(work.sequence->loading);
    if (promotion.detour != nullptr) {
      gate_.Add(promotion.detour.get());
    } else {
      gate_.Add(promotion.progress);
    }
  }
  batch_.gate = gate_.empty() ? nullptr : &gate_;
  GrowLogits(static_cast<std::int64_t>(batch_.logit_rows.size()));
  return model_->Forward(batch_, arena_->pages(), batch_.logit_rows.empty() ? nullptr : logits_.data());
}

void Engine::GrowLogits(std::int64_t rows) {
  const auto needed = static_cast<std::size_t>(rows * model_->config().vocab_size);
  if (logits_.size() < needed) logits_.resize(needed);
}

}  // namespace kvshare::agentd
