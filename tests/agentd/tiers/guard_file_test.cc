#include "agentd/tiers/guard_file.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <optional>

namespace kvshare::agentd {
namespace {

// The vector of docs/formats/keys.md; unset, what was learnt before there were shares is found.
TEST(GuardSpaceTest, NamesTheShare) {
  Digest space;
  for (std::size_t i = 0; i < space.bytes.size(); ++i) space.bytes[i] = static_cast<std::uint8_t>(i);
  EXPECT_EQ(GuardSpace(space, std::nullopt), space);
  EXPECT_EQ(GuardSpace(space, 0.12).Hex(), "ac1cb2ce7314ae550691b5071d3b7a64e78641544488364ffa0fccfa81dcded0");
  EXPECT_NE(GuardSpace(space, 0.0), space);
}

}  // namespace
}  // namespace kvshare::agentd
