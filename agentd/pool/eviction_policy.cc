#include "agentd/pool/eviction_policy.h"

#include <array>
#include <string>

#include "agentd/pool/lru_policy.h"

namespace kvshare::agentd {
namespace {

constexpr std::array<std::string_view, 2> kNames = {"default", "lru"};

}  // namespace

std::span<const std::string_view> EvictionPolicyNames() { return kNames; }

std::unique_ptr<EvictionPolicy> NewDefaultPolicy(std::size_t capacity) { return std::make_unique<LruPolicy>(capacity); }

Result<std::unique_ptr<EvictionPolicy>> NewEvictionPolicy(std::string_view name, std::size_t capacity) {
  if (name == "default") return NewDefaultPolicy(capacity);
  if (name == "lru") return std::unique_ptr<EvictionPolicy>(std::make_unique<LruPolicy>(capacity));
  std::string known;
  for (std::string_view other : kNames) known += (known.empty() ? "" : ", ") + std::string(other);
  return InvalidArgument("'" + std::string(name) + "' is no eviction policy; there are " + known);
}

}  // namespace kvshare::agentd
