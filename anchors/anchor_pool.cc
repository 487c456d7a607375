#include "anchors/anchor_pool.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::anchors {
namespace {

float Widen(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

// To nearest, ties to even; KV is finite.
std::uint16_t Narrow(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

std::vector<double> Softmax(std::vector<double> x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& value : x) sum += value = std::exp(value - max);
  for (double& value : x) value /= sum;
  return x;
}

}  // namespace

std::vector<const AnchorPool::Anchor*> AnchorPool::LongEnough(const std::string& placeholder,
                                                              std::int64_t tokens) const {
  std::vector<const Anchor*> found;
  const auto anchors = placeholders_.find(placeholder);
  if (anchors == placeholders_.end()) return found;
  for (const Anchor& anchor : anchors->second) {
    if (anchor.tokens >= tokens) found.push_back(&anchor);
  }
  return found;
}

bool AnchorPool::Shareable(const std::string& placeholder, const KvBlock& base) {
  const std::vector<const Anchor*> anchors = LongEnough(placeholder, base.tokens);
  if (anchors.size() < 2) return false;
  std::vector<double> score;
  for (const Anchor* anchor : anchors) {
    double squares = 0;
    for (int layer = 0; layer < base.layers; ++layer) {
      for (std::int64_t t = 0; t < base.tokens; ++t) {
        const auto ours = base.row(layer, 1, t);
        const std::size_t theirs = static_cast<std::size_t>(((layer * 2 + 1) * anchor->tokens + t) * base.width);
        for (std::size_t i = 0; i < ours.size(); ++i) {
          const double difference = ours[i] - Widen(anchor->base[theirs + i]);
          squares += difference * difference;
        }
      }
    }
    score.push_back(-std::sqrt(squares));
  }
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

bool AnchorPool::HasOffset(const std::string& placeholder, const std::string& agent, std::int64_t tokens) const {
  const std::vector<const Anchor*> anchors = LongEnough(placeholder, tokens);
  return std::any_of(anchors.begin(), anchors.end(), [&](const Anchor* a) { return a->offsets.contains(agent); });
}

void AnchorPool::Correct(const std::string& placeholder, const std::string& agent, KvBlock* block) const {
  std::vector<const Anchor*> anchors;
  for (const Anchor* anchor : LongEnough(placeholder, block->tokens)) {
    if (anchor->offsets.contains(agent)) anchors.push_back(anchor);
  }
  if (anchors.empty()) return;
  const std::int64_t width = block->width;
  for (int part = 0; part < 2; ++part) {
    for (std::int64_t t = 0; t < block->tokens; ++t) {
      std::vector<double> score;
      for (const Anchor* anchor : anchors) {
        double sum = 0;
        for (int layer = 0; layer < block->layers; ++layer) {
          const auto ours = block->row(layer, part, t);
          const std::size_t theirs = static_cast<std::size_t>(((layer * 2 + part) * anchor->tokens + t) * width);
          for (std::size_t i = 0; i < ours.size(); ++i) sum += std::abs(ours[i] - Widen(anchor->base[theirs + i]));
        }
        score.push_back(-sum / static_cast<double>(block->layers * width));
      }
      const std::vector<double> weight = Softmax(std::move(score));
      for (int layer = 1; layer < block->layers; ++layer) {
        const auto row = block->row(layer, part, t);
        for (std::size_t a = 0; a < anchors.size(); ++a) {
          const Stored& offset = anchors[a]->offsets.at(agent);
          const std::size_t at = static_cast<std::size_t>(((layer * 2 + part) * anchors[a]->tokens + t) * width);
          const auto w = static_cast<float>(weight[a]);
          for (std::size_t i = 0; i < row.size(); ++i) row[i] += w * Widen(offset[at + i]);
        }
      }
    }
  }
}

void AnchorPool::Register(const std::string& placeholder, const std::string& agent, const std::string& content,
                          const KvBlock& base, const KvBlock& real) {
  KVS_CHECK(base.values.size() == real.values.size() && base.tokens == real.tokens && base.tokens > 0);
  Anchors& anchors = placeholders_[placeholder];
  auto anchor = std::find_if(anchors.begin(), anchors.end(),
                             [&](const Anchor& a) { return a.content == content && a.tokens == base.tokens; });
  if (anchor == anchors.end()) {
    if (anchors.size() >= options_.max_anchors) EvictFrom(anchors);
    anchors.push_back({.content = content, .tokens = base.tokens, .serial = next_serial_++});
    anchor = std::prev(anchors.end());
    for (const float value : base.values) anchor->base.push_back(Narrow(value));
    bytes_ += BytesOf(*anchor);
  }
  bytes_ -= BytesOf(*anchor);
  Stored& offset = anchor->offsets[agent];
  offset.resize(base.values.size());
  for (std::size_t i = 0; i < offset.size(); ++i) offset[i] = Narrow(real.values[i] - Widen(anchor->base[i]));
  bytes_ += BytesOf(*anchor);
  KeepWithinBytes();
}

std::size_t AnchorPool::anchors() const {
  std::size_t count = 0;
  for (const auto& [name, anchors] : placeholders_) count += anchors.size();
  return count;
}

std::size_t AnchorPool::BytesOf(const Anchor& anchor) {
  std::size_t values = anchor.base.size();
  for (const auto& [agent, offset] : anchor.offsets) values += offset.size();
  return values * sizeof(std::uint16_t);
}

// Among the oldest, the one used least; of equals the oldest.
void AnchorPool::EvictFrom(Anchors& anchors) {
  const auto window = anchors.begin() + static_cast<std::ptrdiff_t>(std::min(options_.window, anchors.size()));
  const auto victim =
      std::min_element(anchors.begin(), window, [](const Anchor& a, const Anchor& b) { return a.used < b.used; });
  bytes_ -= BytesOf(*victim);
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
