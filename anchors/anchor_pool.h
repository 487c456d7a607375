// KVCOMM's anchors (arXiv 2510.12872, as specified in its §3 and its published code): samples of how the KV of a
// placeholder's content changes when it is read by a certain agent, and the interpolation between them.
//
// Where the published code departs from the paper or breaks, this follows the paper: keys are kept and corrected in the
// canonical (un-rotated) frame, so an offset is right at any position; an anchor that has no offset for an agent gives
// no correction instead of an error; memory is bounded and counted. The text after a placeholder is always computed
// here, so only the placeholder's own offset is kept (docs/design/repair.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "anchors/q8.h"

namespace kvshare::anchors {

// KV of a run of tokens as fp32: [layers][K, V][tokens][width], K canonical. width = num_kv_heads * head_dim.
struct KvBlock {
  int layers = 0;
  std::int64_t tokens = 0;
  std::int64_t width = 0;
  std::vector<float> values;

  KvBlock() = default;
  KvBlock(int num_layers, std::int64_t num_tokens, std::int64_t row_width)
      : layers(num_layers), tokens(num_tokens), width(row_width) {
    values.resize(static_cast<std::size_t>(num_layers * 2 * num_tokens * row_width));
  }
  // Row of one token: part 0 is K, 1 is V.
  std::span<float> row(int layer, int part, std::int64_t token) {
    return std::span(values).subspan(Offset(layer, part, token), static_cast<std::size_t>(width));
  }
  std::span<const float> row(int layer, int part, std::int64_t token) const {
    return std::span(values).subspan(Offset(layer, part, token), static_cast<std::size_t>(width));
  }
  std::size_t Offset(int layer, int part, std::int64_t token) const {
    return static_cast<std::size_t>(((layer * 2 + part) * tokens + token) * width);
  }
};

// The rows of such a block, read one by one as they are wanted: what is only looked at once takes no memory of its own.
struct KvRows {
  int layers = 0;
  std::int64_t tokens = 0;
  std::int64_t width = 0;
  std::function<void(int layer, int part, std::int64_t token, std::span<float> row)> read;

  KvBlock ToBlock() const;
};

KvRows RowsOf(const KvBlock& block);  // which must outlive them

struct AnchorOptions {
  std::size_t max_anchors = 20;   // per placeholder (V in the paper)
  double entropy_gate = 0.3;      // gamma: new content is shareable where the weights' entropy is at most this share
  std::size_t window = 5;         // eviction looks at so many of the oldest anchors
  double top_mass = 0.9;          // anchors that make up this much of the weight count as used
  std::size_t max_agents = 4096;  // whose offsets an anchor has; one more takes another's place
  std::size_t max_bytes = std::size_t{512} << 20;  // of all anchors; the least used are dropped beyond it
};

// An anchor as it is handed out and taken back (anchors/anchor_record.h): everything but its place in the pool's order.
// Rows lie as KvBlock's do, each in Q8Blocks(width) blocks: half the memory of bf16, in which KV itself is kept, and
// offsets are small beside what they correct. They are shared and never change, so that a copy of an anchor costs
// nothing.
struct Anchor {
  using Values = std::shared_ptr<const std::vector<Q8Block>>;

  std::string placeholder;
  std::string content;
  int layers = 0;
  std::int64_t tokens = 0;
  std::int64_t width = 0;
  Values base;
  std::map<std::string, Values> offsets;  // by agent
  std::int64_t used = 0;
  // Names this content of the anchor within its pool, in order of insertion. An anchor that learns another agent's
  // offset keeps its serial and gets a new version.
  std::uint64_t serial = 0;
  std::uint64_t version = 0;

  // Of one of its Values; part as in KvBlock.
  const Q8Block* Row(const Values& values, int layer, int part, std::int64_t token) const {
    const auto row = static_cast<std::size_t>((layer * 2 + part) * tokens + token);
    return values->data() + row * Q8Blocks(static_cast<std::size_t>(width));
  }
  std::size_t bytes() const { return (1 + offsets.size()) * base->size() * sizeof(Q8Block); }
};

class AnchorPool {
 public:
  explicit AnchorPool(const AnchorOptions& options = {}) : options_(options) {}

  // Whether the anchors of `placeholder` can stand in for a dense run over new content `base`: at least two anchors are
  // as long, and the softmax of their (negative) distances in V is sharp enough: entropy <= gamma log2(anchors)
  // (eq. 5). Counts the anchors that carry the weight as used.
  bool Shareable(const std::string& placeholder, const KvBlock& base);
  // The same of content of `tokens` tokens whose distances, from LongEnough(placeholder, tokens) in that order,
  // somebody else has measured.
  bool Shareable(const std::string& placeholder, std::int64_t tokens, std::span<const double> distances);
  // The anchors of at least so many tokens, oldest first; until the pool changes.
  std::vector<const Anchor*> LongEnough(const std::string& placeholder, std::int64_t tokens) const;

  // What can be said before `base` is read: content of more tokens than this is neither shareable nor corrected.
  std::int64_t Reach(const std::string& placeholder, const std::string& agent) const;

  // Whether anchors for `tokens` tokens, each with one offset, leave room for others like them: at most a quarter of
  // max_bytes. What is larger would be gone before it is of use.
  bool HasRoomFor(int layers, std::int64_t tokens, std::int64_t width) const;

  // Adds the weighted offsets of the anchors, as `agent` saw them, to K and V of `block`, from layer 1 on: layer 0
  // depends on token and position alone. Weights per token: softmax over anchors of the negative mean absolute
  // difference over layers, heads and channels.
  void Correct(const std::string& placeholder, const std::string& agent, KvBlock* block) const;

  // A dense run gave the truth: `base` is what was stored, `real` what `agent` computed. `content` names the text;
  // the same content again adds the agent's offset to the anchor that is there.
  void Register(const std::string& placeholder, const std::string& agent, const std::string& content,
                const KvRows& base, const KvRows& real);

  std::size_t bytes() const { return bytes_; }
  std::size_t anchors() const;
  // Changes with every Register: what was saved at this number is still what there is.
  std::uint64_t version() const { return next_version_; }

  // All anchors, oldest first. Cheap: values are shared.
  std::vector<Anchor> Snapshot() const;
  // Takes back what a Snapshot of an earlier pool of the same session and model gave, oldest first, as older than
  // anything registered since; what is known by content here is left out, being newer, but for other agents' offsets
  // from the same base. Limits hold as ever. A pool that has nothing is afterwards as the earlier one was, to the bit.
  void Restore(std::vector<Anchor> saved);

 private:
  using Anchors = std::deque<Anchor>;  // in order of insertion

  void EvictFrom(Anchors& anchors);
  void KeepWithinBytes();

  AnchorOptions options_;
  std::map<std::string, Anchors> placeholders_;
  std::size_t bytes_ = 0;
  std::uint64_t next_serial_ = 1;
  std::uint64_t next_version_ = 1;
};

}  // namespace kvshare::anchors
