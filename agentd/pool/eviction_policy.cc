#include "agentd/pool/eviction_policy.h"

#include <array>
#include <string>

#include "agentd/pool/continuation_policy.h"
#include "agentd/pool/cost_policy.h"
#include "agentd/pool/lru_policy.h"
#include "agentd/pool/s3fifo_policy.h"

namespace kvshare::agentd {
namespace {

constexpr std::array<std::string_view, 4> kNames = {"default", "lru", "s3fifo", "cost"};

}  // namespace

std::span<const std::string_view> EvictionPolicyNames() { return kNames; }

std::unique_ptr<EvictionPolicy> NewDefaultPolicy(std::size_t capacity) {
  return std::make_unique<ContinuationPolicy>(capacity);
}

Result<std::unique_ptr<EvictionPolicy>> NewEvictionPolicy(std::string_view name, std::size_t capacity) {
  if (name == "default") return NewDefaultPolicy(capacity);
  if (name == "lru") return std::unique_ptr<EvictionPolicy>(std::make_unique<LruPolicy>());
  if (name == "s3fifo") return std::unique_ptr<EvictionPolicy>(std::make_unique<S3FifoPolicy>(capacity));
  if (name == "cost") return std::unique_ptr<EvictionPolicy>(std::make_unique<CostPolicy>());
  std::string known;
  for (std::string_view other : kNames) known += (known.empty() ? "" : ", ") + std::string(other);
  return InvalidArgument("'" + std::string(name) + "' is no eviction policy; there are " + known);
}

}  // namespace kvshare::agentd
