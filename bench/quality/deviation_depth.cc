// Why choosing tokens by one layer's deviation (CacheBlend, dhd) does or does not help: where a chunk that was stored
// alone differs from the same chunk in its prompt, layer by layer, and whether the layer that a policy looks at knows.
//
//   deviation_depth MODEL WORLD_SEED [SAMPLES] [LORA]
//
// Every chunk of the world's questions is computed after the sink alone and in its prompt. Deviation of a token in a
// layer: the squared distance of its two values (V). For each layer, over all chunk tokens of a case, means over cases:
//   relative        sum of squared distances over the sum of squared values
//   rank corr.      Spearman between the check layer's deviations and this layer's
//   by check        of this layer's deviation, what the 15 % of tokens that the check layer would choose hold
//   by itself       what this layer's own 15 % hold: no choice of as many tokens holds more
//   first 16        what the first 16 tokens of each chunk hold (epic's choice), and these tokens' share of all
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

#include "bench/quality/prompt_rows.h"
#include "bench/quality/statistics.h"
#include "bench/quality/suite.h"
#include "runtime/model.h"

namespace kvshare::quality {
namespace {

constexpr std::int64_t kEdge = 2, kLeast = 32, kFirst = 16;
constexpr double kShare = 0.15;
constexpr std::size_t kCheckLayer = 1;  // CacheBlend's
constexpr int kValues = 1;              // the part of a block that V is

[[noreturn]] void Die(const Status& status) {
  std::cerr << "deviation_depth: " << status.message() << '\n';
  std::exit(1);
}

anchors::KvBlock Rows(runtime::Model& model, std::span<const TokenId> ids) {
  auto rows = PromptRows(model, ids);
  if (!rows.ok()) Die(rows.status());
  return std::move(*rows);
}

std::vector<std::size_t> Largest(const std::vector<double>& values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return values[a] > values[b]; });
  order.resize(static_cast<std::size_t>(kShare * static_cast<double>(values.size())));
  return order;
}

double Held(const std::vector<double>& values, const std::vector<std::size_t>& tokens) {
  double held = 0;
  for (const std::size_t t : tokens) held += values[t];
  return held / std::max(1e-30, std::accumulate(values.begin(), values.end(), 0.0));
}

struct LayerSums {
  double squares = 0, norm = 0, correlation = 0, by_check = 0, by_itself = 0, by_first = 0;
};

int Main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: deviation_depth MODEL WORLD_SEED [SAMPLES] [LORA]\n";
    return 2;
  }
  auto model = runtime::LoadModel(argv[1], {.lora = argc > 4 ? argv[4] : ""});
  if (!model.ok()) Die(model.status());
  const auto suite = WorldSuite(
      **model, {.seed = std::strtoull(argv[2], nullptr, 10), .samples = argc > 3 ? std::atoll(argv[3]) : 40});
  if (!suite.ok()) Die(suite.status());
  const auto layers = static_cast<std::size_t>((*model)->kv_layout().num_layers);
  std::vector<LayerSums> sums(layers);
  int cases = 0;
  double first_tokens = 0, tokens = 0;
  for (const JudgedCase& judged : suite->judged) {
    const Case& c = judged.c;
    if (!judged.crosses) continue;
    const anchors::KvBlock fresh = Rows(**model, c.prompt);
    std::vector<std::vector<double>> squares(layers);
    std::vector<std::size_t> first;
    std::size_t moved = 0;
    for (const Chunk& chunk : c.chunks) {
      const std::int64_t begin = chunk.begin + kEdge;
      const std::int64_t end = std::min(chunk.end - kEdge, c.suffix_begin);
      if (end - begin < kLeast) continue;
      std::vector<TokenId> alone = {c.prompt.front()};
      alone.insert(alone.end(), c.prompt.begin() + chunk.begin, c.prompt.begin() + chunk.end);
      const anchors::KvBlock stored = Rows(**model, alone);
      for (std::int64_t t = begin; t < end; ++t) {
        if (t - begin < kFirst) first.push_back(moved);
        ++moved;
        for (std::size_t layer = 0; layer < layers; ++layer) {
          const int at = static_cast<int>(layer);
          const double distance = SquaredDistance(fresh, t, stored, 1 + t - chunk.begin, at, kValues);
          for (const float v : fresh.row(at, kValues, t)) sums[layer].norm += static_cast<double>(v) * v;
          squares[layer].push_back(distance);
          sums[layer].squares += distance;
        }
      }
    }
    if (moved < 2 * kLeast) continue;
    ++cases;
    tokens += static_cast<double>(moved);
    first_tokens += static_cast<double>(first.size());
    const auto chosen = Largest(squares[kCheckLayer]);
    for (std::size_t layer = 0; layer < layers; ++layer) {
      sums[layer].correlation += Spearman(squares[kCheckLayer], squares[layer]);
      sums[layer].by_check += Held(squares[layer], chosen);
      sums[layer].by_itself += Held(squares[layer], Largest(squares[layer]));
      sums[layer].by_first += Held(squares[layer], first);
    }
  }
  if (cases == 0) Die(InvalidArgument("no case needs several chunks that are long enough; take more samples"));
  std::printf("%d cases that need several chunks, %.0f chunk tokens, %.0f %% of them among the first %d of a chunk\n",
              cases, tokens, 100 * first_tokens / tokens, static_cast<int>(kFirst));
  std::printf("%5s %9s %11s %9s %10s %9s\n", "layer", "relative", "rank corr.", "by check", "by itself", "first 16");
  for (std::size_t layer = 0; layer < layers; ++layer) {
    const LayerSums& s = sums[layer];
    std::printf("%5zu %9.4f %11.2f %8.0f %% %8.0f %% %7.0f %%\n", layer, s.squares / s.norm, s.correlation / cases,
                100 * s.by_check / cases, 100 * s.by_itself / cases, 100 * s.by_first / cases);
  }
  return 0;
}

}  // namespace
}  // namespace kvshare::quality

int main(int argc, char** argv) { return kvshare::quality::Main(argc, argv); }
