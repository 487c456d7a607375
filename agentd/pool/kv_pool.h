// KvPool: who holds which page of KV. It counts pins, keeps the prefix index, evicts, and promises pages to running
// sequences; it never touches KV itself, so it knows page numbers only (the memory is PageArena's).
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <unordered_set>
#include <utility>
#include <vector>

#include "agentd/pool/ghost_set.h"
#include "agentd/pool/prefix_index.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

class KvPool;

// The pages of one running sequence: those it shares and those it writes, and the promise of more. Move-only; while it
// lives none of its pages is evicted. Must not outlive its pool; same thread.
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
    PageIndex tail = kNoPage;
    int tail_tokens = 0;
  };
  std::unique_ptr<State> state_;
};

struct PoolUsage {
  PageIndex total = 0;
  PageIndex free = 0;
  PageIndex indexed = 0;   // stored for later
  PageIndex pinned = 0;    // held by running sequences
  PageIndex reserved = 0;  // promised to them
  std::int64_t evictions = 0;
};

// One thread (the engine's). Invariants (CheckIntegrity holds them):
//   1. Every page is free, indexed, pinned, or indexed and pinned. free + used == total.
//   2. A page's pin count is the number of places in live handles that name it.
//   3. Where a page in the index is pinned, so are all pages before it; so every unpinned indexed page can be evicted,
//      leaves first.
//   4. reserved <= free + unpinned indexed pages: a promise can always be kept. That is why Extend cannot fail.
class KvPool {
 public:
  KvPool(PageIndex num_pages, const Digest& root);
  ~KvPool();
  KvPool(const KvPool&) = delete;
  KvPool& operator=(const KvPool&) = delete;

  const PrefixIndex& index() const { return index_; }
  const GhostSet& ghosts() const { return ghosts_; }
  PoolUsage usage() const;
  // One more than the highest page ever handed out. Fresh pages are handed out in ascending order and only when no used
  // page is free, so memory beyond it has not been touched.
  PageIndex high_water() const { return high_water_; }

  // Pins the match and promises what a sequence of `tokens` needs beyond it. `match` must be of this moment.
  // ResourceExhausted when running sequences hold too much; later may help. Then nothing has changed.
  Result<KvHandle> Acquire(const PrefixMatch& match, std::int64_t tokens);
  // The tail has been copied (or is not wanted).
  void ReleaseTail(KvHandle& handle);
  // Takes promised pages until the page table covers `tokens`; evicts where none is free. Requires tokens <= what
  // Acquire was told.
  void Extend(KvHandle& handle, std::int64_t tokens);

  // Stores the full pages of `tokens`, the sequence so far; their KV must be complete. The sequence goes on.
  //
  //   pages:  0 ..... indexed ........................ tokens.size() / 64 ...... pages.size()
  //           |-- stored --|-- others stored meanwhile: --|-- not stored yet ---------|
  //           |  already   |   theirs replaces ours, ours |
  //           |            |   is freed; else ours is put  |
  //           |            |   into the index             |
  void Publish(KvHandle& handle, std::span<const TokenId> tokens, std::uint32_t source);
  // Publish, then the partly filled last page too, then gives the handle back.
  void Retire(KvHandle handle, std::span<const TokenId> tokens, std::uint32_t source);

  // Forgets every stored page that no handle pins.
  void Clear();

  // Internal naming the first broken invariant, of the pool or its index.
  Status CheckIntegrity() const;

 private:
  friend class KvHandle;
  struct Page {
    std::uint32_t pins = 0;
    std::uint64_t last_used = 0;
  };

  PageIndex Evictable() const { return index_.size() - pinned_indexed_; }
  PageIndex TakePage();
  void FreePage(PageIndex page);
  void EvictOldest();
  void RemoveFromIndex(PageIndex page);
  void InsertIntoIndex(PageIndex page, PageIndex parent, std::span<const TokenId> tokens, const Digest& context,
                       std::uint32_t source);
  void Pin(PageIndex page);
  void Unpin(PageIndex page);
  void Release(KvHandle::State& state);
  // Keeps leaves_ true after anything that could make `page` evictable, or no longer so.
  void UpdateLeaf(PageIndex page);
  void Touch(PageIndex page);

  PrefixIndex index_;
  GhostSet ghosts_;
  std::vector<Page> pages_;
  std::vector<PageIndex> free_;  // used before and free now; last in, first out
  PageIndex high_water_ = 0;     // pages from here on were never used
  PageIndex pinned_indexed_ = 0;
  PageIndex pinned_ = 0;
  PageIndex reserved_ = 0;
  std::uint64_t clock_ = 0;
  std::int64_t evictions_ = 0;
  std::set<std::pair<std::uint64_t, PageIndex>> leaves_;  // unpinned leaves of the index, least recently used first
  std::unordered_set<KvHandle::State*> handles_;          // the live ones
};

}  // namespace kvshare::agentd
