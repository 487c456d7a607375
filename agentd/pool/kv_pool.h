// KvPool: who holds which page of KV. It counts pins, keeps the prefix index, evicts, and promises pages to running
// sequences; it never touches KV itself, so it knows page numbers only (the memory is PageArena's).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "agentd/pool/eviction_policy.h"
#include "agentd/pool/ghost_set.h"
#include "agentd/pool/prefix_index.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

class KvPool;

// The pages of one running sequence: those it shares and those it writes, and the promise of more. A lease is a handle
// that was promised nothing (KvPool::Lease). Move-only; while it lives none of its pages is evicted. Must not outlive
// its pool; same thread.
class KvHandle {
 public:
  KvHandle() = default;
  KvHandle(KvHandle&&) = default;
  KvHandle& operator=(KvHandle&& other) noexcept;
  ~KvHandle();

  explicit operator bool() const { return state_ != nullptr; }
  // The page table: token t of the sequence lies on pages()[t / 64]. Stays where it is until Extend or Publish.
  std::span<const PageIndex> pages() const { return state_->pages; }
  // Where the first rows of the next page can be copied from; kNoPage if there is nothing to copy. Pinned until
  // ReleaseTail.
  PageIndex tail() const { return state_->tail; }
  int tail_tokens() const { return state_->tail_tokens; }

 private:
  friend class KvPool;
  struct State {
    KvPool* pool = nullptr;
    std::vector<PageIndex> pages;
    PageIndex reserved = 0;   // promised, not yet taken
    std::size_t indexed = 0;  // the first so many pages are in the index
    std::size_t found = 0;    // the first so many came from the index
    PageIndex tail = kNoPage;
    int tail_tokens = 0;
  };
  std::unique_ptr<State> state_;
};

struct PoolUsage {
  PageIndex total = 0;
  PageIndex free = 0;
  PageIndex indexed = 0;   // stored for later
  PageIndex pinned = 0;    // held by running sequences and leases
  PageIndex reserved = 0;  // promised to running sequences
  PageIndex retained = 0;  // kept by PinEntry
  std::int64_t evictions = 0;
  std::int64_t hits = 0;  // pages that requests found, one for each request and page
};

// One stored page, as ForEachEntry shows it. Its views are of that moment.
struct StoredPage {
  PageIndex page = kNoPage;
  PageIndex parent = kNoPage;       // the page before it
  std::int64_t start = 0;           // position of its first token
  std::span<const TokenId> tokens;  // its own, 1..64
  Digest context;                   // its name; see PrefixIndex
  std::uint32_t source = 0;         // as Publish was told
  std::int64_t idle_ms = 0;         // since a request that used it ended; 0 while one runs
  std::int64_t hits = 0;            // requests that found it
  std::uint32_t pins = 0;           // running sequences and leases that hold it
  bool retained = false;            // by PinEntry
};

enum class EntryOrder {
  kRecent,  // last used first
  kHits,    // most often used first
  kTree,    // a page before those that continue it
};

// What PinEntry keeps.
struct PinnedEntry {
  Digest key;               // context of the last page; Unpin takes it
  std::int64_t tokens = 0;  // of the prefix that are kept
};

struct KvPoolOptions {
  std::unique_ptr<EvictionPolicy> policy;  // for as many blocks as the pool has pages; null: the default policy
  // Pages that PinEntry may keep: at most half of the pool. The caller leaves room for one full context beyond it.
  PageIndex max_retained = static_cast<PageIndex>(-1);
  // Where each page's generation is kept too, for readers outside (PageArena::generations); null: nowhere. All zero.
  std::atomic<std::uint64_t>* generations = nullptr;
};

// One thread (the engine's). Invariants (CheckIntegrity holds them):
//   1. Every page is free, indexed, pinned, or indexed and pinned. free + used == total.
//   2. A page's pin count is the number of places in live handles that name it.
//   3. A page is held while it is pinned or retained. Where a page in the index is held, so are all pages before it; so
//      every other indexed page can be evicted, leaves first. The policy lists exactly the leaves that are not held.
//   4. reserved <= free + indexed pages that are not held: a promise can always be kept. That is why Extend cannot
//   fail.
class KvPool {
 public:
  KvPool(PageIndex num_pages, const Digest& root, KvPoolOptions options = {});
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  const PrefixIndex& index() const { return index_; }
  const GhostSet& ghosts() const { return ghosts_; }
  PoolUsage usage() const;
  // One more than the highest page ever handed out. Fresh pages are handed out in ascending order and only when no used
  // page is free, so memory beyond it has not been touched.
  PageIndex high_water() const { return high_water_; }
  const EvictionPolicy& policy() const { return *policy_; }

  // How often `page` stopped holding what it held. Whoever reads a page without a handle (a client that maps the pool)
  // compares it before and after.
  std::uint64_t generation(PageIndex page) const { return pages_[page].generation; }
  std::int64_t hits(PageIndex page) const { return pages_[page].hits; }

  // `observer` is called just before a page is dropped to make room: its tokens, parent, context and source can still
  // be read through index(), its KV still stands. Must not change the pool. One observer; null for none.
  void SetEvictionObserver(std::function<void(PageIndex)> observer) { on_evict_ = std::move(observer); }
  // `observer` is called for every page that leaves the index, for whatever reason, while it can still be read there.
  void SetDropObserver(std::function<void(PageIndex)> observer) { on_drop_ = std::move(observer); }
  // The time that idle_ms is measured by; never goes back. The pool reads no clock of its own.
  void SetTime(std::int64_t now_ms) { now_ms_ = now_ms; }

  // Pins the match and promises what a sequence of `tokens` needs beyond it. `match` must be of this moment.
  // ResourceExhausted when running sequences hold too much; later may help. Then nothing has changed.
  Result<KvHandle> Acquire(const PrefixMatch& match, std::int64_t tokens);
  // Pins the match, its tail too, and promises nothing: for readers. Same rules.
  Result<KvHandle> Lease(const PrefixMatch& match) { return Acquire(match, match.full_tokens()); }
  // The tail has been copied (or is not wanted).
  void ReleaseTail(KvHandle& handle);
  // Takes promised pages until the page table covers `tokens`; evicts where none is free. Requires tokens <= what
  // Acquire was told.
  void Extend(KvHandle& handle, std::int64_t tokens);

  // Pages [begin, end) of the page table, none of which is in the index, become a handle of their own that was promised
  // nothing. `handle` keeps the pages before, loses those after, and what it was promised.
  KvHandle Split(KvHandle& handle, std::size_t begin, std::size_t end);

  // Stores the full pages of `tokens`, the sequence so far; their KV must be complete. The sequence goes on.
  //
  //   pages:  0 ..... indexed ........................ tokens.size() / 64 ...... pages.size()
  //           |-- stored --|-- others stored meanwhile: --|-- not stored yet ---------|
  //           |  already   |   theirs replaces ours, ours |
  //           |            |   is freed; else ours is put  |
  //           |            |   into the index             |
  //
  // Pages whose KV was loaded rather than computed are stored the same way: Extend, load into pages(), Publish the
  // tokens that are there so far, with the source they had. Calls with other sources may follow for the pages after
  // them.
  void Publish(KvHandle& handle, std::span<const TokenId> tokens, std::uint32_t source);
  // Publish, then the partly filled last page too, then gives the handle back.
  void Retire(KvHandle handle, std::span<const TokenId> tokens, std::uint32_t source);

  // Keeps what is stored of `prefix` (its last, partly matching page too) until Unpin: it counts, so as many Unpins as
  // calls. NotFound if nothing of it is stored; ResourceExhausted beyond max_retained, or where a promise to a running
  // sequence needs the pages. Then nothing has changed.
  Result<PinnedEntry> PinEntry(std::span<const TokenId> prefix);
  // NotFound if `key` is not pinned.
  Status Unpin(const Digest& key);

  // Drops every stored page whose sequence, up to its end, begins with `prefix`, and that neither a handle nor PinEntry
  // keeps. Returns how many. The eviction observer is not called.
  PageIndex Evict(std::span<const TokenId> prefix);
  // The same for `page` and all that continues it; kNoPage: everything.
  PageIndex EvictFrom(PageIndex page);
  // EvictFrom(kNoPage).
  void Clear() { EvictFrom(kNoPage); }

  // Shows at most `limit` stored pages. `visit` must not change the pool.
  void ForEachEntry(EntryOrder order, std::size_t limit, const std::function<void(const StoredPage&)>& visit) const;
  // Requires an indexed page.
  StoredPage Describe(PageIndex page) const;
  // Stored pages whose context in hex begins with `hex`, at most `limit`.
  std::vector<PageIndex> FindByKey(std::string_view hex, std::size_t limit = 2) const;

  // Internal naming the first broken invariant, of the pool or its index.
  Status CheckIntegrity() const;

 private:
  friend class KvHandle;
  struct Page {
    std::uint32_t pins = 0;
    std::uint32_t retains = 0;  // pinned entries that reach it; 0 unless indexed
    std::uint32_t depth = 0;    // pages before it; while indexed
    std::uint64_t generation = 0;
    std::uint64_t last_used = 0;  // by clock_
    std::int64_t used_ms = 0;
    std::int64_t hits = 0;

    bool held() const { return pins > 0 || retains > 0; }
  };
  struct Pinned {
    PageIndex last = kNoPage;
    std::int64_t tokens = 0;
    std::uint32_t count = 0;
  };

  PageIndex Evictable() const { return index_.size() - held_indexed_; }
  PageIndex TakePage();
  void FreePage(PageIndex page);
  void EvictOne();
  void RemoveFromIndex(PageIndex page, bool evicted);
  void Supersede(PageIndex old_page, PageIndex new_page, PageIndex parent, std::span<const TokenId> tokens,
                 const Digest& context, std::uint32_t source);
  void InsertIntoIndex(PageIndex page, PageIndex parent, std::span<const TokenId> tokens, const Digest& context,
                       std::uint32_t source);
  void Pin(PageIndex page);
  void Unpin(PageIndex page);
  // `retains` of the page and all before it, up or down by `count`.
  void Retain(PageIndex last, std::uint32_t count);
  void Unretain(PageIndex last, std::uint32_t count);
  void CountHit(PageIndex page);
  void Release(KvHandle::State& state);
  // A request has ended that used or stored these pages, which follow each other; the first `found` were stored before.
  void Touch(std::span<const PageIndex> chain, std::size_t found);
  // Tells the policy, after anything that could make `page` evictable, or no longer so.
  void UpdateEvictable(PageIndex page);
  bool CanBeEvicted(PageIndex page) const;
  Status CheckPins() const;

  PrefixIndex index_;
  GhostSet ghosts_;
  std::unique_ptr<EvictionPolicy> policy_;
  PageIndex max_retained_;
  std::atomic<std::uint64_t>* generations_;
  std::function<void(PageIndex)> on_evict_;
  std::function<void(PageIndex)> on_drop_;
  std::vector<Page> pages_;
  std::vector<PageIndex> free_;  // used before and free now; last in, first out
  PageIndex high_water_ = 0;     // pages from here on were never used
  PageIndex held_indexed_ = 0;
  PageIndex pinned_ = 0;
  PageIndex retained_ = 0;
  PageIndex reserved_ = 0;
  std::uint64_t clock_ = 0;
  std::int64_t now_ms_ = 0;
  std::int64_t evictions_ = 0;
  std::int64_t hits_ = 0;
  std::unordered_map<Digest, Pinned, DigestHash> pinned_entries_;
  std::unordered_set<KvHandle::State*> handles_;  // the live ones
};

}  // namespace kvshare::agentd
