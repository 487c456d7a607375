#include "anchors/anchor_pool.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::anchors {
namespace {

// Anchors that an entropy can be taken of.
constexpr std::size_t kFewest = 2;

std::vector<double> Softmax(std::vector<double> x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& value : x) sum += value = std::exp(value - max);
  for (double& value : x) value /= sum;
  return x;
}

// Blocks of one Anchor::Values.
std::size_t BlocksOf(int layers, std::int64_t tokens, std::int64_t width) {
  return static_cast<std::size_t>(layers * 2 * tokens) * Q8Blocks(static_cast<std::size_t>(width));
}

Anchor::Values Encode(const KvRows& rows) {
  std::vector<Q8Block> values(BlocksOf(rows.layers, rows.tokens, rows.width));
  const std::size_t blocks = Q8Blocks(static_cast<std::size_t>(rows.width));
  std::vector<float> row(static_cast<std::size_t>(rows.width));
  std::size_t at = 0;
  for (int layer = 0; layer < rows.layers; ++layer) {
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t t = 0; t < rows.tokens; ++t, at += blocks) {
        rows.read(layer, part, t, row);
        EncodeQ8(row, values.data() + at);
      }
    }
  }
  return std::make_shared<const std::vector<Q8Block>>(std::move(values));
}

// Of what was stored, not of the anchor's base: what is lost in coding that would be added to what is corrected.
KvRows Difference(const KvRows& real, const KvRows& base) {
  KvRows rows = real;
  rows.read = [&real, &base, stored = std::vector<float>(static_cast<std::size_t>(base.width))](
                  int layer, int part, std::int64_t token, std::span<float> row) mutable {
    real.read(layer, part, token, row);
    base.read(layer, part, token, stored);
    for (std::size_t i = 0; i < row.size(); ++i) row[i] -= stored[i];
  };
  return rows;
}

}  // namespace

KvBlock KvRows::ToBlock() const {
  KvBlock block(layers, tokens, width);
  for (int layer = 0; layer < layers; ++layer) {
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t t = 0; t < tokens; ++t) read(layer, part, t, block.row(layer, part, t));
    }
  }
  return block;
}

KvRows RowsOf(const KvBlock& block) {
  return {block.layers, block.tokens, block.width,
          [&block](int layer, int part, std::int64_t token, std::span<float> row) {
            const auto from = block.row(layer, part, token);
            std::copy(from.begin(), from.end(), row.begin());
          }};
}

std::vector<const Anchor*> AnchorPool::LongEnough(const std::string& placeholder, std::int64_t tokens) const {
  std::vector<const Anchor*> found;
  const auto anchors = placeholders_.find(placeholder);
  if (anchors == placeholders_.end()) return found;
  for (const Anchor& anchor : anchors->second) {
    if (anchor.tokens >= tokens) found.push_back(&anchor);
  }
  return found;
}

bool AnchorPool::Shareable(const std::string& placeholder, const KvBlock& base) {
  std::vector<double> distances;
  for (const Anchor* anchor : LongEnough(placeholder, base.tokens)) {
    double squares = 0;
    for (int layer = 0; layer < base.layers; ++layer) {
      for (std::int64_t t = 0; t < base.tokens; ++t) {
        squares += SumOfSquaredDifferences(base.row(layer, 1, t), anchor->Row(anchor->base, layer, 1, t));
      }
    }
    distances.push_back(std::sqrt(squares));
  }
  return Shareable(placeholder, base.tokens, distances);
}

bool AnchorPool::Shareable(const std::string& placeholder, std::int64_t tokens, std::span<const double> distances) {
  const std::vector<const Anchor*> anchors = LongEnough(placeholder, tokens);
  KVS_CHECK(distances.size() == anchors.size());
  if (anchors.size() < kFewest) return false;
  std::vector<double> score;
  for (const double distance : distances) score.push_back(-distance);
  const std::vector<double> weight = Softmax(std::move(score));
  double entropy = 0;
  for (const double w : weight) entropy -= w > 0 ? w * std::log2(w) : 0.0;
  if (entropy > options_.entropy_gate * std::log2(static_cast<double>(anchors.size()))) return false;

  std::vector<std::size_t> order(weight.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return weight[a] > weight[b]; });
  double mass = 0;
  for (const std::size_t i : order) {
    const std::uint64_t serial = anchors[i]->serial;
    for (Anchor& anchor : placeholders_.find(placeholder)->second) anchor.used += anchor.serial == serial;
    mass += weight[i];
    if (mass >= options_.top_mass) break;
  }
  return true;
}

std::int64_t AnchorPool::Reach(const std::string& placeholder, const std::string& agent) const {
  std::vector<std::int64_t> lengths;
  std::int64_t with_offset = 0;
  for (const Anchor* anchor : LongEnough(placeholder, 0)) {
    lengths.push_back(anchor->tokens);
    if (anchor->offsets.contains(agent)) with_offset = std::max(with_offset, anchor->tokens);
  }
  if (lengths.size() < kFewest) return 0;
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  return std::min(with_offset, lengths[kFewest - 1]);
}

bool AnchorPool::HasRoomFor(int layers, std::int64_t tokens, std::int64_t width) const {
  return 2 * BlocksOf(layers, tokens, width) * sizeof(Q8Block) <= options_.max_bytes / 4;
}

void AnchorPool::Correct(const std::string& placeholder, const std::string& agent, KvBlock* block) const {
  std::vector<const Anchor*> anchors;
  for (const Anchor* anchor : LongEnough(placeholder, block->tokens)) {
    if (anchor->offsets.contains(agent)) anchors.push_back(anchor);
  }
  if (anchors.empty()) return;
  for (int part = 0; part < 2; ++part) {
    for (std::int64_t t = 0; t < block->tokens; ++t) {
      std::vector<double> score;
      for (const Anchor* anchor : anchors) {
        double sum = 0;
        for (int layer = 0; layer < block->layers; ++layer) {
          sum += SumOfDifferences(block->row(layer, part, t), anchor->Row(anchor->base, layer, part, t));
        }
        score.push_back(-sum / static_cast<double>(block->layers * block->width));
      }
      const std::vector<double> weight = Softmax(std::move(score));
      for (int layer = 1; layer < block->layers; ++layer) {
        for (std::size_t a = 0; a < anchors.size(); ++a) {
          const Anchor::Values& offset = anchors[a]->offsets.at(agent);
          AddQ8(anchors[a]->Row(offset, layer, part, t), static_cast<float>(weight[a]), block->row(layer, part, t));
        }
      }
    }
  }
}

void AnchorPool::Register(const std::string& placeholder, const std::string& agent, const std::string& content,
                          const KvRows& base, const KvRows& real) {
  KVS_CHECK(base.layers == real.layers && base.tokens == real.tokens && base.width == real.width && base.tokens > 0);
  Anchors& anchors = placeholders_[placeholder];
  auto anchor = std::find_if(anchors.begin(), anchors.end(),
                             [&](const Anchor& a) { return a.content == content && a.tokens == base.tokens; });
  if (anchor == anchors.end()) {
    if (anchors.size() >= options_.max_anchors) EvictFrom(anchors);
    anchors.push_back({.placeholder = placeholder,
                       .content = content,
                       .layers = base.layers,
                       .tokens = base.tokens,
                       .width = base.width,
                       .base = Encode(base),
                       .serial = next_serial_++});
    anchor = std::prev(anchors.end());
    bytes_ += anchor->bytes();
  }
  bytes_ -= anchor->bytes();
  if (anchor->offsets.size() >= options_.max_agents && !anchor->offsets.contains(agent)) {
    anchor->offsets.erase(anchor->offsets.begin());
  }
  anchor->offsets[agent] = Encode(Difference(real, base));
  anchor->version = next_version_++;
  bytes_ += anchor->bytes();
  KeepWithinBytes();
}

std::vector<Anchor> AnchorPool::Snapshot() const {
  std::vector<Anchor> all;
  for (const auto& [name, anchors] : placeholders_) all.insert(all.end(), anchors.begin(), anchors.end());
  std::sort(all.begin(), all.end(), [](const Anchor& a, const Anchor& b) { return a.serial < b.serial; });
  return all;
}

void AnchorPool::Restore(std::vector<Anchor> saved) {
  std::vector<Anchor> since = Snapshot();
  // Of what is in both the newer one stays, with what other agents' offsets were from the same base.
  const auto learnt_anew = [&](const Anchor& old) {
    const auto newer = std::find_if(since.begin(), since.end(), [&old](const Anchor& a) {
      return a.placeholder == old.placeholder && a.content == old.content && a.tokens == old.tokens;
    });
    if (newer == since.end()) return false;
    if (*newer->base != *old.base) return true;
    for (const auto& offset : old.offsets) {
      if (newer->offsets.size() < options_.max_agents) newer->offsets.insert(offset);
    }
    return true;
  };
  std::erase_if(saved, learnt_anew);
  placeholders_.clear();
  bytes_ = 0;
  // What was saved keeps its names, so that who saved it knows it again; what is newer gets new ones.
  for (const Anchor& anchor : saved) {
    next_serial_ = std::max(next_serial_, anchor.serial + 1);
    next_version_ = std::max(next_version_, anchor.version + 1);
  }
  for (Anchor& anchor : since) {
    anchor.serial = next_serial_++;
    anchor.version = next_version_++;
  }
  for (std::vector<Anchor>* part : {&saved, &since}) {
    for (Anchor& anchor : *part) {
      Anchors& anchors = placeholders_[anchor.placeholder];
      if (anchors.size() >= options_.max_anchors) EvictFrom(anchors);
      bytes_ += anchor.bytes();
      anchors.push_back(std::move(anchor));
    }
  }
  KeepWithinBytes();
}

std::size_t AnchorPool::anchors() const {
  std::size_t count = 0;
  for (const auto& [name, anchors] : placeholders_) count += anchors.size();
  return count;
}

// Among the oldest, the one used least; of equals the oldest.
void AnchorPool::EvictFrom(Anchors& anchors) {
  const auto window = anchors.begin() + static_cast<std::ptrdiff_t>(std::min(options_.window, anchors.size()));
  const auto victim =
      std::min_element(anchors.begin(), window, [](const Anchor& a, const Anchor& b) { return a.used < b.used; });
  bytes_ -= victim->bytes();
  anchors.erase(victim);
}

void AnchorPool::KeepWithinBytes() {
  while (bytes_ > options_.max_bytes) {
    Anchors* oldest = nullptr;
    for (auto& [name, anchors] : placeholders_) {
      if (anchors.empty()) continue;
      if (oldest == nullptr || anchors.front().serial < oldest->front().serial) oldest = &anchors;
    }
    KVS_CHECK(oldest != nullptr);
    EvictFrom(*oldest);
  }
}

}  // namespace kvshare::anchors
