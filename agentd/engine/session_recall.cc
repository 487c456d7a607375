#include "agentd/engine/session_recall.h"

#include <algorithm>
#include <limits>
#include <unordered_set>
#include <utility>

#include "kernels/paged_kv.h"

namespace kvshare::agentd {
namespace {

// Of a session's name the tier keeps 128 bytes, less a character that would be cut. One of so many may have been
// longer, and two sessions one name.
constexpr std::size_t kPerhapsCut = 125;

}  // namespace

SessionRecall::SessionRecall(const ColdTier* cold, StatsBook* names) : cold_(cold), names_(names) {
  if (cold_ == nullptr) return;
  struct Page {
    std::string session;
    Digest context;
  };
  std::vector<Page> pages;  // most recently used first
  // By session: what another session computed behind a page does not make it a part of a longer run of this one.
  std::unordered_map<std::string, std::unordered_set<Digest, DigestHash>> parents;
  cold_->ForEach(std::numeric_limits<std::int64_t>::max(), [&](const ColdEntry& entry) {
    const ColdPage& page = entry.page;
    if (page.session.empty() || page.session.size() >= kPerhapsCut) return;
    pages.push_back({page.session, page.context});
    parents[page.session].insert(page.parent);
  });
  for (const Page& page : pages) {
    if (!parents[page.session].contains(page.context)) ends_[page.session].push_back(page.context);
  }
}

std::vector<SessionRecall::Run> SessionRecall::Take(const std::string& session, std::size_t most) {
  std::vector<Run> runs;
  const auto found = ends_.find(session);
  if (found == ends_.end()) return runs;
  const std::vector<Digest> ends = std::move(found->second);
  ends_.erase(found);
  for (const Digest& end : ends) {
    if (runs.size() == most) break;
    std::vector<ColdPage> pages;  // the last first
    Digest next = end;
    while (pages.empty() || pages.back().start > 0) {
      Result<ColdEntry> entry = cold_->Find(next);
      // Evicted since; or damaged, so that no way leads to the beginning.
      if (!entry.ok() || (!pages.empty() && entry->page.start + kernels::kPageTokens != pages.back().start)) break;
      next = entry->page.parent;
      pages.push_back(std::move(entry->page));
    }
    if (pages.empty() || pages.back().start != 0) continue;
    Run run{.source = names_->Intern(pages.front().source)};
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
      run.tokens.insert(run.tokens.end(), page->tokens.begin(), page->tokens.end());
    }
    runs.push_back(std::move(run));
  }
  std::reverse(runs.begin(), runs.end());
  return runs;
}

}  // namespace kvshare::agentd
