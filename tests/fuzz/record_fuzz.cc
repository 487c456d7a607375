// What the cold tier reads from a disk: record headers, index entries, and whole slots. The first byte chooses; its
// high bit asks for a right checksum, so that the fuzzer's bytes reach what lies behind it. What decodes must encode,
// and mean the same again.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "agentd/tiers/record.h"
#include "libkvshare/core/check.h"
#include "tests/fuzz/seeded.h"

namespace {

using namespace kvshare::agentd;  // NOLINT: a fuzz target of one file

ColdPage SeedPage() {
  ColdPage page;
  page.tokens = {1, 2, 3, 70000, -5};
  page.context = kvshare::ChainContext(page.parent, page.tokens);
  page.source = "planner";
  page.session = "s1";
  page.start = 64;
  return page;
}

void ReadHeader(const std::uint8_t* data, std::size_t size, bool fix) {
  std::vector<std::byte> header(kRecordHeaderBytes);
  std::memcpy(header.data(), data, std::min(size, header.size()));
  if (fix) {
    // The name and the checksum that these bytes should have, as far as they have tokens at all.
    std::uint32_t valid;
    std::memcpy(&valid, header.data() + 168, sizeof valid);
    std::vector<kvshare::TokenId> tokens(std::clamp<std::uint32_t>(valid, 1, 64));
    std::memcpy(tokens.data(), header.data() + 176, tokens.size() * sizeof tokens[0]);
    kvshare::Digest parent;
    std::memcpy(&parent, header.data() + 96, sizeof parent);
    const kvshare::Digest context = kvshare::ChainContext(parent, tokens);
    std::memcpy(header.data() + 64, &context, sizeof context);
    const Checksum sum = ChecksumOf(std::span(header).first(kRecordHeaderBytes - sizeof sum));
    std::memcpy(header.data() + kRecordHeaderBytes - sizeof sum, &sum, sizeof sum);
  }
  const auto record = DecodeRecordHeader(header);
  if (!record.ok()) return;
  std::vector<std::byte> again(kRecordHeaderBytes);
  EncodeRecordHeader(*record, again);
  const auto twice = DecodeRecordHeader(again);
  KVS_CHECK(twice.ok() && twice->page.context == record->page.context && twice->page.tokens == record->page.tokens);
  KVS_CHECK(twice->page.source == record->page.source && twice->generation == record->generation);
}

void ReadIndexValue(const std::uint8_t* data, std::size_t size, bool fix) {
  if (size < sizeof(kvshare::Digest)) return;
  std::string key(reinterpret_cast<const char*>(data), sizeof(kvshare::Digest));
  const std::string value(reinterpret_cast<const char*>(data) + key.size(), size - key.size());
  if (fix && value.size() > 104) {
    std::vector<kvshare::TokenId> tokens(static_cast<std::uint8_t>(value[1]));
    if (tokens.empty() || 104 + tokens.size() * 4 > value.size()) return;
    std::memcpy(tokens.data(), value.data() + 104, tokens.size() * 4);
    kvshare::Digest parent;
    std::memcpy(&parent, value.data() + 40, sizeof parent);
    const kvshare::Digest context = kvshare::ChainContext(parent, tokens);
    key.assign(KeyOf(context));
  }
  const auto entry = DecodeIndexValue(key, value);
  if (entry.ok()) KVS_CHECK(EncodeIndexValue(*entry) == value);
}

std::vector<std::string> Seeds() {
  std::vector<std::byte> header(kRecordHeaderBytes);
  EncodeRecordHeader({.generation = 7, .page_bytes = 4096, .space = {}, .page = SeedPage(), .parts = {}}, header);
  const std::string bytes(reinterpret_cast<const char*>(header.data()), header.size());
  const IndexValue value = {.slot = 3, .generation = 7, .last_used = 9, .page = SeedPage()};
  const std::string entry = std::string(KeyOf(value.page.context)) + EncodeIndexValue(value);
  return {std::string(1, '\0') + bytes, std::string(1, '\x80') + bytes, std::string(1, '\1') + entry,
          std::string(1, '\x81') + entry};
}

}  // namespace

KVS_FUZZ_SEEDS(Seeds)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 1) return 0;
  const bool fix = (data[0] & 0x80) != 0;
  if (data[0] % 2 == 0) {
    ReadHeader(data + 1, size - 1, fix);
  } else {
    ReadIndexValue(data + 1, size - 1, fix);
  }
  return 0;
}
