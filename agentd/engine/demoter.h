// Demoter: copies stored pages from memory to the cold tier, soon after they are stored and a few at a time, so that
// neither an eviction nor the end of the process loses them. What could not be copied by then is counted by the tier.
//
// From a device they take two steps: out of it beside the engine's steps, and from there to the tier when somebody
// looks again. A page may be evicted meanwhile: what is written in its place comes after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "agentd/engine/copy_out.h"
#include "agentd/engine/stats_book.h"
#include "agentd/pool/kv_pool.h"
#include "agentd/pool/page_arena.h"
#include "agentd/tiers/cold_tier.h"

namespace kvshare::agentd {

// A session's name, shared by all pages that it stored.
using SessionName = std::shared_ptr<const std::string>;

// The engine's thread. Watches the pool's evictions for as long as it lives; pool, tier, arena and names must outlive
// it.
class Demoter {
 public:
  // `cold` null: remembers and does nothing.
  Demoter(ColdTier* cold, KvPool* pool, const PageArena* arena, const StatsBook* names);
  ~Demoter();
  Demoter(const Demoter&) = delete;
  Demoter& operator=(const Demoter&) = delete;

  // `page` is in the index and was computed here. Pages must be told parents first; telling again is harmless.
  void Computed(PageIndex page, const SessionName& session);
  // `page` is in the index and came from the cold tier, with this content chain.
  void Loaded(PageIndex page, const Digest& content_chain);

  // Hands pages to the tier until `bytes` are copied or it takes no more. True when it took any, or some are newly on
  // their way.
  bool Work(std::size_t bytes);
  // The same for what is on its way, once it has come.
  bool Finish();
  // Why pages are copied between steps although there is a device that could copy beside them. OK otherwise.
  const Status& missing_memory() const { return out_.missing(); }
  // Pages that wait to be copied, and can be.
  std::size_t backlog() const { return unreadable_ ? 0 : backlog_ + out_.pages(); }

  // While true, a page that leaves the pool for another reason than room is copied first, if it still waits.
  void KeepDropped(bool keep) { keep_dropped_ = keep; }
  // What has left memory and is still on its way is not to be stored: somebody wants it forgotten.
  void ForgetEvicted() { out_.ForgetLeft(); }

 private:
  enum class State : std::uint8_t { kUnknown, kWaiting, kOnItsWay, kKept };
  struct Slot {
    State state = State::kUnknown;
    Digest content_chain;
    SessionName session;
  };
  struct Waiting {
    PageIndex page = kNoPage;
    Digest context;  // of the page when it was put here: its number may hold something else by now
  };
  // The next page that waits; kNoPage when none does.
  PageIndex NextWaiting();
  bool CopySome(std::size_t bytes);
  bool Offer();
  // What is begun. Failing, the device has failed.
  bool Begin(std::vector<CopyOut::Outgoing> pages);
  ColdPage RecordOf(PageIndex page) const;
  bool Store(PageIndex page);
  void OnEvict(PageIndex page);
  void OnDrop(PageIndex page);
  void SetState(PageIndex page, State state);

  ColdTier* const cold_;
  KvPool* const pool_;
  const PageArena* const arena_;
  const StatsBook* const names_;
  std::vector<std::byte> copy_;  // of the page that is being stored, where it is neither read in place nor copied out
  bool unreadable_ = false;      // a page could not be read: the device has failed, and none ever will be
  bool keep_dropped_ = false;
  PageIndex evicted_ = kNoPage;  // about to be dropped, for room
  std::vector<Slot> slots_;      // by page
  std::deque<Waiting> queue_;    // oldest first
  std::size_t backlog_ = 0;      // slots in state kWaiting
  CopyOut out_;
};

}  // namespace kvshare::agentd
