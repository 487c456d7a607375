// ColdTier: pages of KV on disk, found again after eviction from memory, restart and crash.
//
// Payloads lie in slots of pre-allocated slab files, an index in RocksDB says which slot holds what, and a directory in
// memory answers every lookup without I/O. Nothing read from disk is trusted: a record must be the one that the index
// means, and its checksums must hold, or it is dropped and counted. docs/formats/cold-tier.md has the bytes,
// docs/design/cold-tier.md the reasons.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

struct ColdTierOptions {
  std::string directory;       // created if absent; one process at a time
  std::int64_t max_bytes = 0;  // quota of everything under `directory`: slabs, indexes, other spaces
  Digest space;                // what makes KV comparable; KV of other spaces in `directory` is never served
  std::size_t page_bytes = 0;  // of one page of KV, 1..256 MiB
  int read_threads = 3;        // while one checks what it read, two keep the disk busy
  int write_threads = 3;
  std::int64_t staging_bytes = 64 << 20;  // memory for pages on their way to disk; at least two per writing thread
  std::int64_t scrub_bytes_per_second = 16 << 20;  // background verification while nothing else happens; 0: none
  std::chrono::milliseconds recency_period = std::chrono::minutes(1);  // how often the index learns what was used
};

// What is stored with a page's KV, and given back with it.
struct ColdPage {
  Digest parent;                // context before the page (the root context for the first)
  Digest context;               // ChainContext(parent, tokens): the page's name
  std::vector<TokenId> tokens;  // 1..64; fewer than 64 only on the last page of a run
  Digest content_chain;         // ContentChain over all tokens up to the page's end; zero: not known
  std::int64_t start = 0;       // position of the page's first token
  std::string source;           // the agent whose request computed it; 128 bytes are kept, whole characters
  std::string session;          // its session; likewise
};

// The name of a token sequence in no particular space: ContentChain(ContentChainRoot(), first page) and so on. It lets
// a miss be explained by KV that another space holds, and is never used to find KV.
Digest ContentChainRoot();
inline Digest ContentChain(const Digest& before, std::span<const TokenId> page) { return ChainContext(before, page); }

struct ColdTail {
  Digest context;  // a page after the parent asked for; meaningful when tokens > 0
  int tokens = 0;  // how many leading tokens agree; 0: none
};

struct ColdLoad {
  Digest context;
  std::span<std::byte> destination;  // page_bytes; valid until `done`. Aligned to 4096, it is read into without a copy
};

struct ColdLoaded {
  // OK; NotFound: not stored (any more); DataLoss: damaged, and now dropped; Unavailable: the disk failed to read.
  // Unless OK, the destination's content is undefined.
  Status status;
  ColdPage page;  // as stored, when OK: the caller compares parent and tokens with what it wants, in full
};

// Called on a thread of the tier; must be short, and may call the tier, but not Flush, Scrub or Clear.
// All that was asked for, in order.
using LoadDone = std::function<void(std::vector<ColdLoaded>)>;
// The first so many parts of every page are in place and verified; a page's parts lie side by side
// (docs/formats/cold-tier.md). Not called in order; the largest number counts. Not called any more after a failure.
using PartsReady = std::function<void(int parts)>;

// Totals since Open, except where a line says "now".
struct ColdTierStats {
  std::int64_t entries = 0;           // now: that can be loaded
  std::int64_t bytes = 0;             // now: slots of these entries
  std::int64_t disk_bytes = 0;        // now: everything under the directory, as allocated
  std::int64_t capacity_bytes = 0;    // max_bytes
  std::int64_t pending = 0;           // now: accepted by Store, not published yet
  std::int64_t hits = 0;              // pages loaded
  std::int64_t misses = 0;            // pages whose load failed, for whatever reason
  std::int64_t integrity_errors = 0;  // records and index entries that were damaged, and dropped
  std::int64_t index_rebuilds = 0;    // times a damaged index was moved aside and made anew from the slabs
  std::int64_t stores = 0;            // pages written and published
  std::int64_t dropped = 0;           // pages that Store refused, or that could not be written
  std::int64_t evictions = 0;
  std::int64_t read_bytes = 0;  // payload
  std::int64_t written_bytes = 0;
  double read_bytes_per_second = 0;  // now: moving average over recent loads, queueing included; 0: none yet
  std::string degraded;              // now: why nothing is stored at present; empty: all is well
};

struct ColdEntry {
  ColdPage page;
  std::int64_t bytes = 0;
  std::int64_t hits = 0;     // loads since Open
  std::int64_t idle_ms = 0;  // since stored, loaded or touched (or Open, whichever was last)
};

struct ScrubReport {
  std::int64_t checked = 0;
  std::int64_t damaged = 0;  // dropped, and counted as integrity errors
  std::int64_t bytes = 0;
};

// Thread-safe. Only Open, Flush, Scrub, Clear and the destructor wait for the disk.
class ColdTier {
 public:
  // Opens or creates the tier. Cached data never keeps it from opening: what is damaged is dropped and counted.
  // Returns: FailedPrecondition naming the directory when another process has it, InvalidArgument when the directory
  // cannot be used or the quota holds less than a few pages, Unavailable when the disk fails or is so full that not
  // even an index can be opened (serve without a cold tier then).
  static Result<std::unique_ptr<ColdTier>> Open(const ColdTierOptions& options);
  // The least max_bytes that Open takes.
  static std::int64_t LeastBytes(std::size_t page_bytes);
  // Finishes accepted stores and loads (their `done` is called) first.
  virtual ~ColdTier() = default;

  // The page can be loaded now.
  virtual bool Contains(const Digest& context) const = 0;
  // The stored page after `parent` that shares most leading tokens with `tokens` (1..64 are looked at). A page whose
  // tokens another one begins with is not kept beside it: the longer one serves both.
  virtual ColdTail FindTail(const Digest& parent, std::span<const TokenId> tokens) const = 0;
  // What is known of a stored page, as `Load` would give it. NotFound.
  virtual Result<ColdEntry> Find(const Digest& context) const = 0;

  // Takes a copy of `kv` (page_bytes) and publishes it soon after. True without a copy when the page, or a longer one
  // that begins with it, is stored or on its way. False, and counted, when it cannot be taken now: staging is busy, the
  // tier is degraded, or nothing can be evicted.
  // Requires page.context == ChainContext(page.parent, page.tokens) and 1..64 tokens.
  virtual bool Store(const ColdPage& page, std::span<const std::byte> kv) = 0;
  // Whether Store would probably take a page at this moment.
  virtual bool CanStore() const = 0;

  // Reads pages. They count as used; what is being loaded is not evicted. With `on_parts`, the first parts of all pages
  // are read before the second ones, and so on; without it, pages are read whole, which disks like better.
  virtual void Load(std::vector<ColdLoad> pages, LoadDone done, PartsReady on_parts) = 0;
  void Load(std::vector<ColdLoad> pages, LoadDone done) { Load(std::move(pages), std::move(done), nullptr); }
  // How many parts hold the first `bytes` of a page; all of them for page_bytes.
  virtual int PartsFor(std::size_t bytes) const = 0;
  // How long loading `pages` pages would take now, in seconds, from what recent loads took; for load-or-recompute.
  virtual double EstimateLoadSeconds(std::size_t pages) const = 0;

  // The page was used where it lies in memory: keep it longer.
  virtual void Touch(const Digest& context) = 0;
  // Forgets the page at once; its bytes are made unreadable soon after.
  virtual void Remove(const Digest& context) = 0;
  // Forgets everything of this space, and deletes other spaces.
  virtual void Clear() = 0;

  // Waits until all that Store accepted before the call is written, indexed and synced: it survives a crash.
  // ResourceExhausted when some of it, since the last Flush, could not be written.
  virtual Status Flush() = 0;
  // Verifies every record now.
  virtual ScrubReport Scrub() = 0;

  virtual ColdTierStats stats() const = 0;
  // Calls back for at most `limit` entries, the most recently used first, outside of any lock.
  virtual void ForEach(std::int64_t limit, const std::function<void(const ColdEntry&)>& callback) const = 0;
  // Another space in the directory holds KV of exactly these tokens: a miss is then called "space_changed". Found out
  // in the background after Open; false until then.
  virtual bool StoredUnderAnotherSpace(const Digest& content_chain) const = 0;

  // Internal naming the first contradiction between directory, index, slots and counters. Waits for pending stores.
  virtual Status CheckIntegrity() = 0;
};

}  // namespace kvshare::agentd
