// The two datagrams by which a client gets the daemon's KV memory: it claims with its ticket, the daemon grants with
// two descriptors beside the bytes. docs/formats/shared-memory.md gives every byte.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "protocol/limits.h"

namespace kvshare::wire {

inline constexpr std::uint16_t kHandoverVersion = 1;
inline constexpr std::size_t kClaimHeaderBytes = 8;
inline constexpr std::size_t kMaxClaimBytes = kClaimHeaderBytes + kMaxTicketBytes;
inline constexpr std::size_t kGrantBytes = 32;
// After its grant a connection carries frames (frame.h), one a datagram: requests of the client's, then their replies.
// What is larger goes by ZeroMQ. Both limits leave room in the buffer that Linux gives such a socket (208 KiB).
inline constexpr std::size_t kMaxLinkFrameBytes = std::size_t{64} << 10;
inline constexpr std::size_t kMaxLinkReplyBytes = std::size_t{128} << 10;
inline constexpr int kGrantDescriptors = 2;  // the pages, then their generations

// The memory that comes with a grant: `num_pages` pages of `page_bytes`, and as many generations of 8 bytes.
struct Grant {
  bool granted = false;  // otherwise the rest is zero and no descriptor comes
  std::uint64_t num_pages = 0;
  std::uint64_t page_bytes = 0;
};

// Requires: at most kMaxTicketBytes.
std::vector<std::uint8_t> EncodeClaim(std::span<const std::uint8_t> ticket);
// The ticket, within `datagram`; nullopt for anything but a whole claim of this version.
std::optional<std::span<const std::uint8_t>> DecodeClaim(std::span<const std::uint8_t> datagram);

std::array<std::uint8_t, kGrantBytes> EncodeGrant(const Grant& grant);
// nullopt for anything but a whole grant of this version, of memory that can be addressed.
std::optional<Grant> DecodeGrant(std::span<const std::uint8_t> datagram);

}  // namespace kvshare::wire
