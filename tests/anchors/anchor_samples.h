// Small pools of anchors that are the same whoever makes them, and a way to say that two are equal to the bit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "anchors/anchor_pool.h"
#include "anchors/anchor_record.h"

namespace kvshare::anchors {

inline constexpr int kSampleLayers = 2;
inline constexpr std::int64_t kSampleWidth = 4;

inline KvBlock SampleBlock(std::uint32_t seed, std::int64_t tokens) {
  KvBlock block(kSampleLayers, tokens, kSampleWidth);
  for (float& value : block.values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
  }
  return block;
}

// A pool that has seen `steps` dense runs: two readers in turn, contents that come back, used now and then.
inline void TeachSamples(AnchorPool* pool, int from, int to, std::int64_t tokens = 6) {
  for (int i = from; i < to; ++i) {
    const auto seed = static_cast<std::uint32_t>(i);
    const std::string placeholder = "slot" + std::to_string(i % 2) + "/planner";
    const KvBlock base = SampleBlock(2 * seed, tokens), real = SampleBlock(2 * seed + 1, tokens);
    pool->Register(placeholder, i % 3 == 0 ? "critic" : "judge", "text" + std::to_string(i / 2), RowsOf(base),
                   RowsOf(real));
    pool->Shareable(placeholder, base);
  }
}

inline AnchorOwner SampleOwner(const std::string& session = "s", const std::string& space = "space") {
  return {.space = DigestBuilder("test").Text(space).Finish(),
          .scope = ScopeOf(session),
          .layers = kSampleLayers,
          .width = kSampleWidth};
}

// Everything that an anchor is, in words; equal where the anchors are.
inline std::string Describe(const Anchor& anchor) {
  std::string text = anchor.placeholder + "|" + anchor.content + "|" + std::to_string(anchor.layers) + "x" +
                     std::to_string(anchor.tokens) + "x" + std::to_string(anchor.width) + "|used " +
                     std::to_string(anchor.used) + "|" + std::to_string(anchor.serial) + "." +
                     std::to_string(anchor.version);
  const auto add = [&text](const std::string& name, const Anchor::Values& values) {
    text += "|" + name + ":";
    for (const Q8Block& block : *values) {
      text += std::to_string(block.scale) + ":";
      for (const std::int8_t code : block.codes) text += std::to_string(code) + ",";
    }
  };
  add("base", anchor.base);
  for (const auto& [agent, offset] : anchor.offsets) add(agent, offset);
  return text;
}

inline std::vector<std::string> Describe(const std::vector<Anchor>& anchors) {
  std::vector<std::string> all;
  for (const Anchor& anchor : anchors) all.push_back(Describe(anchor));
  return all;
}

}  // namespace kvshare::anchors
