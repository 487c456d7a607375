// K and V of a prompt as programs look at them: a row knows what stands before its token and nothing behind it.
#include "bench/quality/prompt_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::quality {
namespace {

TEST(PromptRowsTest, ARowKnowsWhatStandsBeforeIt) {
  const testing::TempDir dir;
  KVS_ASSERT_OK(testing::WriteTinyModel(dir.path()));
  const auto model = runtime::LoadModel(dir.path().string(), {});
  KVS_ASSERT_OK(model);
  const std::vector<TokenId> ids = {5, 9, 3, 7, 11, 2};
  std::vector<TokenId> other = ids;
  other[2] = 4;
  const auto rows = PromptRows(**model, ids);
  const auto beginning = PromptRows(**model, std::span(ids).first(4));
  const auto changed = PromptRows(**model, other);
  KVS_ASSERT_OK(rows);
  KVS_ASSERT_OK(beginning);
  KVS_ASSERT_OK(changed);
  ASSERT_EQ(rows->tokens, 6);
  for (int layer = 0; layer < rows->layers; ++layer) {
    for (int part = 0; part < 2; ++part) {
      for (std::int64_t t = 0; t < 4; ++t) {
        EXPECT_EQ(SquaredDistance(*rows, t, *beginning, t, layer, part), 0);
      }
      for (std::int64_t t = 0; t < 6; ++t) {
        // The token itself in layer 0, whatever sees it from there on.
        const bool differs = t == 2 || (t > 2 && layer > 0);
        EXPECT_EQ(SquaredDistance(*rows, t, *changed, t, layer, part) > 0, differs) << layer << " " << part << " " << t;
      }
    }
  }
}

TEST(PromptRowsTest, DistanceIsOfOneRowOfOnePart) {
  anchors::KvBlock a(2, 3, 2);
  anchors::KvBlock b(2, 3, 2);
  const std::vector<float> x = {1, -2};
  const std::vector<float> y = {4, 2};
  std::copy(x.begin(), x.end(), a.row(1, 0, 2).begin());
  std::copy(y.begin(), y.end(), b.row(1, 0, 1).begin());
  EXPECT_EQ(SquaredDistance(a, 2, b, 1, 1, 0), 25);
  EXPECT_EQ(SquaredDistance(a, 2, b, 1, 1, 1), 0);
  EXPECT_EQ(SquaredDistance(a, 2, b, 2, 1, 0), 5);
}

}  // namespace
}  // namespace kvshare::quality
