#include "agentd/tiers/record.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "libkvshare/core/check.h"

namespace kvshare::agentd {
namespace {

static_assert(std::endian::native == std::endian::little, "records are little-endian as they lie in memory");

constexpr std::array<char, 8> kMagic = {'K', 'V', 'S', 'C', 'O', 'L', 'D', '1'};
constexpr std::uint32_t kVersion = 2;
constexpr std::uint8_t kIndexVersion = 1;

// Where the fields of a header lie.
constexpr std::size_t kMagicAt = 0, kVersionAt = 8, kHeaderBytesAt = 12, kGenerationAt = 16, kPageBytesAt = 24;
constexpr std::size_t kSpaceAt = 32, kContextAt = 64, kParentAt = 96, kChainAt = 128, kStartAt = 160;
constexpr std::size_t kValidAt = 168, kSourceSizeAt = 172, kSessionSizeAt = 174, kTokensAt = 176;
constexpr std::size_t kSourceAt = kTokensAt + kMaxPageTokens * sizeof(TokenId);
constexpr std::size_t kSessionAt = kSourceAt + kMaxLabelBytes;
constexpr std::size_t kPartSumsAt = kSessionAt + kMaxLabelBytes;
constexpr std::size_t kReservedAt = kPartSumsAt + sizeof(PartSums);
constexpr std::size_t kHeaderSumAt = kRecordHeaderBytes - 16;

template <typename T>
void Put(std::span<std::byte> bytes, std::size_t at, const T& value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

template <typename T>
T Get(std::span<const std::byte> bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

// Whole UTF-8 characters, of at most 4 bytes each.
std::string_view Label(const std::string& text) {
  std::size_t end = std::min(text.size(), kMaxLabelBytes);
  for (int i = 0; i < 3 && end < text.size() && (text[end] & 0xc0) == 0x80; ++i) --end;
  return std::string_view(text).substr(0, end);
}

std::string GetText(std::span<const std::byte> bytes, std::size_t at, std::size_t size) {
  return {reinterpret_cast<const char*>(bytes.data()) + at, size};
}

bool AllZero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

}  // namespace

Digest ContentChainRoot() {
  static const Digest root = DigestBuilder("cold content chain").Finish();
  return root;
}

Checksum ChecksumOf(std::span<const std::byte> bytes) {
  const XXH128_hash_t sum = XXH3_128bits(bytes.data(), bytes.size());
  return {sum.low64, sum.high64};
}

Checksum CopyAndSum(std::span<const std::byte> from, std::span<std::byte> to) {
  KVS_CHECK(from.size() <= to.size());
  constexpr std::size_t kStep = 16384;  // stays in the first cache between copying and summing
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  for (std::size_t at = 0; at < to.size(); at += kStep) {
    const std::span<std::byte> part = to.subspan(at, std::min(kStep, to.size() - at));
    const std::size_t copied = at < from.size() ? std::min(part.size(), from.size() - at) : 0;
    if (copied > 0) std::memcpy(part.data(), from.data() + at, copied);
    std::memset(part.data() + copied, 0, part.size() - copied);
    XXH3_128bits_update(&state, part.data(), part.size());
  }
  const XXH128_hash_t sum = XXH3_128bits_digest(&state);
  return {sum.low64, sum.high64};
}

PartSums CopyAndSumParts(std::span<const std::byte> page, std::span<std::byte> payload) {
  PartSums sums;
  const PayloadParts parts = PartsOf(page.size());
  KVS_CHECK(payload.size() == PayloadBytes(page.size()));
  for (std::size_t i = 0; i < parts.count; ++i) {
    const std::size_t begin = i * parts.bytes;
    sums[i] = CopyAndSum(page.subspan(begin, std::min(parts.bytes, page.size() - begin)),
                         payload.subspan(begin, std::min(parts.bytes, payload.size() - begin)));
  }
  return sums;
}

void EncodeRecordHeader(const RecordHeader& record, std::span<std::byte> header) {
  KVS_CHECK(header.size() == kRecordHeaderBytes);
  const ColdPage& page = record.page;
  KVS_CHECK(!page.tokens.empty() && page.tokens.size() <= kMaxPageTokens);
  std::fill(header.begin(), header.end(), std::byte{0});
  const std::string_view source = Label(page.source), session = Label(page.session);
  Put(header, kMagicAt, kMagic);
  Put(header, kVersionAt, kVersion);
  Put(header, kHeaderBytesAt, static_cast<std::uint32_t>(kRecordHeaderBytes));
  Put(header, kGenerationAt, record.generation);
  Put(header, kPageBytesAt, record.page_bytes);
  Put(header, kSpaceAt, record.space.bytes);
  Put(header, kContextAt, page.context.bytes);
  Put(header, kParentAt, page.parent.bytes);
  Put(header, kChainAt, page.content_chain.bytes);
  Put(header, kStartAt, page.start);
  Put(header, kValidAt, static_cast<std::uint32_t>(page.tokens.size()));
  Put(header, kSourceSizeAt, static_cast<std::uint16_t>(source.size()));
  Put(header, kSessionSizeAt, static_cast<std::uint16_t>(session.size()));
  std::memcpy(header.data() + kTokensAt, page.tokens.data(), page.tokens.size() * sizeof(TokenId));
  std::memcpy(header.data() + kSourceAt, source.data(), source.size());
  std::memcpy(header.data() + kSessionAt, session.data(), session.size());
  Put(header, kPartSumsAt, record.parts);
  Put(header, kHeaderSumAt, ChecksumOf(header.first(kHeaderSumAt)));
}

Result<RecordHeader> DecodeRecordHeader(std::span<const std::byte> header) {
  if (header.size() != kRecordHeaderBytes) return DataLoss("a record's header has another size");
  if (Get<std::array<char, 8>>(header, kMagicAt) != kMagic) return DataLoss("not a record");
  if (Get<Checksum>(header, kHeaderSumAt) != ChecksumOf(header.first(kHeaderSumAt))) {
    return DataLoss("a record's header does not match its checksum");
  }
  if (Get<std::uint32_t>(header, kVersionAt) != kVersion ||
      Get<std::uint32_t>(header, kHeaderBytesAt) != kRecordHeaderBytes) {
    return DataLoss("a record of another version");
  }
  const auto valid = Get<std::uint32_t>(header, kValidAt);
  const auto source_size = Get<std::uint16_t>(header, kSourceSizeAt);
  const auto session_size = Get<std::uint16_t>(header, kSessionSizeAt);
  // A right checksum says that somebody wrote these bytes on purpose, not that it was us: the bounds hold all the same.
  if (valid < 1 || valid > kMaxPageTokens || source_size > kMaxLabelBytes || session_size > kMaxLabelBytes ||
      !AllZero(header.subspan(kReservedAt, kHeaderSumAt - kReservedAt))) {
    return DataLoss("a record's header is out of bounds");
  }
  RecordHeader record;
  record.generation = Get<std::uint64_t>(header, kGenerationAt);
  record.page_bytes = Get<std::uint64_t>(header, kPageBytesAt);
  record.space = Get<Digest>(header, kSpaceAt);
  record.page.context = Get<Digest>(header, kContextAt);
  record.page.parent = Get<Digest>(header, kParentAt);
  record.page.content_chain = Get<Digest>(header, kChainAt);
  record.page.start = Get<std::int64_t>(header, kStartAt);
  record.page.tokens.resize(valid);
  std::memcpy(record.page.tokens.data(), header.data() + kTokensAt, valid * sizeof(TokenId));
  record.page.source = GetText(header, kSourceAt, source_size);
  record.page.session = GetText(header, kSessionAt, session_size);
  record.parts = Get<PartSums>(header, kPartSumsAt);
  if (ChainContext(record.page.parent, record.page.tokens) != record.page.context) {
    return DataLoss("a record's name is not that of its tokens");
  }
  return record;
}

// u8 version, u8 valid tokens, u8 source size, u8 session size, u32 zero, u64 slot, generation, last_used, i64 start,
// parent, content chain, tokens, source, session.
constexpr std::size_t kIndexFixedBytes = 8 + 4 * 8 + 2 * 32;

std::string EncodeIndexValue(const IndexValue& value) {
  const ColdPage& page = value.page;
  KVS_CHECK(!page.tokens.empty() && page.tokens.size() <= kMaxPageTokens);
  const std::string_view source = Label(page.source), session = Label(page.session);
  const std::size_t tokens_bytes = page.tokens.size() * sizeof(TokenId);
  std::string text(kIndexFixedBytes + tokens_bytes, '\0');
  const auto bytes = std::as_writable_bytes(std::span(text));
  Put(bytes, 0, kIndexVersion);
  Put(bytes, 1, static_cast<std::uint8_t>(page.tokens.size()));
  Put(bytes, 2, static_cast<std::uint8_t>(source.size()));
  Put(bytes, 3, static_cast<std::uint8_t>(session.size()));
  Put(bytes, 8, value.slot);
  Put(bytes, 16, value.generation);
  Put(bytes, 24, value.last_used);
  Put(bytes, 32, page.start);
  Put(bytes, 40, page.parent.bytes);
  Put(bytes, 72, page.content_chain.bytes);
  std::memcpy(bytes.data() + kIndexFixedBytes, page.tokens.data(), tokens_bytes);
  return text.append(source).append(session);
}

Result<IndexValue> DecodeIndexValue(std::string_view key, std::string_view value) {
  const auto bytes = std::as_bytes(std::span(value.data(), value.size()));
  IndexValue entry;
  if (key.size() != sizeof(Digest) || bytes.size() < kIndexFixedBytes) return DataLoss("an index entry is too short");
  const auto valid = std::size_t{Get<std::uint8_t>(bytes, 1)};
  const auto source_size = std::size_t{Get<std::uint8_t>(bytes, 2)};
  const auto session_size = std::size_t{Get<std::uint8_t>(bytes, 3)};
  if (Get<std::uint8_t>(bytes, 0) != kIndexVersion || Get<std::uint32_t>(bytes, 4) != 0 || valid < 1 ||
      valid > kMaxPageTokens || source_size > kMaxLabelBytes || session_size > kMaxLabelBytes ||
      bytes.size() != kIndexFixedBytes + valid * sizeof(TokenId) + source_size + session_size) {
    return DataLoss("an index entry is out of bounds");
  }
  entry.slot = Get<std::uint64_t>(bytes, 8);
  entry.generation = Get<std::uint64_t>(bytes, 16);
  entry.last_used = Get<std::uint64_t>(bytes, 24);
  entry.page.start = Get<std::int64_t>(bytes, 32);
  entry.page.parent = Get<Digest>(bytes, 40);
  entry.page.content_chain = Get<Digest>(bytes, 72);
  std::memcpy(entry.page.context.bytes.data(), key.data(), key.size());
  entry.page.tokens.resize(valid);
  std::memcpy(entry.page.tokens.data(), bytes.data() + kIndexFixedBytes, valid * sizeof(TokenId));
  const std::size_t source_at = kIndexFixedBytes + valid * sizeof(TokenId);
  entry.page.source = GetText(bytes, source_at, source_size);
  entry.page.session = GetText(bytes, source_at + source_size, session_size);
  if (ChainContext(entry.page.parent, entry.page.tokens) != entry.page.context) {
    return DataLoss("an index entry's key is not the name of its tokens");
  }
  return entry;
}

}  // namespace kvshare::agentd
