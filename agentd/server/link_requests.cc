#include "agentd/server/link_requests.h"

#include <optional>
#include <utility>
#include <variant>

#include "agentd/server/unary.h"
#include "libkvshare/codec/codec.h"
#include "protocol/handover.h"

namespace kvshare::agentd {

class LinkRequests::ClientPeer final : public LinkPeer {
 public:
  ClientPeer(LinkRequests* shared, std::string peer) : shared_(*shared), peer_(std::move(peer)) {}

  ~ClientPeer() override {
    for (const std::uint64_t lease : shared_.leases_->TakeAll(peer_)) {
      shared_.workers_->SubmitFirst([service = shared_.service_, lease] { (void)service->Release(lease); });
    }
  }

  bool OnFrame(std::span<const std::uint8_t> bytes, codec::Frame* answer) override {
    ++shared_.frames_;
    // Each connection has a buffer of its own only while it asks: there may be a thousand.
    wire::ReceivedFrame received;
    const wire::FrameFault fault = received.Load(bytes, wire::FrameKind::kRequest);
    Result<codec::Request> request =
        fault == wire::FrameFault::kNone ? codec::DecodeRequest(*received.request()) : InvalidArgument("no request");
    if (!request.ok()) {
      ++shared_.malformed_;
      return false;
    }
    *answer = Answer(received.header().correlation, *request);
    return true;
  }

 private:
  codec::Frame Answer(std::uint64_t correlation, const codec::Request& request) {
    if (const auto* release = std::get_if<codec::Release>(&request)) return OnRelease(correlation, release->lease);
    if (const auto* cancel = std::get_if<codec::Cancel>(&request)) {
      if (given_.has_value() && given_->correlation == cancel->target) OnRelease(/*correlation=*/0, given_->lease);
      return {};
    }
    const bool acquires = std::holds_alternative<AcquireRequest>(request);
    if (!acquires && !std::holds_alternative<LookupRequest>(request)) {
      return codec::EncodeError(correlation, Unimplemented("this socket takes Lookup, Acquire and Release alone"));
    }
    if (*shared_.draining_) return codec::EncodeError(correlation, DrainingStatus());
    if (acquires) {
      const Status may = shared_.leases_->MayLease(peer_);
      if (!may.ok()) return codec::EncodeError(correlation, may);
    }
    UnaryAnswer answer = AnswerUnary(*shared_.service_, correlation, request);
    if (answer.frame.size() > wire::kMaxLinkReplyBytes) {
      if (answer.lease.has_value()) (void)shared_.service_->Release(answer.lease->id);
      return codec::EncodeError(correlation, Unimplemented("the answer is larger than this socket carries"));
    }
    // Before the client hears of it, who may then speak of it anywhere.
    if (answer.lease.has_value()) {
      shared_.leases_->Add(peer_, *answer.lease);
      given_ = {.correlation = correlation, .lease = answer.lease->id};
    }
    return std::move(answer.frame);
  }

  codec::Frame OnRelease(std::uint64_t correlation, std::uint64_t lease) {
    if (!shared_.leases_->Remove(peer_, lease)) {
      if (correlation == 0) return {};
      return codec::EncodeError(correlation, NotHeldStatus(lease));
    }
    // On this thread, also where nobody waits for it: every other thread woken costs the client's next question more.
    codec::Frame answer = AnswerUnary(*shared_.service_, correlation, codec::Release{.lease = lease}).frame;
    return correlation == 0 ? codec::Frame{} : answer;
  }

  struct Given {
    std::uint64_t correlation = 0;
    std::uint64_t lease = 0;
  };

  LinkRequests& shared_;
  const std::string peer_;
  std::optional<Given> given_;  // the last: it is the one that its asker may have given up
};

std::unique_ptr<LinkPeer> LinkRequests::NewPeer(std::string peer) {
  return std::make_unique<ClientPeer>(this, std::move(peer));
}

}  // namespace kvshare::agentd
