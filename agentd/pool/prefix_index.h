// PrefixIndex: which token prefixes are stored, and on which pages. Metadata only: it neither counts references nor
// touches KV; KvPool does the one, the engine the other.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/paged_kv.h"
#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/hash.h"

namespace kvshare::agentd {

using kernels::kPageTokens;
using kernels::PageIndex;

inline constexpr PageIndex kNoPage = static_cast<PageIndex>(-1);

// The longest stored prefix of a token sequence.
//
//   tokens:  0 ........... 64 ........... 128 ....... 128+tail_tokens ............ n
//            |-- pages[0] --|-- pages[1] --|-- rows of `tail` --|------ not stored ------|
//                 shared as they are         copied to a private page
struct PrefixMatch {
  std::vector<PageIndex> pages;  // full pages, in order
  std::vector<Digest> contexts;  // context after each of them
  PageIndex tail = kNoPage;      // a page whose first tail_tokens tokens match too
  int tail_tokens = 0;           // 0..63 (0 exactly when there is no tail)
  bool diverges = false;         // something stored shares the match, of at least one token, and goes on differently

  std::int64_t full_tokens() const { return static_cast<std::int64_t>(pages.size()) * kPageTokens; }
  std::int64_t tokens() const { return full_tokens() + tail_tokens; }
  void DropTail() {
    tail = kNoPage;
    tail_tokens = 0;
  }
  // Leaves its first `count` tokens, where it has more.
  void Cut(std::int64_t count);
};

// A tree of pages: a node is one page with the 1..64 tokens it holds, its parent the page before it.
//
// Owned by KvPool; one thread. Invariants (CheckIntegrity holds them):
//   1. Only full pages (64 tokens) have children.
//   2. No page's tokens are a prefix of a sibling's: the longer page serves both. Siblings are sorted by their tokens,
//      so the longest common prefix with any of them is that with one of the two neighbours of the insertion point.
//   3. A full page is also found by its context, the chained digest of everything up to its end. The digest only leads
//      there: its 64 tokens and its parent are compared before it counts.
class PrefixIndex {
 public:
  // `root`: what all contexts start from (RootContext). Pages are < num_pages.
  PrefixIndex(PageIndex num_pages, const Digest& root);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;  // nodes point at each other and at the root
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  PrefixMatch Find(std::span<const TokenId> tokens) const;

  // Room for a page of `tokens` after `parent` (kNoPage: at the start of sequences):
  struct Placement {
    PageIndex existing = kNoPage;    // a page that already holds these tokens, perhaps more: nothing to insert
    PageIndex superseded = kNoPage;  // a shorter page that the new one makes useless: remove it
    Digest context;                  // after the page; for a shorter page, the name of its tokens in this place
  };
  // Requires 1..64 tokens; `parent` full and indexed.
  Placement Place(PageIndex parent, std::span<const TokenId> tokens) const;

  // Requires a Placement without `existing`, whose `superseded` page has been removed.
  void Insert(PageIndex page, PageIndex parent, std::span<const TokenId> tokens, const Digest& context,
              std::uint32_t source);
  // Requires an indexed page without children.
  void Remove(PageIndex page);

  bool Contains(PageIndex page) const { return nodes_[page] != nullptr; }
  bool IsLeaf(PageIndex page) const;
  PageIndex Parent(PageIndex page) const;  // kNoPage at the top
  const Digest& Context(PageIndex page) const;
  const Digest& root() const { return root_.context; }
  std::span<const TokenId> Tokens(PageIndex page) const;
  std::uint32_t Source(PageIndex page) const;  // whatever Insert was given
  PageIndex size() const { return size_; }

  // `page` and all that continue it, each after the one before it; kNoPage: all pages.
  std::vector<PageIndex> Subtree(PageIndex page) const;
  // The topmost pages whose sequence, up to their end, begins with `prefix`.
  std::vector<PageIndex> Continuing(std::span<const TokenId> prefix) const;

  // Internal naming the first broken invariant.
  Status CheckIntegrity() const;

 private:
  struct Node {
    Node* parent = nullptr;
    PageIndex page = kNoPage;
    int valid = 0;
    std::uint32_t source = 0;
    std::array<TokenId, kPageTokens> tokens{};
    Digest context;
    std::vector<Node*> children;  // sorted by tokens

    std::span<const TokenId> view() const { return std::span(tokens).first(static_cast<std::size_t>(valid)); }
  };

  const Node* NodeOrRoot(PageIndex page) const { return page == kNoPage ? &root_ : nodes_[page].get(); }
  Node* NodeOrRoot(PageIndex page) { return page == kNoPage ? &root_ : nodes_[page].get(); }
  const Node* FindFull(const Node& parent, const Digest& context, std::span<const TokenId> tokens) const;
  Status CheckNode(const Node& node) const;

  Node root_;
  std::vector<std::unique_ptr<Node>> nodes_;                      // by page
  std::unordered_map<Digest, PageIndex, DigestHash> by_context_;  // full pages
  PageIndex size_ = 0;
};

}  // namespace kvshare::agentd
