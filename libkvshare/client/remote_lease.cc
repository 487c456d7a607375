#include "libkvshare/client/remote_lease.h"

#include <unistd.h>

#include <string>
#include <utility>
#include <variant>

#include "libkvshare/core/status_macros.h"

namespace kvshare::client_internal {
namespace {

class RemoteLease final : public Lease::Backing {
 public:
  explicit RemoteLease(RemoteLeaseParts parts) : parts_(std::move(parts)) {}

  ~RemoteLease() override {
    // A child of fork() has a copy of the object and none of the lease.
    if (released_ || owner_ != ::getpid()) return;
    if (const std::shared_ptr<Connection> connection = parts_.connection.lock()) {
      if (parts_.pages != nullptr && parts_.pages->Post(codec::Release{.lease = parts_.info.id})) return;
      connection->Post(codec::Release{.lease = parts_.info.id}, parts_.link);
    }
  }

  const LeaseInfo& info() const override { return parts_.info; }

  Result<std::span<const std::byte>> PageBytes(std::size_t index) const override {
    const LeasePage& page = parts_.info.pages[index];
    if (parts_.pages == nullptr) return parts_.not_mapped;
    if (!Held(page)) {
      return Internal("the daemon leased a page at " + std::to_string(page.offset) + ", outside its memory");
    }
    return parts_.pages->Page(page.offset);
  }

  bool Valid(std::size_t index) const override {
    const LeasePage& page = parts_.info.pages[index];
    if (parts_.pages != nullptr) return Held(page) && parts_.pages->Generation(page.offset) == page.generation;
    // Nothing can be read; the best that is known is whether the lease should still last.
    const std::shared_ptr<Connection> connection = parts_.connection.lock();
    return connection != nullptr && connection->link() == parts_.link && Clock::now() < started_ + parts_.info.ttl;
  }

  Status Release() override {
    released_ = true;
    const std::shared_ptr<Connection> connection = parts_.connection.lock();
    if (connection == nullptr || connection->link() != parts_.link || owner_ != ::getpid()) {
      return NotFound("the lease ended with the connection that it came by");
    }
    // The next daemon's lease of this number would be another one.
    KVS_ASSIGN_OR_RETURN(const std::shared_ptr<Call> call,
                         connection->Start(codec::Release{.lease = parts_.info.id}, CallKind::kUnary, 1, parts_.link));
    const Result<codec::Reply> reply = connection->Next(*call, Clock::now() + parts_.timeout);
    connection->Forget(*call);
    if (!reply.ok()) return reply.status();
    if (!std::holds_alternative<codec::Ack>(*reply))
      return Internal("the daemon answered a release with something else");
    return OkStatus();
  }

 private:
  bool Held(const LeasePage& page) const { return parts_.pages->Holds(page.offset, parts_.info.layout.page_bytes); }

  const RemoteLeaseParts parts_;
  const Clock::time_point started_ = Clock::now();
  const pid_t owner_ = ::getpid();
  bool released_ = false;
};

}  // namespace

std::unique_ptr<Lease::Backing> NewRemoteLease(RemoteLeaseParts parts) {
  return std::make_unique<RemoteLease>(std::move(parts));
}

}  // namespace kvshare::client_internal
