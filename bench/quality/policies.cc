// Which policies this build can judge.
#include "bench/quality/exact_prefill.h"
#include "bench/quality/judge.h"
#include "bench/quality/moved_prefill.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::quality {

Result<std::unique_ptr<PrefillUnderTest>> NewPrefill(runtime::Model* model, const Policy& policy,
                                                     const PrefillLimits& limits) {
  if (policy.mode == ReuseMode::kOff || policy.mode == ReuseMode::kExact) {
    KVS_ASSIGN_OR_RETURN(auto exact,
                         ExactPrefill::New(model, limits, {.share_prefix = policy.mode == ReuseMode::kExact}));
    return std::unique_ptr<PrefillUnderTest>(std::move(exact));
  }
  KVS_ASSIGN_OR_RETURN(auto moved, MovedPrefill::New(model, limits, policy));
  return std::unique_ptr<PrefillUnderTest>(std::move(moved));
}

}  // namespace kvshare::quality
