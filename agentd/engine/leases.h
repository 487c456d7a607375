// LeaseBook: stored KV that stays in memory because somebody outside holds it: leases, which have a number and end by a
// deadline, and pins, which have a name and may end by one.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>

#include "agentd/engine/sequence.h"
#include "agentd/pool/kv_pool.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

struct LeaseLimits {
  std::int64_t max_leases = 0;
  std::int64_t max_pins = 0;
  PageIndex max_pages = 0;  // that leases and pins may hold, all together: the rest is for one full context at least
};

// The engine's thread. Must not outlive the pool.
class LeaseBook {
 public:
  LeaseBook(KvPool* pool, const LeaseLimits& limits) : pool_(pool), limits_(limits) {}

  struct Leased {
    std::uint64_t id = 0;
    const KvHandle* kv = nullptr;  // until the lease ends
  };
  // `match` must be of this moment. ResourceExhausted, naming the limit.
  Result<Leased> Lease(const PrefixMatch& match, SteadyTime deadline);
  bool Release(std::uint64_t id);  // false: not held

  // Pins what memory has of `prefix`; absent deadline: until Unpin. What is pinned already gets the new deadline.
  // NotFound when memory has nothing of it, ResourceExhausted.
  Result<PinnedEntry> Pin(std::span<const TokenId> prefix, std::optional<SteadyTime> deadline);
  bool Unpin(const Digest& key);  // false: not held
  // The pin whose name in hex begins with `hex`, if there is exactly one.
  std::optional<Digest> FindPin(std::string_view hex) const;

  // Ends what has passed its deadline. True when something has.
  bool Expire(SteadyTime now);
  // The first deadline of all, if there is any.
  std::optional<SteadyTime> NextDeadline() const;

  std::int64_t leases() const { return static_cast<std::int64_t>(leases_.size()); }

 private:
  struct Held {
    KvHandle kv;
    SteadyTime deadline;
  };
  void Count(const KvHandle& kv, int change);
  Status CheckPages(std::int64_t more) const;

  KvPool* const pool_;
  const LeaseLimits limits_;
  std::uint64_t next_id_ = 1;
  std::map<std::uint64_t, Held> leases_;
  std::map<Digest, std::optional<SteadyTime>> pins_;
  std::unordered_map<PageIndex, int> leased_pages_;  // page -> leases that hold it
};

}  // namespace kvshare::agentd
