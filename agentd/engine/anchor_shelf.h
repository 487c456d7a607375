// AnchorShelf: KVCOMM's anchors, one pool for each session that asked in mode kvcomm. They are made of a session's KV
// and so are the session's own. Pools that are not in memory are on disk, where there is a cold directory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "agentd/tiers/anchor_store.h"
#include "anchors/anchor_pool.h"
#include "kvshare/types.h"

namespace kvshare::agentd {

// The engine's thread, but for what says otherwise.
class AnchorShelf {
 public:
  using Post = std::function<void(std::function<void()>)>;

  // `store` null: pools are in memory alone. All of them together take `max_bytes` there. `post` has a function run on
  // the engine's thread; it is called from others, until the shelf is destroyed.
  AnchorShelf(std::unique_ptr<AnchorStore> store, std::int64_t disk_capacity_bytes, std::int64_t max_bytes, Post post)
      : post_(std::move(post)),
        disk_capacity_bytes_(disk_capacity_bytes),
        max_bytes_(static_cast<std::size_t>(max_bytes)),
        store_(std::move(store)) {}

  // The session's pool. The first call begins to read back what the session has saved: it is in the pool soon after.
  std::shared_ptr<anchors::AnchorPool> Of(const std::string& session);
  // The session's pool may have been taught something: it is saved.
  void Taught(const std::string& session);

  // Hands everything to the store that it does not have.
  void Save();
  // Forgets what is in memory, saved before; what runs keeps its pool.
  void Clear();
  // Forgets what is saved, soon.
  void ForgetSaved();
  // Any thread: returns when all that was handed to the store is done, and what was read is with the engine's thread.
  void Flush();

  AnchorStats stats() const;  // any thread

  static constexpr std::size_t kMaxSessions = 64;

 private:
  struct Shelved {
    std::string session;
    std::shared_ptr<anchors::AnchorPool> pool;
    std::uint64_t loading = 0;  // which load is under way; 0: none
    std::uint64_t saved = 0;    // the pool's version that the store has
  };

  Shelved* Find(const std::string& session);
  void Loaded(const std::string& session, std::uint64_t load, std::vector<anchors::Anchor> saved);
  void SaveOne(Shelved& shelved);
  void KeepWithinLimits();

  const Post post_;
  const std::int64_t disk_capacity_bytes_;
  const std::size_t max_bytes_;
  std::list<Shelved> shelved_;  // most recently used first
  std::uint64_t next_load_ = 1;
  std::atomic<std::int64_t> bytes_{0};
  std::atomic<std::int64_t> loaded_{0};       // anchors that came back to their pool
  const std::unique_ptr<AnchorStore> store_;  // last: its thread ends first
};

}  // namespace kvshare::agentd
