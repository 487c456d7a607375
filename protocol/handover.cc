#include "protocol/handover.h"

#include <cstring>

namespace kvshare::wire {
namespace {

constexpr std::uint8_t kMagic[4] = {'K', 'V', 'S', 'M'};
constexpr std::size_t kVersionAt = 4;
constexpr std::size_t kClaimLengthAt = 6;
constexpr std::size_t kGrantStatusAt = 6;
constexpr std::size_t kGrantReservedAt = 8;
constexpr std::size_t kGrantPagesAt = 16;
constexpr std::size_t kGrantPageBytesAt = 24;
constexpr std::uint64_t kMaxMemoryBytes = std::uint64_t{1} << 46;  // what an x86-64 process can map, and less than 2^63

template <typename T>
T Get(std::span<const std::uint8_t> in, std::size_t at) {
  T value{};
  std::memcpy(&value, in.data() + at, sizeof value);
  return value;
}

template <typename T>
void Set(std::uint8_t* out, std::size_t at, T value) {
  std::memcpy(out + at, &value, sizeof value);
}

bool OurStart(std::span<const std::uint8_t> in) {
  return std::memcmp(in.data(), kMagic, sizeof kMagic) == 0 && Get<std::uint16_t>(in, kVersionAt) == kHandoverVersion;
}

}  // namespace

std::vector<std::uint8_t> EncodeClaim(std::span<const std::uint8_t> ticket) {
  std::vector<std::uint8_t> out(kClaimHeaderBytes + ticket.size());
  std::memcpy(out.data(), kMagic, sizeof kMagic);
  Set(out.data(), kVersionAt, kHandoverVersion);
  Set(out.data(), kClaimLengthAt, static_cast<std::uint16_t>(ticket.size()));
  if (!ticket.empty()) std::memcpy(out.data() + kClaimHeaderBytes, ticket.data(), ticket.size());
  return out;
}

std::optional<std::span<const std::uint8_t>> DecodeClaim(std::span<const std::uint8_t> datagram) {
  if (datagram.size() < kClaimHeaderBytes || datagram.size() > kMaxClaimBytes || !OurStart(datagram)) {
    return std::nullopt;
  }
  if (Get<std::uint16_t>(datagram, kClaimLengthAt) != datagram.size() - kClaimHeaderBytes) return std::nullopt;
  return datagram.subspan(kClaimHeaderBytes);
}

std::array<std::uint8_t, kGrantBytes> EncodeGrant(const Grant& grant) {
  std::array<std::uint8_t, kGrantBytes> out{};
  std::memcpy(out.data(), kMagic, sizeof kMagic);
  Set(out.data(), kVersionAt, kHandoverVersion);
  Set(out.data(), kGrantStatusAt, static_cast<std::uint16_t>(grant.granted ? 0 : 1));
  Set(out.data(), kGrantPagesAt, grant.num_pages);
  Set(out.data(), kGrantPageBytesAt, grant.page_bytes);
  return out;
}

std::optional<Grant> DecodeGrant(std::span<const std::uint8_t> datagram) {
  if (datagram.size() != kGrantBytes || !OurStart(datagram)) return std::nullopt;
  const auto status = Get<std::uint16_t>(datagram, kGrantStatusAt);
  if (status > 1 || Get<std::uint64_t>(datagram, kGrantReservedAt) != 0) return std::nullopt;
  const Grant grant{.granted = status == 0,
                    .num_pages = Get<std::uint64_t>(datagram, kGrantPagesAt),
                    .page_bytes = Get<std::uint64_t>(datagram, kGrantPageBytesAt)};
  if (!grant.granted) return grant;
  if (grant.num_pages == 0 || grant.page_bytes == 0 || grant.num_pages > kMaxMemoryBytes / grant.page_bytes) {
    return std::nullopt;
  }
  return grant;
}

}  // namespace kvshare::wire
