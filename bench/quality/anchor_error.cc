// What KVCOMM's anchors take away of a chunk's error: whether the offset that other contents have had in the same place
// for the same reader is this content's.
//
//   anchor_error MODEL WORLD_SEED [SAMPLES] [LORA]
//
// The cases of the judge's world in their order. Every chunk is computed after the sink alone (as stored) and in its
// prompt. Where the anchors of its placeholder and reader may stand in for computing it (mode `kvcomm`), their
// offsets are added; else it becomes an anchor. Sums over the chunks that were corrected, K canonical, layers from 1
// on:
//   as stored       squared distances from the chunk in its prompt, over its own squares
//   corrected       the same after the offsets were added, and as a multiple of the former: above 1 they harm
//   first 16, rest  that multiple among the first 16 tokens of the chunks and among the others
//   own offset      how much of what is added is right: cosine between the offsets added and those that were needed
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "bench/quality/prompt_rows.h"
#include "bench/quality/suite.h"

namespace kvshare::quality {
namespace {

constexpr std::int64_t kEdge = 2, kLeast = 32, kFirst = 16;

[[noreturn]] void Die(const Status& status) {
  std::cerr << "anchor_error: " << status.message() << '\n';
  std::exit(1);
}

anchors::KvBlock Rows(runtime::Model& model, std::span<const TokenId> ids) {
  auto rows = PromptRows(model, ids);
  if (!rows.ok()) Die(rows.status());
  return std::move(*rows);
}

anchors::KvBlock Slice(const anchors::KvBlock& block, std::int64_t begin, std::int64_t tokens) {
  anchors::KvBlock slice(block.layers, tokens, block.width);
  for (int layer = 0; layer < block.layers; ++layer) {
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        const auto from = block.row(layer, part, begin + t);
        std::copy(from.begin(), from.end(), slice.row(layer, part, t).begin());
      }
    }
  }
  return slice;
}

// Of K or V.
struct Sums {
  double norm = 0, added = 0;
  double stored[2] = {}, corrected[2] = {};  // the first tokens of chunks, the others

  void Add(const anchors::KvBlock& base, const anchors::KvBlock& fixed, const anchors::KvBlock& real, int part) {
    for (int layer = 1; layer < base.layers; ++layer) {
      for (std::int64_t t = 0; t < base.tokens; ++t) {
        const int rest = t < kFirst ? 0 : 1;
        stored[rest] += SquaredDistance(base, t, real, t, layer, part);
        corrected[rest] += SquaredDistance(fixed, t, real, t, layer, part);
        added += SquaredDistance(fixed, t, base, t, layer, part);
        for (const float x : real.row(layer, part, t)) norm += static_cast<double>(x) * x;
      }
    }
  }
};

int Main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: anchor_error MODEL WORLD_SEED [SAMPLES] [LORA]\n";
    return 2;
  }
  auto model = runtime::LoadModel(argv[1], {.lora = argc > 4 ? argv[4] : ""});
  if (!model.ok()) Die(model.status());
  const auto suite = WorldSuite(
      **model, {.seed = std::strtoull(argv[2], nullptr, 10), .samples = argc > 3 ? std::atoll(argv[3]) : 40});
  if (!suite.ok()) Die(suite.status());
  std::vector<const Case*> cases;
  for (const Case& c : suite->warm_up) cases.push_back(&c);
  for (const JudgedCase& judged : suite->judged) cases.push_back(&judged.c);

  anchors::AnchorPool pool;
  Sums sums[2];
  int corrected = 0, learnt = 0;
  for (const Case* c : cases) {
    const anchors::KvBlock prompt = Rows(**model, c->prompt);
    for (const Chunk& chunk : c->chunks) {
      const std::int64_t begin = chunk.begin + kEdge;
      const std::int64_t tokens = std::min(chunk.end - kEdge, c->suffix_begin) - begin;
      if (tokens < kLeast) continue;
      std::vector<TokenId> alone = {c->prompt.front()};
      alone.insert(alone.end(), c->prompt.begin() + chunk.begin, c->prompt.begin() + chunk.end);
      const anchors::KvBlock base = Slice(Rows(**model, alone), 1 + kEdge, tokens);
      const anchors::KvBlock real = Slice(prompt, begin, tokens);
      if (tokens <= pool.Reach(chunk.slot, c->agent) && pool.Shareable(chunk.slot, base)) {
        anchors::KvBlock fixed = base;
        pool.Correct(chunk.slot, c->agent, &fixed);
        for (int part = 0; part < 2; ++part) sums[part].Add(base, fixed, real, part);
        ++corrected;
      } else {
        pool.Register(chunk.slot, c->agent, chunk.id, anchors::RowsOf(base), anchors::RowsOf(real));
        ++learnt;
      }
    }
  }
  std::printf("%zu cases: %d chunks corrected, %d learnt from, %zu anchors\n", cases.size(), corrected, learnt,
              pool.anchors());
  if (corrected == 0) Die(InvalidArgument("no chunk has anchors that resemble it; take more samples"));
  std::printf("%4s %10s %10s %9s %9s %6s %11s\n", "", "as stored", "corrected", "multiple", "first 16", "rest",
              "own offset");
  for (int part = 0; part < 2; ++part) {
    const Sums& s = sums[part];
    const double before = s.stored[0] + s.stored[1];
    const double after = s.corrected[0] + s.corrected[1];
    // |needed - added|^2 = |needed|^2 + |added|^2 - 2 needed . added
    const double cosine = (before + s.added - after) / 2 / std::sqrt(before * s.added);
    std::printf("%4s %10.4f %10.4f %9.2f %9.2f %6.2f %11.2f\n", part == 0 ? "K" : "V", before / s.norm, after / s.norm,
                after / before, s.corrected[0] / s.stored[0], s.corrected[1] / s.stored[1], cosine);
  }
  return 0;
}

}  // namespace
}  // namespace kvshare::quality

int main(int argc, char** argv) { return kvshare::quality::Main(argc, argv); }
