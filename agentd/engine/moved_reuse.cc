#include "agentd/engine/moved_reuse.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <optional>

#include "agentd/repair/messages.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {
namespace {

// Computed with the prompt at both ends of a recurrence: tokenisation may have joined them with their neighbours.
constexpr std::int64_t kEdgeTokens = 2;
// Below this a chunk costs more to place than to compute.
constexpr std::int64_t kMinChunkTokens = 32;

// What does not seem to pay is tried all the same now and then, so that the guard of a daemon that is never idle learns
// what chunks are worth too (others have ShadowAuditor): for so much of the rows that would have been computed anyhow.
constexpr double kTrialShare = 0.01;
constexpr double kMostTrialRows = 8192;

// Chunks of one prompt at most: attention pays for every one of them.
constexpr std::size_t kMaxChunks = 256;

// Approximate requests that one may stand on, one upon the other.
constexpr int kMaxDepth = 4;
// What is kept of them takes one page of so many.
constexpr PageIndex kKeptShare = 4;

// Pages that are kept until nobody needs them.
struct KeptPages {
  KeptPages(KvHandle handle, std::int64_t* total) : kv(std::move(handle)), count(total) {
    *count += static_cast<std::int64_t>(kv.pages().size());
  }
  ~KeptPages() { *count -= static_cast<std::int64_t>(kv.pages().size()); }
  KeptPages(const KeptPages&) = delete;
  KeptPages& operator=(const KeptPages&) = delete;

  KvHandle kv;
  std::int64_t* count;
};

// Strays, to be computed; what is left are the chunks that the prompt is computed over.
void TakeStraysOut(FoundChunks* found) {
  std::vector<ChunkCompany> company;
  for (const FoundChunk& chunk : found->chunks) {
    company.push_back({chunk.chunk.length, chunk.chunk.in_company, chunk.saw_other});
  }
  const std::vector<std::size_t> strays = Strays(company);
  for (auto i = strays.rbegin(); i != strays.rend(); ++i) {
    const auto stray = found->chunks.begin() + static_cast<std::ptrdiff_t>(*i);
    found->strays.insert(found->strays.begin(), std::move(*stray));
    found->chunks.erase(stray);
  }
}

}  // namespace

MovedReuse::MovedReuse(runtime::Model* model, KvPool* pool, const kernels::KvPages& pages, StatsBook* names,
                       const MovedReuseOptions& options, AnchorShelf::Post post)
    : model_(model),
      role_marks_(RoleMarksOf(*model)),
      message_ends_(MessageEndsOf(*model)),
      pool_(pool),
      pages_(pages),
      names_(names),
      blend_recompute_(options.blend_recompute),
      blend_gradual_(options.blend_gradual),
      device_anchors_(&model->backend(), static_cast<std::size_t>(options.anchor_memory)),
      anchors_(StoreFor(*model, options), options.anchor_bytes, options.anchor_memory, std::move(post)) {
  if (options.anchor_dir.empty()) return;
  guard_file_.emplace(options.anchor_dir, GuardSpace(model->space(), blend_recompute_));
  const std::optional<anchors::GuardStates> saved = guard_file_->Load(&guard_fault_);
  if (!saved.has_value()) return;
  thread_.Restore((*saved)[0]);
  elsewhere_.Restore((*saved)[1]);
}

FoundChunks MovedReuse::Find(const EngineRequest& request, std::int64_t from, std::int64_t new_tokens,
                             const Planner* disk, const OnTheWay& on_the_way) const {
  FoundChunks found;
  const std::string& session = *request.session;
  const std::span<const TokenId> prompt = request.prompt;
  const auto last = static_cast<std::int64_t>(prompt.size()) - 1;
  const std::int64_t window = model_->config().max_positions;
  if (last - from < kMinChunkTokens + 2 * kEdgeTokens) return found;
  constexpr std::int64_t kMinLength = kMinChunkTokens + 2 * kEdgeTokens;
  std::optional<Messages> messages;  // KVCOMM's placeholders
  if (request.reuse == ReuseMode::kKvcomm) messages.emplace(prompt, message_ends_);
  // A run that begins as this prompt does beyond what is stored of it is in memory no further than the prompt is.
  const std::int64_t own = from + kPageTokens;
  const auto recurrences = messages.has_value()
                               ? messages->Find(book_, session, from, last, kMinLength, kEdgeTokens, request.reuse)
                               : book_.Find(session, prompt, from, last, kMinLength, request.reuse, own);
  // Each run that is stored under its key is looked up and leased once, as far as any of its chunks reaches.
  std::map<std::uint64_t, std::int64_t> reach;
  for (const Recurrence& r : recurrences) {
    if (book_.kept(session, r.run) == nullptr) reach[r.run] = std::max(reach[r.run], r.base + r.length);
  }
  struct Stored {
    std::vector<PageIndex> pages;  // kNoPage: on disk
    std::int64_t tokens = 0;
    std::int64_t in_memory = 0;  // of these tokens
    std::size_t on_disk = 0;     // pages
    bool wanted = false;         // from there
  };
  std::map<std::uint64_t, Stored> stored;
  for (const auto& [run, end] : reach) {
    const auto tokens = book_.tokens(session, run).first(static_cast<std::size_t>(end));
    const StoredPrefix whole = disk == nullptr ? StoredPrefix{.host = pool_->index().Find(tokens)} : disk->Find(tokens);
    const PrefixMatch& match = whole.host;
    if (whole.tokens() == 0) continue;
    if (match.tokens() > 0) {
      Result<KvHandle> lease = pool_->Lease(match);
      if (!lease.ok()) continue;
      found.leases.push_back(std::move(*lease));
    }
    Stored& s = stored[run];
    s = {.pages = match.pages,
         .tokens = whole.tokens(),
         .in_memory = match.tokens(),
         .on_disk = whole.cold.pages.size()};
    if (match.tail != kNoPage) s.pages.push_back(match.tail);
    std::vector<PageIndex> coming;
    if (on_the_way && s.on_disk > 0) coming = on_the_way(tokens, whole);
    s.pages.insert(s.pages.end(), coming.begin(), coming.end());
    s.pages.insert(s.pages.end(), s.on_disk - coming.size(), kNoPage);
  }
  PromptCompany company(prompt, role_marks_);
  for (const Recurrence& r : recurrences) {
    if (found.chunks.size() == kMaxChunks) break;
    FoundChunk out;
    MovedChunk& chunk = out.chunk;
    chunk.start = r.start + kEdgeTokens;
    chunk.length = r.length - 2 * kEdgeTokens;
    std::int64_t row = r.base + kEdgeTokens;  // in the run's pages
    const std::vector<PageIndex>* pages = nullptr;
    std::span<const TokenId> there;
    const KeptKv* kept = book_.kept(session, r.run);
    if (kept != nullptr) {
      chunk.base = kept->position + row;
      chunk.depth = kept->depth;
      row += kept->first;
      pages = &kept->pages;
      there = *kept->prompt;
    } else if (const auto run = stored.find(r.run); run != stored.end()) {
      chunk.base = row;
      chunk.length = std::min(chunk.length, run->second.tokens - row);  // what of the run is still stored
      pages = &run->second.pages;
      there = book_.tokens(session, r.run);
    }
    if (pages == nullptr || chunk.length < kMinChunkTokens) {
      found.gone.emplace_back(r.start, r.length);
      continue;
    }
    // Rows that see the chunk are rotated back by its shift: all of those positions must exist.
    const std::int64_t shift = chunk.start - chunk.base;
    if (last + new_tokens - shift >= window) continue;
    chunk.in_company = company.InCompany(chunk.start, there, chunk.base);
    if (request.reuse == ReuseMode::kAuto && !chunk.in_company) {
      const std::int64_t tail = company.Tail(chunk.start, chunk.start + chunk.length, kMinChunkTokens);
      chunk.length -= tail;
      if (tail > 0) found.strays.push_back({.chunk = {.start = chunk.start + chunk.length, .length = tail}});
      if (chunk.length == 0) continue;
    }
    if (kept == nullptr && row + chunk.length > stored.at(r.run).in_memory) out.tier = Tier::kCold;
    const std::int64_t first_page = row / kPageTokens;
    const std::int64_t end_page = (row + chunk.length + kPageTokens - 1) / kPageTokens;
    chunk.pages.assign(pages->begin() + first_page, pages->begin() + end_page);
    chunk.first = static_cast<int>(row % kPageTokens);
    if (kept != nullptr) found.kept.push_back(kept->lease);
    if (request.reuse == ReuseMode::kAuto) {
      out.saw_other = company.SawOther(chunk.start, chunk.start + chunk.length, there, chunk.base);
    }
    out.source = book_.source(session, r.run);
    if (messages.has_value()) {
      chunk.placeholder = messages->PlaceOf(chunk.start);
      const auto tokens = prompt.subspan(static_cast<std::size_t>(chunk.start), static_cast<std::size_t>(chunk.length));
      chunk.content = ContentDigest(tokens).Hex();
    }
    out.run = r.run;
    found.chunks.push_back(std::move(out));
  }
  if (request.reuse == ReuseMode::kAuto) TakeStraysOut(&found);
  for (const FoundChunk& chunk : found.chunks) {
    if (chunk.tier == Tier::kCold) stored.at(chunk.run).wanted = true;
  }
  for (const auto& [run, s] : stored) {
    if (!s.wanted) continue;
    const auto tokens = book_.tokens(session, run).first(static_cast<std::size_t>(s.tokens));
    found.loads.push_back({.tokens = {tokens.begin(), tokens.end()}, .pages = s.on_disk});
  }
  return found;
}

std::uint64_t MovedReuse::Keep(const EngineRequest& request, std::span<const TokenId> tokens, const MovedPrompt& prompt,
                               KvHandle& kv) {
  KeptKv kept{.name = next_kept_++, .mode = request.reuse};
  for (const MovedChunk& chunk : prompt.chunks()) kept.depth = std::max(kept.depth, chunk.depth + 1);
  const std::vector<MovedPrompt::FreshRows> fresh = prompt.fresh();
  std::int64_t rows = 0;
  for (const MovedPrompt::FreshRows& run : fresh) rows += run.length;
  const auto begin = static_cast<std::size_t>((prompt.lead_tokens() + kPageTokens - 1) / kPageTokens);
  KvHandle pages = pool_->Split(kv, begin, begin + static_cast<std::size_t>((rows + kPageTokens - 1) / kPageTokens));
  if (kept.depth > kMaxDepth) return kept.name;
  kept.prompt = std::make_shared<const std::vector<TokenId>>(tokens.begin(), tokens.end());
  kept.lease = std::make_shared<KeptPages>(std::move(pages), &kept_pages_);
  for (const MovedPrompt::FreshRows& run : fresh) {
    // A row whose step failed has a place and no KV.
    const std::int64_t length = std::min(run.length, static_cast<std::int64_t>(tokens.size()) - run.start);
    if (length < kMinChunkTokens + 2 * kEdgeTokens) continue;
    kept.position = run.start;
    kept.pages = run.pages;
    kept.first = run.first;
    book_.RecordKept(*request.session, length, request.agent, kept);
  }
  std::erase_if(kept_, [](const KeptRequest& other) { return other.pages.expired(); });
  kept_.push_back({*request.session, kept.name, kept.lease});
  kept.lease.reset();
  while (kept_pages_ > static_cast<std::int64_t>(pool_->usage().total / kKeptShare) && Yield()) {
  }
  return kept.name;
}

void MovedReuse::Healed(const std::string& session, std::span<const TokenId> tokens, AgentId source,
                        std::uint64_t kept) {
  const std::uint64_t since = book_.ForgetKept(session, kept);
  book_.Record(session, tokens, source, since);
}

bool MovedReuse::Yield() {
  while (!kept_.empty()) {
    const std::int64_t before = kept_pages_;
    const KeptRequest oldest = std::move(kept_.front());
    kept_.pop_front();
    book_.ForgetKept(oldest.session, oldest.name);
    if (kept_pages_ < before) return true;
  }
  return false;
}

std::unique_ptr<AnchorStore> MovedReuse::StoreFor(const runtime::Model& model, const MovedReuseOptions& options) {
  if (options.anchor_dir.empty()) return nullptr;
  const kernels::KvLayout layout = model.kv_layout();
  return std::make_unique<AnchorStore>(
      AnchorStoreOptions{.directory = options.anchor_dir,
                         .max_bytes = options.anchor_bytes,
                         .space = model.space(),
                         .layers = static_cast<int>(layout.num_layers),
                         .width = std::int64_t{layout.num_kv_heads} * layout.head_dim});
}

MovedWork MovedReuse::Prepare(const EngineRequest& request, const StoredPrefix& prefix, FoundChunks& found,
                              std::int64_t rows_while_loading) {
  KVS_CHECK(request.session != nullptr && !found.chunks.empty());
  RepairOptions options;
  options.mode = request.reuse;
  options.min_margin = margin(true);
  options.min_margin_elsewhere = margin(false);
  options.rows_while_loading = rows_while_loading;
  if (blend_recompute_.has_value()) options.recompute_ratio = *blend_recompute_;
  if (blend_gradual_) options.filter.assign(std::begin(kGradualFilter), std::end(kGradualFilter));
  MovedWork work;
  std::vector<MovedChunk> chunks;
  for (const FoundChunk& chunk : found.chunks) {
    if (chunk.tier == Tier::kCold) {
      const auto run = book_.tokens(*request.session, chunk.run);
      const auto end = run.begin() + static_cast<std::ptrdiff_t>(chunk.chunk.base + chunk.chunk.length);
      work.coming.push_back({.chunk = chunks.size(), .tokens = {run.begin(), end}});
    }
    chunks.push_back(chunk.chunk);
  }
  MovedPrompt::Prefix exact;
  exact.pages = prefix.host.pages;
  exact.tokens = prefix.tokens();
  work.leases = std::move(found.leases);
  work.kept = std::move(found.kept);
  if (prefix.host.tail != kNoPage) exact.pages.push_back(prefix.host.tail);
  exact.pages.insert(exact.pages.end(), prefix.cold.pages.size(), kNoPage);
  if (request.reuse == ReuseMode::kKvcomm) work.anchors = anchors_.Of(*request.session);
  work.prompt =
      std::make_unique<MovedPrompt>(model_, pages_, request.prompt, std::move(exact), std::move(chunks), options,
                                    work.anchors.get(), names_->AgentName(request.agent), &device_anchors_);
  return work;
}

bool MovedReuse::Settle(MovedWork& work) const {
  for (const MovedWork::Coming& coming : work.coming) {
    const PrefixMatch match = pool_->index().Find(coming.tokens);
    if (match.tokens() < static_cast<std::int64_t>(coming.tokens.size())) return false;
    Result<KvHandle> lease = pool_->Lease(match);
    if (!lease.ok()) return false;
    work.leases.push_back(std::move(*lease));
    std::vector<PageIndex> pages = match.pages;
    if (match.tail != kNoPage) pages.push_back(match.tail);
    const std::int64_t first = work.prompt->chunks()[coming.chunk].base / kPageTokens;
    pages.erase(pages.begin(), pages.begin() + first);
    work.prompt->MoveChunk(coming.chunk, std::move(pages));
  }
  work.coming.clear();
  return true;
}

MovedReuse::Decision MovedReuse::Decide(const EngineRequest& request, const MovedPrompt& prompt, std::int64_t plain,
                                        double moved_row) const {
  const auto computed = static_cast<double>(prompt.RowsToCompute());
  const auto all = static_cast<double>(plain);
  if (request.reuse != ReuseMode::kAuto) return {.use = computed < all, .rows = computed};
  const double moved = moved_row * computed;
  const double earned = kTrialShare * all;
  const double rows = moved + Trusted(prompt.OneThread()).DoubtRate() * all;
  if (rows < all) return {.use = true, .trial_rows = earned, .rows = rows};
  // What a row costs may have been measured in a bad moment, so that is tried too.
  const bool trial = computed < all && moved <= trial_rows_ + earned;
  return {
      .use = trial, .distrusted = !trial && moved < all, .trial_rows = trial ? earned - moved : earned, .rows = rows};
}

void MovedReuse::Admitted(double trial_rows) { trial_rows_ = std::min(trial_rows_ + trial_rows, kMostTrialRows); }

void MovedReuse::Answered(const EngineRequest& request, const MovedPrompt& prompt) {
  if (request.reuse == ReuseMode::kAuto) Watched(prompt.OneThread(), prompt.least_margin());
}

void MovedReuse::Watched(bool one_thread, double least_margin) {
  Trusted(one_thread).Answered(least_margin);
  guards_changed_ = true;
}

void MovedReuse::Audited(bool one_thread, double margin, double kl) {
  Trusted(one_thread).Audited(margin, kl);
  guards_changed_ = true;
}

void MovedReuse::SaveGuards() {
  if (guards_to_save()) guards_changed_ = !guard_file_->Save({thread_.Snapshot(), elsewhere_.Snapshot()});
}

void MovedReuse::LeaveMemory() {
  while (Yield()) {
  }
  anchors_.Clear();
  device_anchors_.Clear();
}

void MovedReuse::Clear() {
  book_.Clear();
  kept_.clear();
  anchors_.Clear();
  device_anchors_.Clear();
}

}  // namespace kvshare::agentd
