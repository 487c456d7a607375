#include "agentd/server/client_leases.h"

#include <algorithm>

namespace kvshare::agentd {
namespace {

constexpr std::size_t kLeasesPerClientMax = 1024;

}  // namespace

ClientLeases::Leases* ClientLeases::Find(const std::string& peer) {
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return nullptr;
  const Clock::time_point now = Clock::now();
  std::erase_if(found->second, [now](const auto& lease) { return now >= lease.second; });
  if (!found->second.empty()) return &found->second;
  peers_.erase(found);
  return nullptr;
}

Status ClientLeases::MayLease(const std::string& peer) {
  const std::lock_guard lock(mu_);
  const auto found = peers_.find(peer);
  if (found == peers_.end() || found->second.size() < kLeasesPerClientMax) return OkStatus();
  const Leases* leases = Find(peer);
  if (leases == nullptr || leases->size() < kLeasesPerClientMax) return OkStatus();
  return ResourceExhausted("this client holds " + std::to_string(kLeasesPerClientMax) +
                           " leases already, the most a client may; release some");
}

void ClientLeases::Add(const std::string& peer, const GivenLease& lease) {
  const std::lock_guard lock(mu_);
  peers_[peer][lease.id] = Clock::now() + lease.ttl;
}

bool ClientLeases::Remove(const std::string& peer, std::uint64_t lease) {
  const std::lock_guard lock(mu_);
  const auto found = peers_.find(peer);
  if (found == peers_.end() || found->second.erase(lease) == 0) return false;
  if (found->second.empty()) peers_.erase(found);
  return true;
}

bool ClientLeases::HoldsAny(const std::string& peer) {
  const std::lock_guard lock(mu_);
  return Find(peer) != nullptr;
}

std::vector<std::uint64_t> ClientLeases::TakeAll(const std::string& peer) {
  const std::lock_guard lock(mu_);
  std::vector<std::uint64_t> taken;
  const Leases* leases = Find(peer);
  if (leases == nullptr) return taken;
  for (const auto& [id, until] : *leases) taken.push_back(id);
  dropped_ += static_cast<std::int64_t>(taken.size());
  peers_.erase(peer);
  return taken;
}

std::vector<std::string> ClientLeases::Peers() const {
  const std::lock_guard lock(mu_);
  std::vector<std::string> peers;
  for (const auto& [peer, leases] : peers_) peers.push_back(peer);
  return peers;
}

std::int64_t ClientLeases::held() const {
  const std::lock_guard lock(mu_);
  const Clock::time_point now = Clock::now();
  std::int64_t held = 0;
  for (const auto& [peer, leases] : peers_) {
    held += std::count_if(leases.begin(), leases.end(), [now](const auto& lease) { return now < lease.second; });
  }
  return held;
}

std::int64_t ClientLeases::dropped() const {
  const std::lock_guard lock(mu_);
  return dropped_;
}

}  // namespace kvshare::agentd
