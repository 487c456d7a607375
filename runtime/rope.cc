#include "runtime/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "runtime/parallel.h"

namespace kvshare::runtime {
namespace {

constexpr double kTwoPi = 2 * std::numbers::pi;

double Llama3(const RopeConfig& rope, double frequency) {
  const double original = static_cast<double>(rope.original_max_position);
  const double wavelength = kTwoPi / frequency;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * frequency / rope.factor + smooth * frequency;
}

// The pair that makes `turns` turns within the original context.
double YarnPair(const RopeConfig& rope, int head_dim, double turns) {
  return head_dim * std::log(static_cast<double>(rope.original_max_position) / (turns * kTwoPi)) /
         (2 * std::log(rope.theta));
}

void Yarn(const RopeConfig& rope, int head_dim, std::vector<double>* frequencies) {
  const double low = std::max(std::floor(YarnPair(rope, head_dim, rope.beta_fast)), 0.0);
  double high = std::min(std::ceil(YarnPair(rope, head_dim, rope.beta_slow)), head_dim - 1.0);
  if (low == high) high += 0.001;  // as transformers keeps the ramp finite
  for (std::size_t j = 0; j < frequencies->size(); ++j) {
    double& f = (*frequencies)[j];
    const double ramp = std::clamp((static_cast<double>(j) - low) / (high - low), 0.0, 1.0);
    f = f / rope.factor * ramp + f * (1 - ramp);
  }
}

}  // namespace

std::vector<double> RopeFrequencies(const RopeConfig& rope, int head_dim) {
  std::vector<double> frequencies(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t j = 0; j < frequencies.size(); ++j) {
    frequencies[j] = std::pow(rope.theta, -2.0 * static_cast<double>(j) / head_dim);
    if (!rope.divisors.empty()) frequencies[j] /= rope.divisors[j];
  }
  switch (rope.kind) {
    case RopeKind::kDefault: break;
    case RopeKind::kLinear:
      for (double& f : frequencies) f /= rope.factor;
      break;
    case RopeKind::kLlama3:
      for (double& f : frequencies) f = Llama3(rope, f);
      break;
    case RopeKind::kYarn: Yarn(rope, head_dim, &frequencies); break;
  }
  return frequencies;
}

double YarnAttentionFactor(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double RopeAttentionFactor(const RopeConfig& rope) {
  if (rope.kind != RopeKind::kYarn) return 1.0;
  return rope.attention_factor > 0 ? rope.attention_factor : YarnAttentionFactor(rope.factor, 1);
}

void FillRopeTable(const RopeConfig& rope, int head_dim, std::int64_t positions, int threads, float* cos, float* sin) {
  const std::vector<double> frequencies = RopeFrequencies(rope, head_dim);
  const double factor = RopeAttentionFactor(rope);
  const auto half = static_cast<std::int64_t>(frequencies.size());
  ParallelFor(positions, 256, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      for (std::int64_t j = 0; j < half; ++j) {
        const double angle = static_cast<double>(p) * frequencies[static_cast<std::size_t>(j)];
        cos[p * half + j] = static_cast<float>(factor * std::cos(angle));
        sin[p * half + j] = static_cast<float>(factor * std::sin(angle));
      }
    }
  });
}

}  // namespace kvshare::runtime
