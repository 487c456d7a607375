#include "agentd/pool/prefix_index.h"

#include <algorithm>
#include <string>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

int CommonPrefix(std::span<const TokenId> a, std::span<const TokenId> b) {
  const std::size_t n = std::min(a.size(), b.size());
  return static_cast<int>(std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()).first -
                          a.begin());
}

bool Less(std::span<const TokenId> a, std::span<const TokenId> b) {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace

void PrefixMatch::Cut(std::int64_t count) {
  if (count >= tokens()) return;
  const auto full = static_cast<std::size_t>(count / kPageTokens);
  tail_tokens = static_cast<int>(count % kPageTokens);
  if (full < pages.size()) tail = pages[full];
  if (tail_tokens == 0) tail = kNoPage;
  pages.resize(full);
  contexts.resize(full);
}

PrefixIndex::PrefixIndex(PageIndex num_pages, const Digest& root) : nodes_(num_pages) {
  root_.context = root;
  root_.valid = kPageTokens;  // stands where a full page would: children may follow
}

PrefixIndex::~PrefixIndex() = default;

const PrefixIndex::Node* PrefixIndex::FindFull(const Node& parent, const Digest& context,
                                               std::span<const TokenId> tokens) const {
  const auto it = by_context_.find(context);
  if (it == by_context_.end()) return nullptr;
  const Node* node = nodes_[it->second].get();
  const bool same = node->parent == &parent && std::equal(tokens.begin(), tokens.end(), node->tokens.begin());
  return same ? node : nullptr;
}

PrefixMatch PrefixIndex::Find(std::span<const TokenId> tokens) const {
  PrefixMatch match;
  const Node* at = &root_;
  while (tokens.size() >= kPageTokens && !at->children.empty()) {
    const auto page = tokens.first(kPageTokens);
    const Digest context = ChainContext(at->context, page);
    const Node* next = FindFull(*at, context, page);
    if (next == nullptr) break;
    match.pages.push_back(next->page);
    match.contexts.push_back(context);
    tokens = tokens.subspan(kPageTokens);
    at = next;
  }
  if (tokens.empty() || at->children.empty()) return match;

  // Invariant 2: the best sibling stands beside the place where these tokens would be inserted.
  const auto above =
      std::lower_bound(at->children.begin(), at->children.end(), tokens,
                       [](const Node* node, std::span<const TokenId> t) { return Less(node->view(), t); });
  const Node* best = nullptr;
  for (auto it = above == at->children.begin() ? above : above - 1; it != at->children.end() && it <= above; ++it) {
    const int common = CommonPrefix((*it)->view(), tokens);
    if (best == nullptr || common > match.tail_tokens) {
      best = *it;
      match.tail_tokens = common;
    }
  }
  if (match.tail_tokens > 0) match.tail = best->page;
  const bool all_matched = static_cast<std::size_t>(match.tail_tokens) == tokens.size();
  match.diverges = match.tokens() > 0 && !all_matched && best->valid > match.tail_tokens;
  return match;
}

PrefixIndex::Placement PrefixIndex::Place(PageIndex parent_page, std::span<const TokenId> tokens) const {
  KVS_CHECK(!tokens.empty() && tokens.size() <= kPageTokens);
  const Node* parent = NodeOrRoot(parent_page);
  KVS_CHECK(parent != nullptr && parent->valid == kPageTokens);
  Placement place;
  place.context = ChainContext(parent->context, tokens);
  const auto above =
      std::lower_bound(parent->children.begin(), parent->children.end(), tokens,
                       [](const Node* node, std::span<const TokenId> t) { return Less(node->view(), t); });
  // Extensions of `tokens` sort from it upwards, prefixes of it below; invariant 2 leaves one candidate on each side.
  if (above != parent->children.end() && CommonPrefix((*above)->view(), tokens) == static_cast<int>(tokens.size())) {
    place.existing = (*above)->page;
  } else if (above != parent->children.begin()) {
    const Node* below = *(above - 1);
    if (CommonPrefix(below->view(), tokens) == below->valid) place.superseded = below->page;
  }
  return place;
}

void PrefixIndex::Insert(PageIndex page, PageIndex parent_page, std::span<const TokenId> tokens, const Digest& context,
                         std::uint32_t source) {
  Node* parent = NodeOrRoot(parent_page);
  KVS_CHECK(page < nodes_.size() && nodes_[page] == nullptr && parent != nullptr);
  auto node = std::make_unique<Node>();
  node->parent = parent;
  node->page = page;
  node->valid = static_cast<int>(tokens.size());
  node->source = source;
  std::copy(tokens.begin(), tokens.end(), node->tokens.begin());
  node->context = context;
  const auto at = std::lower_bound(parent->children.begin(), parent->children.end(), node.get(),
                                   [](const Node* a, const Node* b) { return Less(a->view(), b->view()); });
  parent->children.insert(at, node.get());
  if (node->valid == kPageTokens) by_context_.emplace(context, page);
  nodes_[page] = std::move(node);
  ++size_;
}

void PrefixIndex::Remove(PageIndex page) {
  Node* node = nodes_[page].get();
  KVS_CHECK(node != nullptr && node->children.empty());
  auto& siblings = node->parent->children;
  const auto at = std::lower_bound(siblings.begin(), siblings.end(), node,
                                   [](const Node* a, const Node* b) { return Less(a->view(), b->view()); });
  KVS_CHECK(at != siblings.end() && *at == node);
  siblings.erase(at);
  if (node->valid == kPageTokens) by_context_.erase(node->context);
  nodes_[page].reset();
  --size_;
}

bool PrefixIndex::IsLeaf(PageIndex page) const { return nodes_[page]->children.empty(); }

PageIndex PrefixIndex::Parent(PageIndex page) const { return nodes_[page]->parent->page; }

const Digest& PrefixIndex::Context(PageIndex page) const { return NodeOrRoot(page)->context; }

std::span<const TokenId> PrefixIndex::Tokens(PageIndex page) const { return nodes_[page]->view(); }

std::uint32_t PrefixIndex::Source(PageIndex page) const { return nodes_[page]->source; }

std::vector<PageIndex> PrefixIndex::Subtree(PageIndex page) const {
  std::vector<PageIndex> pages;
  std::vector<const Node*> open = {NodeOrRoot(page)};
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    if (node->page != kNoPage) pages.push_back(node->page);
    open.insert(open.end(), node->children.begin(), node->children.end());
  }
  return pages;
}

std::vector<PageIndex> PrefixIndex::Continuing(std::span<const TokenId> prefix) const {
  const PrefixMatch match = Find(prefix);
  const auto rest = prefix.subspan(static_cast<std::size_t>(match.full_tokens()));
  // A prefix that ends with a page names that page.
  if (rest.empty() && !match.pages.empty()) return {match.pages.back()};
  std::vector<PageIndex> pages;
  for (const Node* child : NodeOrRoot(match.pages.empty() ? kNoPage : match.pages.back())->children) {
    if (CommonPrefix(child->view(), rest) == static_cast<int>(rest.size())) pages.push_back(child->page);
  }
  return pages;
}

Status PrefixIndex::CheckNode(const Node& node) const {
  const auto where = [&node](const char* what) {
    const std::string name = node.page == kNoPage ? "the root" : "page " + std::to_string(node.page);
    return Internal("prefix index: " + name + ": " + what);
  };
  if (node.valid < 1 || node.valid > kPageTokens) return where("its token count is out of range");
  if (node.valid < kPageTokens && !node.children.empty()) return where("a partly filled page has children");
  for (std::size_t i = 0; i < node.children.size(); ++i) {
    const Node* child = node.children[i];
    if (child->page >= nodes_.size() || nodes_[child->page].get() != child) return where("a child is not in the table");
    if (child->parent != &node) return where("a child names another parent");
    if (ChainContext(node.context, child->view()) != child->context) return where("a child's context is wrong");
    const auto by_context = by_context_.find(child->context);
    const bool found = by_context != by_context_.end() && by_context->second == child->page;
    if (found != (child->valid == kPageTokens)) return where("a child is not found by its context as it should be");
    if (i == 0) continue;
    const Node* left = node.children[i - 1];
    if (!Less(left->view(), child->view())) return where("its children are not sorted");
    if (CommonPrefix(left->view(), child->view()) == left->valid) return where("a child is a prefix of its sibling");
  }
  return OkStatus();
}

Status PrefixIndex::CheckIntegrity() const {
  // Every node has one parent, so walking from the root meets each once or not at all: a count tells cycles and
  // orphans alike.
  std::vector<const Node*> open = {&root_};
  std::size_t met = 0, full = 0;
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    KVS_RETURN_IF_ERROR(CheckNode(*node));
    for (const Node* child : node->children) {
      ++met;
      if (child->valid == kPageTokens) ++full;
      open.push_back(child);
    }
    if (met > size_) return Internal("prefix index: more pages hang in the tree than are counted");
  }
  std::size_t in_table = 0;
  for (const auto& node : nodes_) in_table += node != nullptr;
  if (met != size_ || in_table != size_) return Internal("prefix index: pages in the tree, table and count differ");
  if (full != by_context_.size()) return Internal("prefix index: a context leads to no page");
  return OkStatus();
}

}  // namespace kvshare::agentd
