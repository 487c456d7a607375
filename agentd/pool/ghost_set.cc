#include "agentd/pool/ghost_set.h"

#include <algorithm>

#include "kernels/paged_kv.h"

namespace kvshare::agentd {

using kernels::kPageTokens;

void GhostSet::Add(const Digest& parent, const Digest& context, std::size_t tokens) {
  Forget(context);
  const bool partial = tokens < kPageTokens;
  ghosts_[context] = {.parent = parent, .partial = partial, .serial = next_serial_};
  if (partial) ++partial_at_[parent];
  order_.push_back({.context = context, .serial = next_serial_++});
  // Names erased meanwhile still stand in order_, so its length, too, is bounded here.
  while (ghosts_.size() > capacity_ || order_.size() > 2 * capacity_) {
    const Entry oldest = order_.front();
    order_.pop_front();
    const auto it = ghosts_.find(oldest.context);
    if (it != ghosts_.end() && it->second.serial == oldest.serial) Forget(oldest.context);
  }
}

void GhostSet::Erase(const Digest& context) { Forget(context); }

void GhostSet::Forget(const Digest& context) {
  const auto it = ghosts_.find(context);
  if (it == ghosts_.end()) return;
  if (it->second.partial) {
    const auto at = partial_at_.find(it->second.parent);
    if (--at->second == 0) partial_at_.erase(at);
  }
  ghosts_.erase(it);
}

std::size_t GhostSet::Lookup(const Digest& parent, std::span<const TokenId> tokens) const {
  if (ghosts_.empty() || tokens.empty()) return 0;
  std::size_t longest = std::min<std::size_t>(tokens.size(), kPageTokens);
  const std::size_t shortest = partial_at_.contains(parent) ? 1 : kPageTokens;
  for (; longest >= shortest; --longest) {
    if (ghosts_.contains(ChainContext(parent, tokens.first(longest)))) return longest;
  }
  return 0;
}

}  // namespace kvshare::agentd
