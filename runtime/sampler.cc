#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace kvshare::runtime {
namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose output bits each depend on all input bits.
std::uint64_t Mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// A number in [0, 1) from (seed, step): the step-th output of a SplitMix64 whose state begins at Mix(seed), so that
// neighbouring seeds are not shifted copies of one stream.
double Uniform(std::uint64_t seed, std::int64_t step) {
  constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15u;
  const std::uint64_t state = Mix(seed + kGamma) + kGamma * (static_cast<std::uint64_t>(step) + 1);
  return static_cast<double>(Mix(state) >> 11) * 0x1.0p-53;
}

// NaN can never be wanted: it counts as impossible.
float Clean(float logit) { return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit; }

TokenId Greedy(std::span<const float> logits) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < logits.size(); ++i) {
    if (Clean(logits[i]) > Clean(logits[best])) best = i;
  }
  return static_cast<TokenId>(best);
}

struct Choice {
  float logit;
  TokenId id;
  double weight;  // proportional to its probability
};

bool MoreLikely(const Choice& a, const Choice& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }
bool LessLikely(const Choice& a, const Choice& b) { return MoreLikely(b, a); }

// The shortest run of most likely choices whose weights reach `share` of the total; at least one.
void KeepTopP(double share, std::vector<Choice>* choices) {
  double total = 0;
  for (const Choice& c : *choices) total += c.weight;
  // A heap, not a sort: of a vocabulary of 150,000 only a few choices are taken as a rule.
  std::make_heap(choices->begin(), choices->end(), LessLikely);
  double reached = 0;
  std::vector<Choice> kept;
  while (!choices->empty() && (kept.empty() || reached < share * total)) {
    std::pop_heap(choices->begin(), choices->end(), LessLikely);
    kept.push_back(choices->back());
    reached += kept.back().weight;
    choices->pop_back();
  }
  choices->swap(kept);
}

}  // namespace

TokenId SampleToken(std::span<const float> logits, const SamplingParams& params, std::int64_t step) {
  if (logits.empty()) return 0;
  const TokenId greedy = Greedy(logits);
  const float top = Clean(logits[static_cast<std::size_t>(greedy)]);
  // Also when nothing is possible, and for a temperature that is not a positive number.
  if (!(params.temperature > 0) || top == -std::numeric_limits<float>::infinity()) return greedy;

  std::vector<Choice> choices;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float logit = Clean(logits[i]);
    // Infinite logits share everything among them.
    const double distance = logit == top ? 0.0 : (static_cast<double>(logit) - top) / params.temperature;
    const double weight = std::exp(distance);
    if (weight > 0) choices.push_back({logit, static_cast<TokenId>(i), weight});
  }
  const auto k = static_cast<std::size_t>(std::max(params.top_k, 0));
  if (k > 0 && k < choices.size()) {
    const auto end = choices.begin() + static_cast<std::ptrdiff_t>(k);
    std::nth_element(choices.begin(), end - 1, choices.end(), MoreLikely);
    choices.erase(end, choices.end());
    std::sort(choices.begin(), choices.end(), MoreLikely);
  }
  if (params.top_p < 1.0f) KeepTopP(std::max(static_cast<double>(params.top_p), 0.0), &choices);

  double total = 0;
  for (const Choice& c : choices) total += c.weight;
  double left = Uniform(params.seed, step) * total;
  for (const Choice& c : choices) {
    left -= c.weight;
    if (left < 0) return c.id;
  }
  return choices.back().id;  // rounding: the draw fell on the very end
}

Status CheckLogits(std::span<const float> logits) {
  for (const float logit : logits) {
    if (logit > -std::numeric_limits<float>::infinity()) return OkStatus();
  }
  return Internal(
      "no token has a chance, the logits are not numbers: damaged weights, or values too large for the arithmetic's "
      "type (see --dtype)");
}

}  // namespace kvshare::runtime
