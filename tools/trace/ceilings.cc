#include "tools/trace/ceilings.h"

#include <algorithm>
#include <limits>
#include <list>
#include <queue>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "tools/trace/prefix_tree.h"

namespace kvshare::trace {
namespace {

using PageId = std::uint32_t;
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// A request as pages.
struct Access {
  std::vector<PageId> pages;     // of prompt and kept output, in order; the last may be partly filled
  std::size_t prompt_pages = 0;  // of them, whole pages that can be hit: all before the prompt's last token
  std::int64_t unlimited_tokens = 0;
  std::size_t unlimited_pages = 0;  // whole pages among them
};

class PageNames {
 public:
  std::vector<PageId> Of(std::span<const TokenId> tokens) {
    std::vector<PageId> pages;
    PageId parent = std::numeric_limits<PageId>::max();
    for (std::size_t at = 0; at < tokens.size(); at += kCeilingPageTokens) {
      const auto page =
          std::as_bytes(tokens.subspan(at, std::min<std::size_t>(kCeilingPageTokens, tokens.size() - at)));
      std::string key(reinterpret_cast<const char*>(&parent), sizeof parent);
      key.append(reinterpret_cast<const char*>(page.data()), page.size());
      parent = names_.try_emplace(std::move(key), static_cast<PageId>(names_.size())).first->second;
      pages.push_back(parent);
    }
    return pages;
  }
  std::size_t size() const { return names_.size(); }

 private:
  std::unordered_map<std::string, PageId> names_;
};

std::vector<Access> Accesses(const std::vector<CeilingRequest>& requests, PageNames* names) {
  PrefixTree tree;
  std::vector<Access> accesses;
  for (const CeilingRequest& request : requests) {
    std::vector<TokenId> kept(request.prompt.begin(), request.prompt.end());
    if (!request.generated.empty()) kept.insert(kept.end(), request.generated.begin(), request.generated.end() - 1);
    const auto most = std::max<std::int64_t>(static_cast<std::int64_t>(request.prompt.size()) - 1, 0);
    Access access{.pages = names->Of(kept)};
    access.prompt_pages = static_cast<std::size_t>(most / kCeilingPageTokens);
    for (const PrefixTree::Run& run : tree.Match(request.prompt)) access.unlimited_tokens += run.tokens;
    access.unlimited_tokens = std::min(access.unlimited_tokens, most);
    access.unlimited_pages = static_cast<std::size_t>(access.unlimited_tokens / kCeilingPageTokens);
    accesses.push_back(std::move(access));
    tree.Insert(std::move(kept), 0);
  }
  return accesses;
}

template <typename Resident>
std::int64_t Hit(const Access& access, const Resident& resident) {
  std::size_t hit = 0;
  while (hit < access.unlimited_pages && resident(access.pages[hit])) ++hit;
  return hit == access.unlimited_pages ? access.unlimited_tokens : static_cast<std::int64_t>(hit) * kCeilingPageTokens;
}

std::int64_t Lru(const std::vector<Access>& accesses, std::size_t capacity) {
  std::list<PageId> order;  // least recently used first
  std::unordered_map<PageId, std::list<PageId>::iterator> where;
  std::int64_t tokens = 0;
  for (const Access& access : accesses) {
    tokens += Hit(access, [&](PageId page) { return where.contains(page); });
    for (std::size_t p = access.pages.size(); p-- > 0;) {
      const auto found = where.find(access.pages[p]);
      if (found != where.end()) order.erase(found->second);
      where[access.pages[p]] = order.insert(order.end(), access.pages[p]);
    }
    while (where.size() > capacity) {
      where.erase(order.front());
      order.pop_front();
    }
  }
  return tokens;
}

std::int64_t Belady(const std::vector<Access>& accesses, std::size_t capacity) {
  // When each page of each access is needed next: as a page of a prompt that can be hit.
  std::vector<std::vector<std::int64_t>> next(accesses.size());
  std::unordered_map<PageId, std::int64_t> needed;
  for (std::size_t i = accesses.size(); i-- > 0;) {
    const Access& access = accesses[i];
    for (const PageId page : access.pages) {
      const auto found = needed.find(page);
      next[i].push_back(found == needed.end() ? kNever : found->second);
    }
    for (std::size_t p = 0; p < access.prompt_pages; ++p) needed[access.pages[p]] = static_cast<std::int64_t>(i);
  }
  std::unordered_map<PageId, std::int64_t> resident;  // when it is needed next
  std::priority_queue<std::tuple<std::int64_t, std::size_t, PageId>> furthest;
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < accesses.size(); ++i) {
    const Access& access = accesses[i];
    tokens += Hit(access, [&](PageId page) { return resident.contains(page); });
    for (std::size_t p = 0; p < access.pages.size(); ++p) {
      if (next[i][p] == kNever) {
        resident.erase(access.pages[p]);
      } else {
        resident[access.pages[p]] = next[i][p];
        furthest.emplace(next[i][p], p, access.pages[p]);
      }
    }
    while (resident.size() > capacity) {
      const auto [when, depth, page] = furthest.top();
      furthest.pop();
      const auto found = resident.find(page);
      if (found != resident.end() && found->second == when) resident.erase(found);
    }
  }
  return tokens;
}

}  // namespace

Ceilings ComputeCeilings(const std::vector<CeilingRequest>& requests, std::int64_t capacity_pages) {
  PageNames names;
  const std::vector<Access> accesses = Accesses(requests, &names);
  Ceilings ceilings;
  ceilings.unique_pages = static_cast<std::int64_t>(names.size());
  for (std::size_t r = 0; r < requests.size(); ++r) {
    ceilings.prompt_tokens += static_cast<std::int64_t>(requests[r].prompt.size());
    ceilings.unlimited_tokens += accesses[r].unlimited_tokens;
  }
  const auto capacity = static_cast<std::size_t>(std::max<std::int64_t>(capacity_pages, 0));
  ceilings.lru_tokens = Lru(accesses, capacity);
  ceilings.belady_tokens = Belady(accesses, capacity);
  return ceilings;
}

}  // namespace kvshare::trace
