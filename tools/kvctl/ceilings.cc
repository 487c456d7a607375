#include "tools/kvctl/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "libkvshare/core/status_macros.h"

namespace kvshare::kvctl {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRuns = 6;

double Seconds(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::uint64_t SumWords(const std::uint64_t* words, std::size_t count) {
  // Eight sums keep the load units busy; one would wait for each addition.
  std::uint64_t sums[8] = {};
  for (std::size_t i = 0; i + 8 <= count; i += 8) {
    for (std::size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
  }
  std::uint64_t sum = 0;
  for (std::uint64_t s : sums) sum += s;
  return sum;
}

}  // namespace

Result<double> MeasureMatmulFlops(kernels::Backend& backend) {
  constexpr std::int64_t kM = 1024, kN = 8192, kK = 2048;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> value(-1, 1);
  std::vector<float> weights(static_cast<std::size_t>(kN * kK));
  for (float& w : weights) w = value(random);
  const kernels::HostMatrix part{.data = weights.data(), .rows = kN, .cols = kK};
  KVS_ASSIGN_OR_RETURN(const auto linear, backend.MakeLinear({.parts = std::span(&part, 1), .bias = {}}));
  const kernels::DType compute = backend.capabilities().compute;
  KVS_ASSIGN_OR_RETURN(const auto x,
                       backend.Allocate(static_cast<std::size_t>(kM * kK) * kernels::DTypeBytes(compute)));
  KVS_ASSIGN_OR_RETURN(const auto out, backend.Allocate(static_cast<std::size_t>(kM * kN) * sizeof(float)));
  if (compute == kernels::DType::kF32) {
    std::memcpy(x->data(), weights.data(), x->size());
  } else {
    auto* rows = reinterpret_cast<std::uint16_t*>(x->data());
    for (std::int64_t i = 0; i < kM * kK; ++i) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, &weights[static_cast<std::size_t>(i)], sizeof bits);
      rows[i] = static_cast<std::uint16_t>(bits >> 16);
    }
  }
  const kernels::LinearParams params{
      .x = {.data = x->data(), .dtype = compute, .rows = kM, .cols = kK, .stride = kK},
      .weights = linear.get(),
      .out = {.data = out->data(), .dtype = kernels::DType::kF32, .rows = kM, .cols = kN, .stride = kN}};
  double best = 1e9;
  for (int run = 0; run <= kRuns; ++run) {
    const Clock::time_point start = Clock::now();
    backend.Linear(params);
    KVS_RETURN_IF_ERROR(backend.Sync());
    if (run > 0) best = std::min(best, Seconds(start));  // the first run warms up
  }
  return 2.0 * kM * kN * kK / best;
}

double MeasureReadBytesPerSecond(int threads) {
  const std::size_t count = (std::size_t{256} << 20) / sizeof(std::uint64_t);
  std::vector<std::uint64_t> words(count, 1);
  const std::size_t share = count / static_cast<std::size_t>(threads);
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads));
  double best = 1e9;
  for (int run = 0; run < kRuns; ++run) {
    const Clock::time_point start = Clock::now();
    std::vector<std::thread> workers;
    for (std::size_t t = 0; t < sums.size(); ++t) {
      workers.emplace_back([&, t] { sums[t] += SumWords(words.data() + t * share, share); });
    }
    for (std::thread& worker : workers) worker.join();
    best = std::min(best, Seconds(start));
  }
  // Reading the sums keeps the compiler from dropping the loop.
  volatile std::uint64_t sink = 0;
  for (std::uint64_t sum : sums) sink = sink + sum;
  return static_cast<double>(share * sums.size() * sizeof(std::uint64_t)) / best;
}

}  // namespace kvshare::kvctl
