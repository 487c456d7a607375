// What anchors and guards are read back from: records and lists. The first byte chooses; its high bit asks for a right
// checksum, so that the fuzzer's bytes reach what lies behind it. What decodes must encode to the same bytes.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "anchors/anchor_record.h"
#include "anchors/guard_record.h"
#include "libkvshare/core/check.h"
#include "tests/anchors/anchor_samples.h"
#include "tests/fuzz/seeded.h"

namespace {

using namespace kvshare::anchors;  // NOLINT: a fuzz target of one file

std::vector<std::string> Seeds() {
  AnchorPool pool;
  TeachSamples(&pool, 0, 3, 2);
  std::vector<std::string> seeds;
  const auto add = [&seeds](char choice, const std::vector<std::byte>& bytes) {
    seeds.push_back(choice + std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  };
  for (const char fix : {'\0', '\x80'}) {
    for (const Anchor& anchor : pool.Snapshot()) add(fix, EncodeAnchor(anchor, SampleOwner()));
    const ListedAnchor listed[] = {{.serial = 1, .version = 2, .used = 3, .bytes = 4}, {.serial = 2, .version = 9}};
    add(static_cast<char>(fix | 1), EncodeAnchorList(listed, SampleOwner()));
    Guard guard({.margin = 3, .doubts = 0.5});
    for (int i = 0; i < 5; ++i) {
      guard.Answered(i);
      guard.Audited(i, 0.03 * i);
    }
    add(static_cast<char>(fix | 2), EncodeGuards({guard.Snapshot(), {}}, SampleOwner().space));
  }
  return seeds;
}

}  // namespace

KVS_FUZZ_SEEDS(Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 1) return 0;
  std::vector<std::byte> bytes(size - 1);
  if (size > 1) std::memcpy(bytes.data(), data + 1, size - 1);
  if ((data[0] & 0x80) != 0 && bytes.size() >= sizeof(kvshare::Digest)) {
    const auto summed = std::span(bytes).first(bytes.size() - sizeof(kvshare::Digest));
    const kvshare::Digest sum = kvshare::PlainSha256(summed);
    std::memcpy(bytes.data() + summed.size(), &sum, sizeof sum);
  }
  const AnchorOwner owner = SampleOwner();
  if ((data[0] & 2) != 0) {
    GuardStates guards;
    if (DecodeGuards(bytes, owner.space, &guards) == AnchorFault::kNone) {
      KVS_CHECK(EncodeGuards(guards, owner.space) == bytes);
    }
  } else if (data[0] % 2 == 0) {
    Anchor anchor;
    if (DecodeAnchor(bytes, owner, &anchor) == AnchorFault::kNone) KVS_CHECK(EncodeAnchor(anchor, owner) == bytes);
  } else {
    std::vector<ListedAnchor> list;
    if (DecodeAnchorList(bytes, owner, &list) == AnchorFault::kNone) KVS_CHECK(EncodeAnchorList(list, owner) == bytes);
  }
  return 0;
}
