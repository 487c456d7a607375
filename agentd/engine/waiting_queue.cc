#include "agentd/engine/waiting_queue.h"

#include <algorithm>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {

std::vector<std::size_t> WaitingQueue::Order(std::span<const Prospect> prospects) const {
  KVS_CHECK(prospects.size() <= queue_.size());
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < prospects.size(); ++i) {
    if (!prospects[i].held) order.push_back(i);
  }
  // Stable, so that equals stay in order of arrival. Shares are compared as fractions: a / b > c / d.
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    if (IsDue(a) || IsDue(b)) return IsDue(a) && !IsDue(b);
    return prospects[a].reusable * prospects[b].prompt > prospects[b].reusable * prospects[a].prompt;
  });
  return order;
}

EngineRequest WaitingQueue::Take(std::size_t i, std::span<const Prospect> prospects) {
  KVS_CHECK(i < queue_.size() && i < prospects.size());
  for (std::size_t earlier = 0; earlier < i; ++earlier) {
    if (!prospects[earlier].held) ++queue_[earlier].overtaken;
  }
  EngineRequest request = std::move(queue_[i].request);
  queue_.erase(queue_.begin() + static_cast<std::ptrdiff_t>(i));
  return request;
}

void WaitingQueue::EraseIf(const std::function<bool(const EngineRequest&)>& end) {
  std::erase_if(queue_, [&end](const Waiting& waiting) { return end(waiting.request); });
}

void WaitingQueue::ForEach(const std::function<void(const EngineRequest&)>& visit) const {
  for (const Waiting& waiting : queue_) visit(waiting.request);
}

}  // namespace kvshare::agentd
