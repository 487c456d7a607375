#include "agentd/engine/promotion.h"

#include <algorithm>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

MissKind ReasonOf(const Status& status) {
  switch (status.code()) {
    case StatusCode::kNotFound: return MissKind::kColdEvicted;
    case StatusCode::kDataLoss: return MissKind::kColdDamaged;
    default: return MissKind::kColdUnreadable;
  }
}

}  // namespace

std::vector<ColdLoad> LoadsOf(const ColdRun& run, std::int64_t start, const KvHandle& kv,
                              const kernels::KvPages& pages) {
  std::vector<ColdLoad> loads;
  loads.reserve(run.pages.size());
  auto at = static_cast<std::size_t>(start / kPageTokens);
  for (const ColdRun::Page& page : run.pages) {
    std::byte* const destination = pages.slab(kv.pages()[at++], 0, 0, 0);
    loads.push_back({.context = page.context, .destination = std::span(destination, pages.layout.page_bytes())});
  }
  return loads;
}

std::size_t CountGood(const Promotion& promotion, std::span<const ColdLoaded> loaded, MissKind* why) {
  KVS_CHECK(loaded.size() == promotion.run.pages.size());
  std::int64_t at = promotion.start;
  for (std::size_t i = 0; i < loaded.size(); ++i) {
    const ColdRun::Page& wanted = promotion.run.pages[i];
    if (!loaded[i].status.ok()) {
      *why = ReasonOf(loaded[i].status);
      return i;
    }
    const ColdPage& page = loaded[i].page;
    const auto tokens =
        std::span(promotion.tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(wanted.tokens));
    const bool same = page.parent == wanted.parent && page.start == at && page.tokens.size() <= kPageTokens &&
                      page.tokens.size() >= tokens.size() &&
                      std::equal(tokens.begin(), tokens.end(), page.tokens.begin());
    if (!same) {
      *why = MissKind::kColdDamaged;
      return i;
    }
    at += wanted.tokens;
  }
  return loaded.size();
}

}  // namespace kvshare::agentd
