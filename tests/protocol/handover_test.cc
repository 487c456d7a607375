// Claims and grants: what they look like, and what is not one.
#include "protocol/handover.h"

#include <gtest/gtest.h>

namespace kvshare::wire {
namespace {

using Bytes = std::vector<std::uint8_t>;

TEST(HandoverTest, AClaimIsTheseBytes) {
  const Bytes ticket = {9, 8, 7};
  EXPECT_EQ(EncodeClaim(ticket), (Bytes{'K', 'V', 'S', 'M', 1, 0, 3, 0, 9, 8, 7}));
  const Bytes claim = EncodeClaim(ticket);
  const auto back = DecodeClaim(claim);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(Bytes(back->begin(), back->end()), ticket);
}

TEST(HandoverTest, AGrantIsTheseBytes) {
  const auto grant = EncodeGrant({.granted = true, .num_pages = 0x0102, .page_bytes = 0x030405});
  const std::array<std::uint8_t, kGrantBytes> expected = {'K', 'V', 'S', 'M', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                          2,   1,   0,   0,   0, 0, 0, 0, 5, 4, 3, 0, 0, 0, 0, 0};
  EXPECT_EQ(grant, expected);
  const auto back = DecodeGrant(grant);
  ASSERT_TRUE(back.has_value());
  EXPECT_TRUE(back->granted);
  EXPECT_EQ(back->num_pages, 0x0102u);
  EXPECT_EQ(back->page_bytes, 0x030405u);
  EXPECT_FALSE(DecodeGrant(EncodeGrant({}))->granted);
}

TEST(HandoverTest, AnythingElseIsNone) {
  const Bytes claim = EncodeClaim(Bytes(kMaxTicketBytes, 1));
  EXPECT_TRUE(DecodeClaim(claim).has_value());
  for (std::size_t size = 0; size < claim.size(); ++size) {
    EXPECT_FALSE(DecodeClaim({claim.data(), size}).has_value()) << size;
  }
  Bytes longer = claim;
  longer.push_back(0);
  EXPECT_FALSE(DecodeClaim(longer).has_value());
  for (std::size_t at = 0; at < kClaimHeaderBytes; ++at) {
    Bytes other = claim;
    other[at] ^= 0x80;
    EXPECT_FALSE(DecodeClaim(other).has_value()) << at;
  }

  const auto grant = EncodeGrant({.granted = true, .num_pages = 4, .page_bytes = 4096});
  for (std::size_t at = 0; at < 16; ++at) {
    auto other = grant;
    other[at] ^= 0x80;
    EXPECT_FALSE(DecodeGrant(other).has_value()) << at;
  }
  EXPECT_FALSE(DecodeGrant({grant.data(), grant.size() - 1}).has_value());
  // Memory that no process could map, and that would overflow.
  EXPECT_FALSE(DecodeGrant(EncodeGrant({true, std::uint64_t{1} << 40, std::uint64_t{1} << 40})).has_value());
  EXPECT_FALSE(DecodeGrant(EncodeGrant({true, 0, 4096})).has_value());
  EXPECT_FALSE(DecodeGrant(EncodeGrant({true, 4096, 0})).has_value());
}

}  // namespace
}  // namespace kvshare::wire
