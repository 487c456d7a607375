// Digests: the names of content. SHA-256, domain-separated, length-prefixed, seedless and versioned, so that two
// machines, today and after a restart, give the same content the same name. docs/formats/keys.md specifies them
// byte by byte with test vectors; a change there is a new version here.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "kvshare/types.h"

namespace kvshare {

inline constexpr int kHashVersion = 1;

struct Digest {
  std::array<std::uint8_t, 32> bytes{};

  std::string Hex() const;
  auto operator<=>(const Digest&) const = default;
};

// For hash tables: SHA-256 output is uniform, so its first bytes are a hash. Equality compares all 32.
struct DigestHash {
  std::size_t operator()(const Digest& d) const {
    std::size_t h;
    std::memcpy(&h, d.bytes.data(), sizeof h);
    return h;
  }
};

// Builds one digest. Every field is preceded by its length, so that no two field lists have the same bytes.
//   digest = SHA-256( "kvshare" 0x00 u32le(kHashVersion) field(domain) field(f1) field(f2) ... )
//   field(x) = u64le(byte length) bytes
class DigestBuilder {
 public:
  explicit DigestBuilder(std::string_view domain);
  ~DigestBuilder();
  DigestBuilder(const DigestBuilder&) = delete;
  DigestBuilder& operator=(const DigestBuilder&) = delete;

  DigestBuilder& Bytes(std::span<const std::byte> bytes);
  DigestBuilder& Text(std::string_view text);
  DigestBuilder& U64(std::uint64_t value);                 // 8 bytes, little-endian
  DigestBuilder& Tokens(std::span<const TokenId> tokens);  // 4 bytes each, little-endian
  DigestBuilder& Child(const Digest& digest);              // 32 bytes
  Digest Finish();                                         // once

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// SHA-256 of the bytes as they are: for fingerprints that other tools check, never as a name of KV.
Digest PlainSha256(std::span<const std::byte> bytes);

// Name of a piece of content, wherever it stands: domain "content", one Tokens field.
Digest ContentDigest(std::span<const TokenId> tokens);

// Name of everything a token stream's KV depends on besides the stream: domain "root", fields space, scope.
Digest RootContext(const Digest& space, const Digest& scope);

// Context after `page` following `parent`: domain "ctx", fields Child(parent), Tokens(page).
Digest ChainContext(const Digest& parent, std::span<const TokenId> page);

}  // namespace kvshare
