// AnchorStore: the anchors of sessions on disk, so that what a team has taught is there after a restart. A session's
// anchors are found by that session alone. Nothing read from disk is trusted: what is torn, changed, or of another
// model, session or version is left out and counted. docs/formats/anchors.md has the bytes, docs/design/
// anchors-persisted.md the reasons.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "anchors/anchor_pool.h"
#include "anchors/anchor_record.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

struct AnchorStoreOptions {
  std::string directory;       // made when there is something to save; under a cold tier's lock
  std::int64_t max_bytes = 0;  // of all that lies in it
  Digest space;                // Model::space()
  int layers = 0;
  std::int64_t width = 0;  // num_kv_heads * head_dim
};

// Totals since the start, except where a line says "now".
struct AnchorStoreStats {
  std::int64_t bytes = 0;  // now: on disk, other spaces' included
  std::int64_t saved = 0;  // records written
  std::int64_t loaded = 0;
  std::int64_t dropped = 0;                                   // records that quota or disk did not allow
  std::array<std::int64_t, anchors::kAnchorFaults> misses{};  // by AnchorFault: lists and records that were not used
};

// Thread-safe. All I/O happens on a thread of its own, in the order of the calls; only Flush waits for it.
class AnchorStore {
 public:
  explicit AnchorStore(AnchorStoreOptions options);
  // Finishes what was accepted.
  ~AnchorStore();
  AnchorStore(const AnchorStore&) = delete;
  AnchorStore& operator=(const AnchorStore&) = delete;

  // From now on `pool`, a snapshot, is what the session has saved. A snapshot that still waits is replaced. Whatever
  // kills the process, a later Load gives one snapshot that was saved here, or the one before it. Requires a name.
  void Save(const std::string& session, std::vector<anchors::Anchor> pool);
  // `done` gets what the session has saved, oldest first, on the store's thread; it must be short.
  void Load(const std::string& session, std::function<void(std::vector<anchors::Anchor>)> done);
  // Forgets everything, of every session and space.
  void Clear();
  // Returns when everything that was asked for before is done.
  void Flush();

  AnchorStoreStats stats() const;

 private:
  enum class What { kSave, kLoad, kClear };
  struct Job {
    What what = What::kSave;
    std::string session;
    std::vector<anchors::Anchor> pool;
    std::function<void(std::vector<anchors::Anchor>)> done;
  };
  // One session's directory in one space.
  struct Place {
    std::int64_t bytes = 0;
    std::int64_t used_at = 0;  // ns since the epoch
  };

  void Run();
  void Scan();
  anchors::AnchorOwner OwnerOf(const std::string& session) const;
  std::string PathOf(const std::string& session) const;

  void DoSave(const Job& job);
  bool WriteRecord(const std::string& path, const anchors::Anchor& anchor, const anchors::AnchorOwner& owner,
                   anchors::ListedAnchor* listed);
  bool WriteList(const std::string& path, const std::vector<anchors::ListedAnchor>& list,
                 const anchors::AnchorOwner& owner);
  // Deletes what the list does not name, and counts what is left.
  void Sweep(const std::string& path, const std::vector<anchors::ListedAnchor>& list);
  bool EvictOldestBut(const std::string& path);

  std::vector<anchors::Anchor> DoLoad(const std::string& session);
  void DoClear();
  void Miss(anchors::AnchorFault fault);
  void Count(std::int64_t saved, std::int64_t dropped);
  std::int64_t bytes() const;

  const AnchorStoreOptions options_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // jobs_, busy_ or stopping_
  std::deque<Job> jobs_;
  bool busy_ = false;
  bool stopping_ = false;
  AnchorStoreStats stats_;

  // The store's thread's own.
  std::map<std::string, Place> places_;  // by path
  // What a session's list names, as far as it is known to be right, by path.
  std::map<std::string, std::vector<anchors::ListedAnchor>> listed_;

  std::thread thread_;  // last: starts when all else is there
};

}  // namespace kvshare::agentd
