// ColdDirectory: what the cold tier holds, in memory: lookups without I/O, and the order of eviction. It does no I/O
// and knows no threads; the tier locks around it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "agentd/tiers/cold_tier.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

struct DirectoryEntry {
  ColdPage page;
  std::uint64_t slot = 0;
  std::uint64_t generation = 0;
  std::uint64_t last_used = 0;  // the directory's clock; larger is later
  std::int64_t hits = 0;
  std::chrono::steady_clock::time_point used_at;
  int pins = 0;         // loads that read its slot
  bool used = false;    // since it was stored: the protected part of the eviction order
  bool moved = false;   // last_used is not what the index has
  bool is_leaf = true;  // no stored page follows it
};

// Invariants (CheckIntegrity holds them):
//   1. Names are those of the tokens after the parent; no two entries share a slot.
//   2. No page's tokens are a prefix of a sibling's. Siblings are sorted by tokens, so the one that shares most with
//      given tokens is a neighbour of their place.
//   3. Evictable are exactly the unpinned leaves: a page is never evicted before what follows it, which nobody could
//      reach without it.
class ColdDirectory {
 public:
  using Clock = std::chrono::steady_clock;

  const DirectoryEntry* Find(const Digest& context) const;
  ColdTail FindTail(const Digest& parent, std::span<const TokenId> tokens) const;
  // A stored sibling begins with `tokens`, or is equal.
  bool Covers(const Digest& parent, std::span<const TokenId> tokens) const;

  // The clock's next number, for an entry that is on its way here.
  std::uint64_t Tick() { return ++clock_; }
  // Requires a new context whose tokens no sibling covers. `last_used` 0: now. Returns the sibling that the new page
  // makes useless, already removed, if there is one.
  std::unique_ptr<DirectoryEntry> Insert(ColdPage page, std::uint64_t slot, std::uint64_t generation,
                                         std::uint64_t last_used = 0);
  std::unique_ptr<DirectoryEntry> Remove(const Digest& context);
  // Counts a use, if the page is stored. `hit`: it was loaded.
  void Use(const Digest& context, bool hit);
  void Pin(const Digest& context);    // requires an entry
  void Unpin(const Digest& context);  // requires a pinned entry
  // Removes what should go first; null when nothing can.
  //
  // Pages that were used since they were stored are protected: while pages never used make up a tenth of all, the
  // least recent leaf of those goes, so that one long prompt that never returns cannot flush what agents share.
  std::unique_ptr<DirectoryEntry> Evict();
  void Clear();

  // Entries whose last_used the index does not have yet; they count as written then.
  std::vector<const DirectoryEntry*> TakeMoved();

  std::size_t size() const { return entries_.size(); }
  // Most recently used first.
  std::vector<const DirectoryEntry*> ByRecency(std::size_t limit) const;
  void ForEach(const std::function<void(const DirectoryEntry&)>& visit) const;

  Status CheckIntegrity() const;

 private:
  struct TokensLess {
    bool operator()(const DirectoryEntry* a, const DirectoryEntry* b) const { return a->page.tokens < b->page.tokens; }
  };
  using Siblings = std::set<DirectoryEntry*, TokensLess>;
  using Order = std::set<std::pair<std::uint64_t, DirectoryEntry*>>;

  DirectoryEntry* FindMutable(const Digest& context);
  // The siblings before and from the place of `tokens` on; null where there is none.
  std::pair<const DirectoryEntry*, const DirectoryEntry*> Neighbours(const Digest& parent,
                                                                     std::span<const TokenId> tokens) const;
  Order& OrderOf(const DirectoryEntry& entry) { return entry.used ? protected_ : probation_; }
  void LeaveOrder(DirectoryEntry& entry);
  void EnterOrder(DirectoryEntry& entry);  // if it is evictable

  std::unordered_map<Digest, std::unique_ptr<DirectoryEntry>, DigestHash> entries_;
  std::unordered_map<Digest, Siblings, DigestHash> children_;  // by parent's context; never empty sets
  Order probation_, protected_;                                // evictable entries, the least recently used first
  std::size_t used_entries_ = 0;
  std::uint64_t clock_ = 0;
};

}  // namespace kvshare::agentd
