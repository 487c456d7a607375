#include "agentd/tiers/cold_directory.h"

#include <algorithm>
#include <unordered_set>

#include "agentd/tiers/record.h"
#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

std::size_t CommonPrefix(std::span<const TokenId> a, std::span<const TokenId> b) {
  const std::size_t n = std::min(a.size(), b.size());
  return static_cast<std::size_t>(
      std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()).first - a.begin());
}

bool IsPrefix(std::span<const TokenId> prefix, std::span<const TokenId> of) {
  return prefix.size() <= of.size() && CommonPrefix(prefix, of) == prefix.size();
}

}  // namespace

const DirectoryEntry* ColdDirectory::Find(const Digest& context) const {
  const auto found = entries_.find(context);
  return found == entries_.end() ? nullptr : found->second.get();
}

DirectoryEntry* ColdDirectory::FindMutable(const Digest& context) {
  return const_cast<DirectoryEntry*>(std::as_const(*this).Find(context));
}

std::pair<const DirectoryEntry*, const DirectoryEntry*> ColdDirectory::Neighbours(
    const Digest& parent, std::span<const TokenId> tokens) const {
  const auto found = children_.find(parent);
  if (found == children_.end()) return {nullptr, nullptr};
  DirectoryEntry probe;
  probe.page.tokens.assign(tokens.begin(), tokens.end());
  const Siblings& siblings = found->second;
  const auto at = siblings.lower_bound(&probe);
  return {at == siblings.begin() ? nullptr : *std::prev(at), at == siblings.end() ? nullptr : *at};
}

ColdTail ColdDirectory::FindTail(const Digest& parent, std::span<const TokenId> tokens) const {
  tokens = tokens.first(std::min(tokens.size(), kMaxPageTokens));
  const auto [before, after] = Neighbours(parent, tokens);
  ColdTail tail;
  for (const DirectoryEntry* entry : {after, before}) {
    if (entry == nullptr) continue;
    const auto common = static_cast<int>(CommonPrefix(entry->page.tokens, tokens));
    if (common > tail.tokens) tail = {.context = entry->page.context, .tokens = common};
  }
  return tail;
}

bool ColdDirectory::Covers(const Digest& parent, std::span<const TokenId> tokens) const {
  const DirectoryEntry* const after = Neighbours(parent, tokens).second;
  return after != nullptr && IsPrefix(tokens, after->page.tokens);
}

std::unique_ptr<DirectoryEntry> ColdDirectory::Insert(ColdPage page, std::uint64_t slot, std::uint64_t generation,
                                                      std::uint64_t last_used) {
  const DirectoryEntry* const before = Neighbours(page.parent, page.tokens).first;
  std::unique_ptr<DirectoryEntry> superseded;
  if (before != nullptr && IsPrefix(before->page.tokens, page.tokens)) superseded = Remove(before->page.context);

  auto entry = std::make_unique<DirectoryEntry>();
  entry->page = std::move(page);
  entry->slot = slot;
  entry->generation = generation;
  if (last_used > 0) clock_ = std::max(clock_, last_used);
  entry->last_used = last_used > 0 ? last_used : ++clock_;
  entry->used_at = Clock::now();
  entry->is_leaf = children_.count(entry->page.context) == 0;
  DirectoryEntry* const raw = entry.get();
  KVS_CHECK(entries_.emplace(raw->page.context, std::move(entry)).second);
  KVS_CHECK(children_[raw->page.parent].insert(raw).second);
  if (DirectoryEntry* const parent = FindMutable(raw->page.parent); parent != nullptr && parent->is_leaf) {
    LeaveOrder(*parent);
    parent->is_leaf = false;
  }
  EnterOrder(*raw);
  return superseded;
}

std::unique_ptr<DirectoryEntry> ColdDirectory::Remove(const Digest& context) {
  const auto found = entries_.find(context);
  if (found == entries_.end()) return nullptr;
  std::unique_ptr<DirectoryEntry> entry = std::move(found->second);
  LeaveOrder(*entry);
  entries_.erase(found);
  if (entry->used) --used_entries_;
  const auto siblings = children_.find(entry->page.parent);
  siblings->second.erase(entry.get());
  if (siblings->second.empty()) {
    children_.erase(siblings);
    if (DirectoryEntry* const parent = FindMutable(entry->page.parent); parent != nullptr) {
      parent->is_leaf = true;
      EnterOrder(*parent);
    }
  }
  return entry;
}

void ColdDirectory::LeaveOrder(DirectoryEntry& entry) { OrderOf(entry).erase({entry.last_used, &entry}); }

void ColdDirectory::EnterOrder(DirectoryEntry& entry) {
  if (entry.is_leaf && entry.pins == 0) OrderOf(entry).insert({entry.last_used, &entry});
}

void ColdDirectory::Use(const Digest& context, bool hit) {
  DirectoryEntry* const entry = FindMutable(context);
  if (entry == nullptr) return;
  LeaveOrder(*entry);
  if (!entry->used) ++used_entries_;
  entry->used = true;
  entry->moved = true;
  entry->last_used = ++clock_;
  entry->used_at = Clock::now();
  if (hit) ++entry->hits;
  EnterOrder(*entry);
}

void ColdDirectory::Pin(const Digest& context) {
  DirectoryEntry* const entry = FindMutable(context);
  KVS_CHECK(entry != nullptr);
  LeaveOrder(*entry);
  ++entry->pins;
}

void ColdDirectory::Unpin(const Digest& context) {
  DirectoryEntry* const entry = FindMutable(context);
  KVS_CHECK(entry != nullptr && entry->pins > 0);
  --entry->pins;
  EnterOrder(*entry);
}

std::unique_ptr<DirectoryEntry> ColdDirectory::Evict() {
  const std::size_t never_used = entries_.size() - used_entries_;
  const bool from_probation = !probation_.empty() && (protected_.empty() || never_used * 10 >= entries_.size());
  Order& order = from_probation ? probation_ : protected_;
  return order.empty() ? nullptr : Remove(order.begin()->second->page.context);
}

void ColdDirectory::Clear() {
  probation_.clear();
  protected_.clear();
  children_.clear();
  entries_.clear();
  used_entries_ = 0;
}

std::vector<const DirectoryEntry*> ColdDirectory::TakeMoved() {
  std::vector<const DirectoryEntry*> moved;
  for (auto& [context, entry] : entries_) {
    if (!entry->moved) continue;
    entry->moved = false;
    moved.push_back(entry.get());
  }
  return moved;
}

std::vector<const DirectoryEntry*> ColdDirectory::ByRecency(std::size_t limit) const {
  std::vector<const DirectoryEntry*> all;
  all.reserve(entries_.size());
  for (const auto& [context, entry] : entries_) all.push_back(entry.get());
  limit = std::min(limit, all.size());
  std::partial_sort(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(limit), all.end(),
                    [](const auto* a, const auto* b) { return a->last_used > b->last_used; });
  all.resize(limit);
  return all;
}

void ColdDirectory::ForEach(const std::function<void(const DirectoryEntry&)>& visit) const {
  for (const auto& [context, entry] : entries_) visit(*entry);
}

Status ColdDirectory::CheckIntegrity() const {
  std::unordered_set<std::uint64_t> slots;
  std::size_t siblings_total = 0, used = 0, evictable = 0;
  for (const auto& [context, entry] : entries_) {
    const std::string name = "the cold directory's entry " + context.Hex().substr(0, 12);
    if (entry->page.context != context || ChainContext(entry->page.parent, entry->page.tokens) != context) {
      return Internal(name + " has the name of other tokens");
    }
    if (!slots.insert(entry->slot).second) return Internal(name + " shares its slot");
    const auto siblings = children_.find(entry->page.parent);
    if (siblings == children_.end() || siblings->second.count(entry.get()) == 0) {
      return Internal(name + " is not its parent's child");
    }
    if (entry->is_leaf != (children_.count(context) == 0)) return Internal(name + " is wrong about being a leaf");
    const Order& order = entry->used ? protected_ : probation_;
    if ((order.count({entry->last_used, entry.get()}) > 0) != (entry->is_leaf && entry->pins == 0)) {
      return Internal(name + " is wrongly in or out of the order of eviction");
    }
    if (entry->is_leaf && entry->pins == 0) ++evictable;
    if (entry->used) ++used;
  }
  for (const auto& [parent, siblings] : children_) {
    siblings_total += siblings.size();
    const DirectoryEntry* before = nullptr;
    for (const DirectoryEntry* entry : siblings) {
      if (before != nullptr && IsPrefix(before->page.tokens, entry->page.tokens)) {
        return Internal("two siblings in the cold directory, one beginning with the other");
      }
      before = entry;
    }
    if (siblings.empty()) return Internal("an empty family in the cold directory");
  }
  if (siblings_total != entries_.size() || used != used_entries_) return Internal("the cold directory's counts differ");
  if (probation_.size() + protected_.size() != evictable) return Internal("strangers in the order of eviction");
  return OkStatus();
}

}  // namespace kvshare::agentd
