// KVS_CHECK: invariants that hold in every build. Never reachable from wire, disk or model file: those bytes
// get a Status. A broken invariant ends the program at once, with the place and the expression.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace kvshare::internal {
[[noreturn]] inline void CheckFailed(const char* file, int line, const char* expr) {
  std::fprintf(stderr, "kvshare: %s:%d: invariant broken: %s\n", file, line, expr);
  std::abort();
}
}  // namespace kvshare::internal

#define KVS_CHECK(expr) ((expr) ? static_cast<void>(0) : ::kvshare::internal::CheckFailed(__FILE__, __LINE__, #expr))

#ifdef NDEBUG
#define KVS_DCHECK(expr) static_cast<void>(sizeof((expr) ? 1 : 0))
#else
#define KVS_DCHECK(expr) KVS_CHECK(expr)
#endif
