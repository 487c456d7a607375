// Checks of Status and Result in tests, with the message shown when they fail.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "kvshare/status.h"

namespace kvshare::testing {

inline const Status& StatusOf(const Status& status) { return status; }
template <typename T>
const Status& StatusOf(const Result<T>& result) {
  return result.status();
}

inline std::string Describe(const Status& status) {
  return std::string(StatusCodeName(status.code())) + ": " + status.message();
}

}  // namespace kvshare::testing

#define KVS_ASSERT_OK(expr)                            \
  ASSERT_TRUE(::kvshare::testing::StatusOf(expr).ok()) \
      << ::kvshare::testing::Describe(::kvshare::testing::StatusOf(expr))
#define KVS_EXPECT_OK(expr)                            \
  EXPECT_TRUE(::kvshare::testing::StatusOf(expr).ok()) \
      << ::kvshare::testing::Describe(::kvshare::testing::StatusOf(expr))
// The failure has this code and its message holds this text.
#define KVS_EXPECT_FAILS(expr, expected_code, text)                                    \
  do {                                                                                 \
    const ::kvshare::Status kvs_test_status_ = ::kvshare::testing::StatusOf(expr);     \
    EXPECT_EQ(StatusCodeName(kvs_test_status_.code()), StatusCodeName(expected_code)); \
    EXPECT_THAT(kvs_test_status_.message(), ::testing::HasSubstr(text));               \
  } while (false)
