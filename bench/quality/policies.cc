// Which policies this build can judge.
#include "bench/quality/exact_prefill.h"
#include "bench/quality/judge.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::quality {

Result<std::unique_ptr<PrefillUnderTest>> NewPrefill(runtime::Model* model, const Policy& policy,
                                                     const PrefillLimits& limits) {
  if (policy.mode == ReuseMode::kOff || policy.mode == ReuseMode::kExact) {
    KVS_ASSIGN_OR_RETURN(auto exact,
                         ExactPrefill::New(model, limits, {.share_prefix = policy.mode == ReuseMode::kExact}));
    return std::unique_ptr<PrefillUnderTest>(std::move(exact));
  }
  return Unimplemented("policy '" + std::string(ReuseModeName(policy.mode)) +
                       "' cannot be judged by this build; it judges off and exact");
}

}  // namespace kvshare::quality
