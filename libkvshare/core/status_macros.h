// Early return for Status and Result.
#pragma once

#include "kvshare/status.h"

#define KVS_CONCAT_INNER(a, b) a##b
#define KVS_CONCAT(a, b) KVS_CONCAT_INNER(a, b)

#define KVS_RETURN_IF_ERROR(expr)              \
  do {                                         \
    ::kvshare::Status kvs_status_ = (expr);    \
    if (!kvs_status_.ok()) return kvs_status_; \
  } while (false)

// KVS_ASSIGN_OR_RETURN(auto x, F()): x takes the value of F(), or the enclosing function returns its Status.
#define KVS_ASSIGN_OR_RETURN(lhs, expr) KVS_ASSIGN_OR_RETURN_INNER(KVS_CONCAT(kvs_result_, __LINE__), lhs, expr)
#define KVS_ASSIGN_OR_RETURN_INNER(result, lhs, expr) \
  auto result = (expr);                               \
  if (!result.ok()) return result.status();           \
  lhs = std::move(result).value()
