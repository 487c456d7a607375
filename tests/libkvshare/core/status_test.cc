#include "kvshare/status.h"

#include <gtest/gtest.h>

#include <memory>
#include <set>

#include "kvshare/types.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare {
namespace {

TEST(StatusTest, DefaultIsOk) {
  EXPECT_TRUE(Status().ok());
  EXPECT_EQ(Status().code(), StatusCode::kOk);
  EXPECT_TRUE(Status().WithContext("anything").ok());
}

TEST(StatusTest, ContextGrowsFromTheLeftAndKeepsTheCode) {
  const Status status = NotFound("no such file").WithContext("config.json").WithContext("model");
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "model: config.json: no such file");
}

TEST(StatusTest, EveryCodeHasItsOwnName) {
  std::set<std::string_view> names;
  for (int code = 0; code <= static_cast<int>(StatusCode::kInternal); ++code) {
    names.insert(StatusCodeName(static_cast<StatusCode>(code)));
  }
  EXPECT_EQ(names.size(), 11u);
  EXPECT_EQ(StatusCodeName(StatusCode::kFailedPrecondition), "failed_precondition");
}

TEST(StatusTest, MacrosReturnTheFirstFailure) {
  const auto half = [](int n) -> Result<int> {
    if (n % 2 != 0) return InvalidArgument("odd");
    return n / 2;
  };
  const auto quarter = [&half](int n) -> Result<int> {
    KVS_ASSIGN_OR_RETURN(const int h, half(n));
    KVS_RETURN_IF_ERROR(h > 100 ? ResourceExhausted("large") : OkStatus());
    return half(h);
  };
  EXPECT_EQ(*quarter(8), 2);
  EXPECT_EQ(quarter(6).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(quarter(1000).status().code(), StatusCode::kResourceExhausted);
}

TEST(ResultTest, HoldsValuesThatOnlyMove) {
  Result<std::unique_ptr<int>> result(std::make_unique<int>(7));
  ASSERT_TRUE(result.ok());
  const std::unique_ptr<int> taken = *std::move(result);
  EXPECT_EQ(*taken, 7);
}

TEST(ResultDeathTest, ReadingTheValueOfAFailureEndsTheProgram) {
  Result<int> result(NotFound("nothing"));
  EXPECT_DEATH(static_cast<void>(*result), "");
}

TEST(TypesTest, ReuseModesParseTheirOwnNames) {
  for (ReuseMode mode : {ReuseMode::kOff, ReuseMode::kExact, ReuseMode::kRotate, ReuseMode::kEpic,
                         ReuseMode::kCacheBlend, ReuseMode::kDhd, ReuseMode::kKvcomm, ReuseMode::kAuto}) {
    ASSERT_TRUE(ParseReuseMode(ReuseModeName(mode)).ok());
    EXPECT_EQ(*ParseReuseMode(ReuseModeName(mode)), mode);
  }
  EXPECT_EQ(ParseReuseMode("Exact").status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvshare
