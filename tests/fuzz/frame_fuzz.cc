// Frames, as a daemon and as a client read them. The first byte chooses the side, the second whether the header is made
// right, so that the fuzzer's bytes reach the body. What decodes must encode, and mean the same again.
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "libkvshare/codec/codec.h"
#include "libkvshare/core/check.h"
#include "tests/fuzz/seeded.h"
#include "tests/testing/random_messages.h"

namespace {

using kvshare::wire::FrameFault;
using kvshare::wire::FrameKind;

template <typename Decode, typename Encode>
void ReadTwice(const std::vector<std::uint8_t>& frame, FrameKind kind, Decode decode, Encode encode) {
  kvshare::wire::ReceivedFrame received;
  if (received.Load(frame, kind) != FrameFault::kNone) return;
  const auto message = decode(received);
  if (!message.ok()) return;
  const auto once = encode(1, *message);
  KVS_CHECK(once.ok());
  KVS_CHECK(received.Load(*once, kind) == FrameFault::kNone);
  const auto again = decode(received);
  KVS_CHECK(again.ok());
  const auto twice = encode(1, *again);
  KVS_CHECK(twice.ok() && *twice == *once);
}

// One good body of every message, behind the two bytes that choose.
std::vector<std::string> Seeds() {
  std::mt19937_64 rng(1);
  std::vector<std::string> seeds;
  const auto add = [&seeds](char side, const kvshare::codec::Frame& frame) {
    std::string seed = {side, 1};
    seed.append(frame.begin() + kvshare::wire::kHeaderBytes, frame.end());
    seeds.push_back(std::move(seed));
  };
  for (std::size_t kind = 0; kind < kvshare::testing::kRequestKinds; ++kind) {
    add(0, *kvshare::codec::EncodeRequest(1, kvshare::testing::RandomRequest(rng, kind)));
  }
  for (std::size_t kind = 0; kind < kvshare::testing::kReplyKinds; ++kind) {
    add(1, *kvshare::codec::EncodeReply(1, kvshare::testing::RandomReply(rng, kind)));
  }
  return seeds;
}

}  // namespace

KVS_FUZZ_SEEDS(Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const FrameKind kind = data[0] % 2 == 0 ? FrameKind::kRequest : FrameKind::kReply;
  const bool make_header = data[1] % 4 != 0;
  std::vector<std::uint8_t> frame;
  if (make_header) {
    frame.resize(kvshare::wire::kHeaderBytes);
    kvshare::wire::WriteHeader({.kind = kind, .correlation = 1, .body_bytes = static_cast<std::uint32_t>(size - 2)},
                               frame.data());
  }
  frame.insert(frame.end(), data + 2, data + size);
  if (kind == FrameKind::kRequest) {
    ReadTwice(
        frame, kind, [](const auto& received) { return kvshare::codec::DecodeRequest(*received.request()); },
        kvshare::codec::EncodeRequest);
  } else {
    ReadTwice(
        frame, kind, [](const auto& received) { return kvshare::codec::DecodeReply(*received.reply()); },
        kvshare::codec::EncodeReply);
  }
  return 0;
}
