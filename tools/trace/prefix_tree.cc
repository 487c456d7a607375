#include "tools/trace/prefix_tree.h"

#include <algorithm>
#include <utility>

namespace kvshare::trace {

struct PrefixTree::Node {
  std::vector<TokenId> edge;                                    // the tokens that lead here; empty for the root alone
  int owner = 0;                                                // who brought them
  std::unordered_map<TokenId, std::unique_ptr<Node>> children;  // by the first token of their edge
};

PrefixTree::PrefixTree() : root_(std::make_unique<Node>()) {}

PrefixTree::~PrefixTree() {
  // Chains can be as long as a trace; destructors must not recurse along them.
  std::vector<std::unique_ptr<Node>> pending;
  pending.push_back(std::move(root_));
  while (!pending.empty()) {
    const std::unique_ptr<Node> node = std::move(pending.back());
    pending.pop_back();
    for (auto& [token, child] : node->children) pending.push_back(std::move(child));
  }
}

namespace {

std::size_t Common(std::span<const TokenId> a, std::span<const TokenId> b) {
  const std::size_t n = std::min(a.size(), b.size());
  return static_cast<std::size_t>(
      std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()).first - a.begin());
}

}  // namespace

std::vector<PrefixTree::Run> PrefixTree::Match(std::span<const TokenId> ids) const {
  std::vector<Run> runs;
  const Node* node = root_.get();
  while (!ids.empty()) {
    const auto next = node->children.find(ids[0]);
    if (next == node->children.end()) break;
    node = next->second.get();
    const std::size_t n = Common(node->edge, ids);
    runs.push_back({static_cast<std::int64_t>(n), node->owner});
    if (n < node->edge.size()) break;
    ids = ids.subspan(n);
  }
  return runs;
}

void PrefixTree::Insert(std::vector<TokenId> ids, int owner) {
  Node* node = root_.get();
  std::size_t at = 0;
  while (at < ids.size()) {
    std::unique_ptr<Node>& child = node->children[ids[at]];
    if (!child) {
      child = std::make_unique<Node>();
      child->edge.assign(ids.begin() + static_cast<std::ptrdiff_t>(at), ids.end());
      child->owner = owner;
      return;
    }
    const std::size_t n = Common(child->edge, std::span(ids).subspan(at));
    at += n;
    if (n < child->edge.size() && at < ids.size()) {
      // The edge is cut in two, and the new tokens branch off there.
      auto upper = std::make_unique<Node>();
      upper->edge.assign(child->edge.begin(), child->edge.begin() + static_cast<std::ptrdiff_t>(n));
      upper->owner = child->owner;
      child->edge.erase(child->edge.begin(), child->edge.begin() + static_cast<std::ptrdiff_t>(n));
      const TokenId first = child->edge[0];
      upper->children[first] = std::move(child);
      child = std::move(upper);
    } else if (n < child->edge.size()) {
      return;  // wholly known
    }
    node = child.get();
  }
}

}  // namespace kvshare::trace
