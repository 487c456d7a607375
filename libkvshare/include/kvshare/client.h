// kvshare::Client: what an agent links.
//
//   auto client = kvshare::Connect({.endpoint = "ipc:///run/kvshare.sock"});
//   if (!client.ok()) return Fail(client.status());
//   kvshare::GenerateRequest request{.prompt = kvshare::TextPrompt{"The capital of France is"}};
//   auto stream = (*client)->Generate(request);
//   while (true) {
//     auto chunk = (*stream)->Next();
//     if (!chunk.ok() || !chunk->has_value()) break;
//     std::cout << (*chunk)->text;
//   }
//   std::cout << (*stream)->reply().reuse.prefix_tokens << " tokens were reused\n";
//
// The in-process client (agentd/in_process_client.h) has the same interface and needs no daemon.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/lease.h"
#include "kvshare/status.h"
#include "kvshare/types.h"

namespace kvshare {

// A reply as it is produced. One thread at a time; must not outlive its Client. Destroying an unfinished
// stream cancels the request.
class TokenStream {
 public:
  virtual ~TokenStream() = default;

  // The next piece, or nullopt when the reply is complete (then reply() is valid).
  // Returns: DeadlineExceeded when the request's timeout has passed (the request is cancelled), Unavailable
  // when the daemon went away, otherwise the daemon's own error.
  virtual Result<std::optional<TokenChunk>> Next() = 0;

  // Asks the daemon to stop; Next() then returns Cancelled.
  virtual void Cancel() = 0;

  // Requires: Next() returned nullopt.
  virtual const GenerateReply& reply() const = 0;
};

// Thread-safe: calls from many threads are independent. Every call ends by its timeout.
class Client {
 public:
  virtual ~Client() = default;

  // Waits until the daemon answers. Returns Unavailable when it did not within `timeout`.
  virtual Result<ServerInfo> Ping(std::chrono::milliseconds timeout) = 0;

  virtual Result<std::vector<TokenId>> Tokenize(std::string_view text) = 0;
  virtual Result<std::string> Detokenize(std::span<const TokenId> ids) = 0;
  virtual Result<RenderReply> Render(const RenderRequest& request) = 0;
  virtual Result<std::unique_ptr<TokenStream>> Generate(const GenerateRequest& request) = 0;
  virtual Result<Explanation> Explain(const ExplainRequest& request) = 0;
  virtual Result<Stats> GetStats() = 0;

  // ---- stored KV by name (types.h says what each field means) ----

  // What of a prompt is stored at this moment.
  virtual Result<Match> Lookup(const LookupRequest& request) = 0;
  // Leases a prompt's stored prefix so that it can be read where it lies. One round trip: no Lookup is needed before.
  // The lease ends with the object, its ttl, or this process. ResourceExhausted where too much is leased or pinned.
  virtual Result<Lease> Acquire(const AcquireRequest& request) = 0;
  // NotFound when nothing of the prompt is stored.
  virtual Result<PinInfo> Pin(const PinRequest& request) = 0;
  virtual Status Unpin(const std::string& key) = 0;  // NotFound: not pinned
  // Returns the leading tokens of the prompt that are in memory then.
  virtual Result<std::int64_t> Prefetch(const LookupRequest& request) = 0;
  // Returns how many pages were dropped. NotFound for a key that no entry has.
  virtual Result<std::int64_t> Evict(const EvictRequest& request) = 0;
  virtual Result<std::vector<Entry>> Entries(const EntriesRequest& request) = 0;
  // Asks the daemon to finish what it has begun, to keep what it stored, and to end, as SIGTERM does. Returns when it
  // has begun to. FailedPrecondition over tcp.
  virtual Status Drain() = 0;

  // Generate() and its stream in one call.
  Result<GenerateReply> GenerateAll(const GenerateRequest& request);
};

struct ClientOptions {
  std::string endpoint;                      // ipc://PATH or tcp://HOST:PORT
  std::chrono::milliseconds timeout{30000};  // for every call but Generate, which has its own
};

// Returns InvalidArgument for an endpoint that cannot be one. Does not wait for the daemon: the first call does.
Result<std::unique_ptr<Client>> Connect(const ClientOptions& options);

// InvalidArgument unless `endpoint` is ipc://PATH (path within the socket limit) or tcp://HOST:PORT.
Status ValidateEndpoint(std::string_view endpoint);

}  // namespace kvshare
