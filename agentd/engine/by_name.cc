// Engine: stored KV by name, for those who ask about it, hold it, or want it gone.
#include <algorithm>
#include <future>
#include <limits>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "agentd/engine/engine.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

constexpr std::size_t kKeyDigits = 64;
constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();

Status CheckKey(const std::string& key) {
  const bool hex =
      std::all_of(key.begin(), key.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
  if (!key.empty() && key.size() <= kKeyDigits && hex) return OkStatus();
  return InvalidArgument("\"" + key.substr(0, 80) + "\" is not a key: 1 to 64 of the digits 0-9 and a-f");
}

}  // namespace

Match Engine::Lookup(std::span<const TokenId> prompt, const std::string* session) {
  Match match;
  match.prompt_tokens = static_cast<std::int64_t>(prompt.size());
  OnEngineThread([&] {
    const StoredPrefix stored = planner_.FindReusable(prompt, ReuseMode::kExact);
    match.host_tokens = stored.host.tokens();
    match.cold_tokens = stored.cold.tokens();
    match.prefix_tokens = stored.tokens();
    if (session == nullptr) return;
    EngineRequest request;
    request.prompt.assign(prompt.begin(), prompt.end());
    request.session = std::make_shared<const std::string>(*session);
    request.reuse = ReuseMode::kRotate;  // which asks for nothing but that they are there
    RecallSession(*session);
    const Planner* const disk = cold_ == nullptr ? nullptr : &planner_;
    for (const FoundChunk& found : moved_.Find(request, stored.tokens(), 1, disk, nullptr).chunks) {
      match.chunk_tokens += found.chunk.length;
    }
  });
  return match;
}

// Waits on the caller's thread; the engine goes on while the tier reads.
Status Engine::AfterFetch(std::span<const TokenId> prompt, const std::function<void()>& then) {
  const auto done = std::make_shared<std::promise<Status>>();
  Post([this, &prompt, &then, done] {
    Fetch({.tokens = {prompt.begin(), prompt.end()},
           .done = [&then, done](const Status& status, std::optional<MissKind>) {
             if (status.ok()) then();
             done->set_value(status);
           }});
  });
  return done->get_future().get();
}

Result<LeaseInfo> Engine::Acquire(std::span<const TokenId> prompt, std::chrono::milliseconds ttl) {
  Result<LeaseInfo> result = LeaseInfo{};
  KVS_RETURN_IF_ERROR(AfterFetch(prompt, [&] {
    const PrefixMatch match = pool_->index().Find(prompt);
    LeaseInfo info;
    const kernels::KvLayout layout = model_->kv_layout();
    const auto page_bytes = static_cast<std::int64_t>(layout.page_bytes());
    info.ttl = ttl;
    info.layout = {.num_layers = layout.num_layers,
                   .num_kv_heads = layout.num_kv_heads,
                   .head_dim = layout.head_dim,
                   .page_tokens = kPageTokens,
                   .page_bytes = page_bytes,
                   .dtype = std::string(kernels::DTypeName(layout.dtype))};
    if (match.tokens() == 0) {
      result = info;
      return;
    }
    const auto lease = leases_.Lease(match, std::chrono::steady_clock::now() + ttl);
    if (!lease.ok()) {
      result = lease.status();
      return;
    }
    info.id = lease->id;
    info.tokens = match.tokens();
    const auto add = [&](PageIndex page, int valid) {
      info.pages.push_back({.offset = page * page_bytes,
                            .start = static_cast<std::int64_t>(info.pages.size()) * kPageTokens,
                            .valid_tokens = valid,
                            .generation = pool_->generation(page)});
    };
    for (const PageIndex page : match.pages) add(page, kPageTokens);
    if (match.tail != kNoPage) add(match.tail, match.tail_tokens);
    result = std::move(info);
    PublishLoad();
  }));
  return result;
}

Status Engine::Release(std::uint64_t lease) {
  bool held = false;
  OnEngineThread([&] {
    held = leases_.Release(lease);
    replan_ |= held;
    PublishLoad();
  });
  if (held) return OkStatus();
  return NotFound("lease " + std::to_string(lease) + " is not held: it was never given, was released, or has expired");
}

Result<PinInfo> Engine::Pin(std::span<const TokenId> prompt, std::chrono::milliseconds ttl) {
  Result<PinInfo> result = PinInfo{};
  KVS_RETURN_IF_ERROR(AfterFetch(prompt, [&] {
    std::optional<SteadyTime> deadline;
    if (ttl > std::chrono::milliseconds::zero()) deadline = std::chrono::steady_clock::now() + ttl;
    const Result<PinnedEntry> pinned = leases_.Pin(prompt, deadline);
    if (pinned.ok()) {
      result = PinInfo{.key = pinned->key.Hex(), .tokens = pinned->tokens};
    } else {
      result = pinned.status();
    }
    PublishLoad();
  }));
  return result;
}

Status Engine::Unpin(const std::string& key) {
  KVS_RETURN_IF_ERROR(CheckKey(key));
  bool held = false;
  OnEngineThread([&] {
    const std::optional<Digest> pinned = leases_.FindPin(key);
    held = pinned.has_value() && leases_.Unpin(*pinned);
    replan_ |= held;
    PublishLoad();
  });
  if (held) return OkStatus();
  return NotFound("the key " + key + " is not pinned");
}

Result<std::int64_t> Engine::Prefetch(std::span<const TokenId> prompt) {
  std::int64_t tokens = 0;
  KVS_RETURN_IF_ERROR(AfterFetch(prompt, [&] { tokens = pool_->index().Find(prompt).tokens(); }));
  return tokens;
}

// The key that `key` is or begins, of an entry in either tier.
Result<std::string> Engine::ResolveKey(const std::string& key) {
  KVS_RETURN_IF_ERROR(CheckKey(key));
  std::unordered_set<std::string> found;
  OnEngineThread([&] {
    for (const PageIndex page : pool_->FindByKey(key)) found.insert(pool_->index().Context(page).Hex());
  });
  if (cold_ != nullptr) {
    cold_->ForEach(kAll, [&](const ColdEntry& entry) {
      if (found.size() > 1) return;
      std::string hex = entry.page.context.Hex();
      if (hex.starts_with(key)) found.insert(std::move(hex));
    });
  }
  if (found.empty()) return NotFound("no stored entry has the key " + key);
  if (found.size() > 1) return InvalidArgument("several keys begin with " + key + "; give more digits");
  return *found.begin();
}

Result<std::int64_t> Engine::Evict(const EvictRequest& request) {
  std::string key;
  if (!request.key.empty()) {
    KVS_ASSIGN_OR_RETURN(key, ResolveKey(request.key));
  }
  std::int64_t dropped = 0;
  if (request.host) {
    if (!request.cold) DemoteAll();  // asked to leave memory, not to be lost
    OnEngineThread([&] {
      PageIndex from = kNoPage;
      if (!key.empty()) {
        const std::vector<PageIndex> pages = pool_->FindByKey(key, 1);
        if (pages.empty()) return;
        from = pages.front();
      }
      if (key.empty()) {
        dropped += moved_.kept_pages();
        healer_.Clear();
        if (request.cold) {
          moved_.Clear();
          recall_.Clear();
          moved_.anchors().ForgetSaved();
        } else {
          moved_.LeaveMemory();
        }
      }
      demoter_.KeepDropped(!request.cold);  // what came meanwhile
      dropped += pool_->EvictFrom(from);
      demoter_.KeepDropped(false);
      replan_ = true;
      PublishLoad();
    });
  }
  if (!request.cold || cold_ == nullptr) return dropped;
  if (!arena_->in_place()) {
    OnEngineThread([&] { demoter_.ForgetEvicted(); });
  }
  if (key.empty() && !request.host) {
    OnEngineThread([&] { moved_.anchors().ForgetSaved(); });
  }
  if (key.empty()) moved_.anchors().Flush();
  // What is on its way to the disk is listed once it is there. What could not be written is not there.
  static_cast<void>(cold_->Flush());
  std::unordered_map<std::string, std::vector<Digest>> children;
  std::vector<Digest> open;
  cold_->ForEach(kAll, [&](const ColdEntry& entry) {
    if (key.empty() || entry.page.context.Hex() == key) open.push_back(entry.page.context);
    if (!key.empty()) children[entry.page.parent.Hex()].push_back(entry.page.context);
  });
  // Its pages may be there although it is not: pages are evicted one by one.
  if (!key.empty() && open.empty()) open = children[key];
  while (!open.empty()) {
    const Digest context = open.back();
    open.pop_back();
    cold_->Remove(context);
    ++dropped;
    const auto after = children.find(context.Hex());
    if (after == children.end()) continue;
    open.insert(open.end(), after->second.begin(), after->second.end());
  }
  return dropped;
}

Entry Engine::EntryOf(const StoredPage& page) const {
  Entry entry;
  entry.key = page.context.Hex();
  if (page.parent != kNoPage) entry.parent = pool_->index().Context(page.parent).Hex();
  entry.tier = cold_ != nullptr && cold_->Contains(page.context) ? "host+cold" : "host";
  entry.source = stats_->AgentName(page.source);
  entry.start = page.start;
  entry.tokens = static_cast<std::int64_t>(page.tokens.size());
  entry.bytes = static_cast<std::int64_t>(model_->kv_layout().page_bytes());
  entry.hits = page.hits;
  entry.idle_ms = page.idle_ms;
  entry.leases = page.pins;
  entry.pinned = page.retained;
  return entry;
}

Entry Engine::EntryOf(const ColdEntry& cold) const {
  Entry entry;
  entry.key = cold.page.context.Hex();
  if (cold.page.start > 0) entry.parent = cold.page.parent.Hex();
  entry.tier = "cold";
  entry.source = cold.page.source;
  entry.start = cold.page.start;
  entry.tokens = static_cast<std::int64_t>(cold.page.tokens.size());
  entry.bytes = cold.bytes;
  entry.hits = cold.hits;
  entry.idle_ms = cold.idle_ms;
  return entry;
}

Result<std::vector<Entry>> Engine::Entries(const EntriesRequest& request) {
  std::string key;
  if (!request.key.empty()) {
    KVS_ASSIGN_OR_RETURN(key, ResolveKey(request.key));
  }
  const auto limit = key.empty() ? static_cast<std::size_t>(request.limit) : std::size_t{1};
  std::vector<Entry> entries;
  std::unordered_set<Digest, DigestHash> in_memory;
  OnEngineThread([&] {
    if (!key.empty()) {
      for (const PageIndex page : pool_->FindByKey(key, 1)) {
        const StoredPage stored = pool_->Describe(page);
        entries.push_back(EntryOf(stored));
        entries.back().ids.assign(stored.tokens.begin(), stored.tokens.end());
      }
      return;
    }
    pool_->ForEachEntry(EntryOrder::kRecent, limit, [&](const StoredPage& page) {
      entries.push_back(EntryOf(page));
      in_memory.insert(page.context);
    });
  });
  if (cold_ == nullptr || entries.size() >= limit) return entries;
  // All of memory's entries are listed by now, so what is not among them is in the cold tier only.
  cold_->ForEach(key.empty() ? static_cast<std::int64_t>(limit + in_memory.size()) : kAll, [&](const ColdEntry& cold) {
    if (entries.size() >= limit || in_memory.contains(cold.page.context)) return;
    if (!key.empty() && cold.page.context.Hex() != key) return;
    entries.push_back(EntryOf(cold));
    if (!key.empty()) entries.back().ids = cold.page.tokens;
  });
  return entries;
}

}  // namespace kvshare::agentd
