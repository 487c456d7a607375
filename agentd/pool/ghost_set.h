// GhostSet: the names of pages that were evicted not long ago, so that a miss can say "evicted" and not "never stored".
// Bounded; the oldest names are forgotten first. One thread.
#pragma once

#include <cstddef>
#include <deque>
#include <span>
#include <unordered_map>

#include "kvshare/types.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

class GhostSet {
 public:
  explicit GhostSet(std::size_t capacity) : capacity_(capacity) {}

  // A page of `tokens` after context `parent`, whose own name is `context`, is gone.
  void Add(const Digest& parent, const Digest& context, std::size_t tokens);
  // It is stored again.
  void Erase(const Digest& context);

  // How many of `tokens`, which follow `parent`, an evicted page held: all of it, or nothing. 0..64.
  // Cost: one digest; up to 64 where partly filled pages were evicted at this place.
  std::size_t Lookup(const Digest& parent, std::span<const TokenId> tokens) const;

  bool empty() const { return ghosts_.empty(); }
  std::size_t size() const { return ghosts_.size(); }

 private:
  struct Ghost {
    Digest parent;
    bool partial = false;
    std::uint64_t serial = 0;  // which entry of order_ is this one's
  };
  struct Entry {
    Digest context;
    std::uint64_t serial = 0;
  };
  void Forget(const Digest& context);

  std::size_t capacity_;
  std::uint64_t next_serial_ = 0;
  std::unordered_map<Digest, Ghost, DigestHash> ghosts_;
  std::unordered_map<Digest, int, DigestHash> partial_at_;  // parent -> ghosts of partly filled pages after it
  std::deque<Entry> order_;                                 // oldest first; may name ghosts erased meanwhile
};

}  // namespace kvshare::agentd
