// Digests against the published vectors of docs/formats/keys.md, which were computed with Python's hashlib from the
// specification there and not with this code.
#include "libkvshare/core/hash.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

namespace kvshare {
namespace {

std::vector<TokenId> Iota(TokenId count) {
  std::vector<TokenId> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

std::string Content(const std::vector<TokenId>& ids) { return ContentDigest(ids).Hex(); }

TEST(HashTest, ContentDigestsMatchThePublishedVectors) {
  EXPECT_EQ(Content({}), "bddc418c6de1500d18d7605b60cf0788c36960497573ac0938fcb9fca787a83d");
  EXPECT_EQ(Content({0}), "107e2368cc73385b896cd0b3ce469e482f27ee7f7fd25ea12150aabfc1ac2ced");
  EXPECT_EQ(Content({1, 2, 3}), "c67a4c042d083d75b7275bf68dfeef0af5f70c40e85f241a9fcc1e99b3172d84");
  EXPECT_EQ(Content({-1, std::numeric_limits<TokenId>::max()}),
            "8b117cafdc81a4a7d47fa03b3d3bf54ae8cc04a079cf1544ea489dbb8a270e9e");
  EXPECT_EQ(Content(Iota(64)), "43ec253e2c412c95298e7c6463ada3ba79dd1ac830c3fb58479b99edf8692fcd");
}

TEST(HashTest, ChainedContextsMatchThePublishedVectors) {
  Digest space;
  std::iota(space.bytes.begin(), space.bytes.end(), std::uint8_t{0});
  const Digest root = RootContext(space, Digest{});
  EXPECT_EQ(root.Hex(), "a4e93f8a26a1bc9c34a77787649df97238666fe56bf83828b5b880feaea2200b");
  const Digest first = ChainContext(root, Iota(64));
  EXPECT_EQ(first.Hex(), "8bc722fb99417acce78f1194dc0b4c89c352b8f5cbfc4b3b93c84181b8f3bf38");
  const std::vector<TokenId> seven = {7};
  EXPECT_EQ(ChainContext(first, seven).Hex(), "6d624b26d3415972d3004ade93337ea6a06711e8e64f503d4fd5f98aa5a79161");
}

TEST(HashTest, FieldsMatchThePublishedVectors) {
  EXPECT_EQ(DigestBuilder("test").Text("ab").Text("c").Finish().Hex(),
            "067e68f0b11609c4ace5b585bf4f248a2a41545f9c576723ec232b7bc7eb454b");
  EXPECT_EQ(DigestBuilder("test").Text("a").Text("bc").Finish().Hex(),
            "aea620a323bd5fd9452816e132a0d9de72230d5b0aa6c81f2f63ffb22cd4e80f");
  EXPECT_EQ(DigestBuilder("test").U64(0x0102030405060708).Finish().Hex(),
            "e61de4f2c353833ab2febcf300235ad54a5f70f464f64cbed0a7f5e12f49b87a");
}

TEST(HashTest, DomainsKeepEqualFieldsApart) {
  EXPECT_NE(DigestBuilder("a").Text("x").Finish(), DigestBuilder("b").Text("x").Finish());
  EXPECT_NE(DigestBuilder("ab").Finish(), DigestBuilder("a").Text("b").Finish());
}

TEST(HashTest, SpaceAndScopeAreNotInterchangeable) {
  Digest one;
  one.bytes[0] = 1;
  EXPECT_NE(RootContext(one, Digest{}), RootContext(Digest{}, one));
}

}  // namespace
}  // namespace kvshare
