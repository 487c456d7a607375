#include "agentd/engine/moved_reuse.h"

#include <algorithm>
#include <map>

#include "libkvshare/core/check.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {
namespace {

// Computed with the prompt at both ends of a recurrence: tokenisation may have joined them with their neighbours.
constexpr std::int64_t kEdgeTokens = 2;
// Below this a chunk costs more to place than to compute.
constexpr std::int64_t kMinChunkTokens = 32;

// Sessions that may have anchors: each may take as much memory as AnchorOptions says.
constexpr std::size_t kAnchoredSessions = 4;

// How far one request moves the rate of doubts.
constexpr double kDoubtStep = 0.15;
constexpr std::int64_t kTryEvery = 8;

// Chunks of one prompt at most: attention pays for every one of them.
constexpr std::size_t kMaxChunks = 256;

}  // namespace

FoundChunks MovedReuse::Find(const std::string& session, std::span<const TokenId> prompt, std::int64_t from,
                             std::int64_t new_tokens) const {
  FoundChunks found;
  const auto last = static_cast<std::int64_t>(prompt.size()) - 1;
  const std::int64_t window = model_->config().max_positions;
  if (last - from < kMinChunkTokens + 2 * kEdgeTokens) return found;
  const auto recurrences = book_.Find(session, prompt, from, last, kMinChunkTokens + 2 * kEdgeTokens);
  // Each run is looked up and leased once, as far as any of its chunks reaches.
  std::map<std::uint64_t, std::int64_t> reach;
  for (const Recurrence& r : recurrences) reach[r.run] = std::max(reach[r.run], r.base + r.length);
  struct Stored {
    std::vector<PageIndex> pages;
    std::int64_t tokens = 0;
  };
  std::map<std::uint64_t, Stored> stored;
  for (const auto& [run, end] : reach) {
    const PrefixMatch match = pool_->index().Find(book_.tokens(session, run).first(static_cast<std::size_t>(end)));
    if (match.tokens() == 0) continue;
    Result<KvHandle> lease = pool_->Lease(match);
    if (!lease.ok()) continue;
    Stored& s = stored[run];
    s = {match.pages, match.tokens()};
    if (match.tail != kNoPage) s.pages.push_back(match.tail);
    found.leases.push_back(std::move(*lease));
  }
  for (const Recurrence& r : recurrences) {
    const auto run = stored.find(r.run);
    if (run == stored.end() || found.chunks.size() == kMaxChunks) continue;
    FoundChunk out;
    MovedChunk& chunk = out.chunk;
    chunk.start = r.start + kEdgeTokens;
    chunk.base = r.base + kEdgeTokens;
    chunk.run = r.run;
    // What of the run is still in memory.
    chunk.length = std::min(r.length - 2 * kEdgeTokens, run->second.tokens - chunk.base);
    // Rows that see the chunk are rotated back by its shift: all of those positions must exist.
    const std::int64_t shift = chunk.start - chunk.base;
    if (chunk.length < kMinChunkTokens || last + new_tokens - shift >= window) continue;
    const std::int64_t first_page = chunk.base / kPageTokens;
    const std::int64_t end_page = (chunk.base + chunk.length + kPageTokens - 1) / kPageTokens;
    chunk.pages.assign(run->second.pages.begin() + first_page, run->second.pages.begin() + end_page);
    chunk.first = static_cast<int>(chunk.base % kPageTokens);
    out.source = book_.source(session, r.run);
    chunk.placeholder = "slot" + std::to_string(found.chunks.size()) + "/" + names_->AgentName(out.source);
    const auto tokens = prompt.subspan(static_cast<std::size_t>(chunk.start), static_cast<std::size_t>(chunk.length));
    chunk.content = ContentDigest(tokens).Hex();
    found.chunks.push_back(std::move(out));
  }
  return found;
}

std::shared_ptr<anchors::AnchorPool> MovedReuse::AnchorsOf(const std::string& session) {
  const auto known =
      std::find_if(anchors_.begin(), anchors_.end(), [&](const auto& entry) { return entry.first == session; });
  if (known != anchors_.end()) {
    anchors_.splice(anchors_.begin(), anchors_, known);
  } else {
    anchors_.emplace_front(session, std::make_shared<anchors::AnchorPool>());
    if (anchors_.size() > kAnchoredSessions) anchors_.pop_back();
  }
  return anchors_.front().second;
}

MovedWork MovedReuse::Prepare(const EngineRequest& request, const PrefixMatch& prefix, FoundChunks& found) {
  KVS_CHECK(request.session != nullptr && !found.chunks.empty());
  RepairOptions options;
  options.mode = request.reuse;
  // Audits may ask for more than the guard's own margin, never for less.
  options.min_margin = std::max(guard_.value(), std::min(audits_.Threshold(0), anchors::GuardMargin::kMost));
  if (request.reuse == ReuseMode::kCacheBlend || request.reuse == ReuseMode::kDhd) {
    options.recompute_ratio = blend_recompute_;
  }
  std::vector<MovedChunk> chunks;
  for (const FoundChunk& chunk : found.chunks) chunks.push_back(chunk.chunk);
  MovedPrompt::Prefix exact;
  exact.pages = prefix.pages;
  exact.tokens = prefix.tokens();
  MovedWork work;
  work.leases = std::move(found.leases);
  if (prefix.tail != kNoPage) exact.pages.push_back(prefix.tail);
  if (request.reuse == ReuseMode::kKvcomm) work.anchors = AnchorsOf(*request.session);
  work.prompt = std::make_unique<MovedPrompt>(model_, pages_, request.prompt, std::move(exact), std::move(chunks),
                                              options, work.anchors.get(), names_->AgentName(request.agent));
  return work;
}

bool MovedReuse::Pays(const EngineRequest& request, const MovedPrompt& prompt, std::int64_t plain) {
  const auto moved = static_cast<double>(prompt.RowsToCompute());
  const auto all = static_cast<double>(plain);
  if (request.reuse != ReuseMode::kAuto) return moved < all;
  Doubts& doubts = DoubtsOf(prompt);
  if (moved + doubts.rate * all < all) return true;
  // Now and then it is tried all the same, so that a rate from a bad moment does not last.
  return moved < all && ++doubts.declined % kTryEvery == 0;
}

void MovedReuse::Answered(const EngineRequest& request, const MovedPrompt& prompt, bool doubted) {
  if (request.reuse != ReuseMode::kAuto) return;
  if (prompt.OneThread()) guard_.Answered(doubted);
  double& rate = DoubtsOf(prompt).rate;
  rate += kDoubtStep * ((doubted ? 1.0 : 0.0) - rate);
}

void MovedReuse::Clear() {
  book_.Clear();
  anchors_.clear();
}

}  // namespace kvshare::agentd
