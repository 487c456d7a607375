#include "kvshare/lease.h"

#include <string>
#include <utility>

namespace kvshare {

Lease::Lease(std::unique_ptr<Backing> backing) : backing_(std::move(backing)) {}
Lease::~Lease() = default;

const LeaseInfo& Lease::info() const {
  static const LeaseInfo kNothing;
  return backing_ == nullptr ? kNothing : backing_->info();
}

std::uint64_t Lease::id() const { return info().id; }
std::int64_t Lease::tokens() const { return info().tokens; }
const KvLayoutInfo& Lease::layout() const { return info().layout; }
std::span<const LeasePage> Lease::pages() const { return info().pages; }
std::chrono::milliseconds Lease::ttl() const { return info().ttl; }

Result<std::span<const std::byte>> Lease::PageBytes(std::size_t index) const {
  if (index >= pages().size()) {
    return InvalidArgument("page " + std::to_string(index) + " of a lease of " + std::to_string(pages().size()));
  }
  return backing_->PageBytes(index);
}

bool Lease::Valid(std::size_t index) const { return index < pages().size() && backing_->Valid(index); }

bool Lease::Valid() const {
  for (std::size_t i = 0; i < pages().size(); ++i) {
    if (!backing_->Valid(i)) return false;
  }
  return true;
}

Status Lease::Release() {
  if (backing_ == nullptr) return NotFound("this lease holds nothing");
  const std::unique_ptr<Backing> backing = std::move(backing_);
  return backing->Release();
}

}  // namespace kvshare
