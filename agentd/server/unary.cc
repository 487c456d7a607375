#include "agentd/server/unary.h"

#include <exception>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace kvshare::agentd {
namespace {

template <typename T>
codec::Reply AsReply(Result<T> result) {
  if (!result.ok()) return codec::Reply(result.status());
  return codec::Reply(*std::move(result));
}

codec::Reply AsAck(Status status) {
  if (!status.ok()) return codec::Reply(std::move(status));
  return codec::Ack{};
}

codec::Reply AsCount(Result<std::int64_t> count) {
  if (!count.ok()) return codec::Reply(count.status());
  return codec::Count{.count = *count};
}

struct Asker {
  Service& service;

  codec::Reply operator()(const codec::Ping&) const { return codec::Pong{.info = service.Info()}; }
  codec::Reply operator()(const codec::Tokenize& tokenize) const {
    Result<std::vector<TokenId>> ids = service.Tokenize(tokenize.text);
    if (!ids.ok()) return ids.status();
    return codec::Tokens{.ids = *std::move(ids)};
  }
  codec::Reply operator()(const codec::Detokenize& detokenize) const {
    Result<std::string> text = service.Detokenize(detokenize.ids);
    if (!text.ok()) return text.status();
    return codec::Text{.text = *std::move(text)};
  }
  codec::Reply operator()(const RenderRequest& render) const { return AsReply(service.Render(render)); }
  codec::Reply operator()(const ExplainRequest& explain) const { return AsReply(service.Explain(explain)); }
  codec::Reply operator()(const codec::GetStats&) const { return service.GetStats(); }
  codec::Reply operator()(const LookupRequest& lookup) const { return AsReply(service.Lookup(lookup)); }
  codec::Reply operator()(const AcquireRequest& acquire) const { return AsReply(service.Acquire(acquire)); }
  codec::Reply operator()(const codec::Release& release) const { return AsAck(service.Release(release.lease)); }
  codec::Reply operator()(const PinRequest& pin) const { return AsReply(service.Pin(pin)); }
  codec::Reply operator()(const codec::Unpin& unpin) const { return AsAck(service.Unpin(unpin.key)); }
  codec::Reply operator()(const codec::Prefetch& prefetch) const { return AsCount(service.Prefetch(prefetch.lookup)); }
  codec::Reply operator()(const EvictRequest& evict) const { return AsCount(service.Evict(evict)); }
  codec::Reply operator()(const EntriesRequest& request) const {
    Result<std::vector<Entry>> entries = service.Entries(request);
    if (!entries.ok()) return entries.status();
    return codec::EntryList{.entries = *std::move(entries)};
  }
  codec::Reply operator()(const codec::Hello&) const { return Internal("the server answers greetings itself"); }
  codec::Reply operator()(const codec::Drain&) const { return Internal("the server drains by itself"); }
  codec::Reply operator()(const codec::Generate&) const { return Internal("a generation is not a unary request"); }
  codec::Reply operator()(const codec::Cancel&) const { return Internal("a cancellation has no answer"); }
  codec::Reply operator()(const codec::Credit&) const { return Internal("credit has no answer"); }
};

}  // namespace

UnaryAnswer AnswerUnary(Service& service, std::uint64_t correlation, const codec::Request& request) {
  try {
    const codec::Reply reply = std::visit(Asker{service}, request);
    Result<codec::Frame> frame = codec::EncodeReply(correlation, reply);
    const LeaseInfo* lease = std::get_if<LeaseInfo>(&reply);
    const bool given = lease != nullptr && lease->tokens > 0;
    if (!frame.ok()) {
      if (given) (void)service.Release(lease->id);  // nobody will hear of it
      return {.frame = codec::EncodeError(correlation, frame.status())};
    }
    UnaryAnswer answer{.frame = *std::move(frame)};
    if (given) answer.lease = GivenLease{.id = lease->id, .ttl = lease->ttl};
    return answer;
  } catch (const std::exception& error) {
    return {.frame = codec::EncodeError(correlation, Internal(std::string("the request failed: ") + error.what()))};
  }
}

Status DrainingStatus() { return Unavailable("the daemon is draining and takes no new requests"); }

Status NotHeldStatus(std::uint64_t lease) { return NotFound("lease " + std::to_string(lease) + " is not held"); }

}  // namespace kvshare::agentd
