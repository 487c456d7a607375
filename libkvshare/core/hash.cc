#include "libkvshare/core/hash.h"

#include <openssl/evp.h>

#include <bit>

#include "libkvshare/core/check.h"

namespace kvshare {

static_assert(std::endian::native == std::endian::little, "digests feed integers as they lie in memory");

namespace {
// Fetched once: a lookup per digest costs more than hashing a page.
const EVP_MD* Sha256() {
  static EVP_MD* const md = EVP_MD_fetch(nullptr, "SHA256", nullptr);
  KVS_CHECK(md != nullptr);
  return md;
}
}  // namespace

std::string Digest::Hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(2 * bytes.size());
  for (std::uint8_t b : bytes) {
    hex.push_back(kDigits[b >> 4]);
    hex.push_back(kDigits[b & 15]);
  }
  return hex;
}

struct DigestBuilder::State {
  EVP_MD_CTX* ctx = EVP_MD_CTX_new();
  ~State() { EVP_MD_CTX_free(ctx); }
  void Raw(const void* data, std::size_t size) { KVS_CHECK(EVP_DigestUpdate(ctx, data, size) == 1); }
};

DigestBuilder::DigestBuilder(std::string_view domain) : state_(std::make_unique<State>()) {
  KVS_CHECK(state_->ctx != nullptr && EVP_DigestInit_ex2(state_->ctx, Sha256(), nullptr) == 1);
  const std::uint32_t version = kHashVersion;
  state_->Raw("kvshare", 8);  // with its terminating zero
  state_->Raw(&version, sizeof version);
  Text(domain);
}

DigestBuilder::~DigestBuilder() = default;

DigestBuilder& DigestBuilder::Bytes(std::span<const std::byte> bytes) {
  const std::uint64_t size = bytes.size();
  state_->Raw(&size, sizeof size);
  state_->Raw(bytes.data(), bytes.size());
  return *this;
}

DigestBuilder& DigestBuilder::Text(std::string_view text) {
  return Bytes(std::as_bytes(std::span(text.data(), text.size())));
}

DigestBuilder& DigestBuilder::U64(std::uint64_t value) { return Bytes(std::as_bytes(std::span(&value, 1))); }

DigestBuilder& DigestBuilder::Tokens(std::span<const TokenId> tokens) { return Bytes(std::as_bytes(tokens)); }

DigestBuilder& DigestBuilder::Child(const Digest& digest) { return Bytes(std::as_bytes(std::span(digest.bytes))); }

Digest DigestBuilder::Finish() {
  Digest digest;
  unsigned int size = 0;
  KVS_CHECK(EVP_DigestFinal_ex(state_->ctx, digest.bytes.data(), &size) == 1 && size == digest.bytes.size());
  return digest;
}

Digest PlainSha256(std::span<const std::byte> bytes) {
  Digest digest;
  KVS_CHECK(EVP_Digest(bytes.data(), bytes.size(), digest.bytes.data(), nullptr, Sha256(), nullptr) == 1);
  return digest;
}

Digest ContentDigest(std::span<const TokenId> tokens) { return DigestBuilder("content").Tokens(tokens).Finish(); }

Digest RootContext(const Digest& space, const Digest& scope) {
  return DigestBuilder("root").Child(space).Child(scope).Finish();
}

Digest ChainContext(const Digest& parent, std::span<const TokenId> page) {
  return DigestBuilder("ctx").Child(parent).Tokens(page).Finish();
}

}  // namespace kvshare
