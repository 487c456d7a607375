// Service: the daemon without its socket. The ZeroMQ server and the in-process client both stand on it, so that tests,
// benches and embedding programs run the very code that agentd runs.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvshare/status.h"
#include "kvshare/types.h"
#include "runtime/model.h"

namespace kvshare::agentd {

struct ServiceOptions {
  ReuseMode reuse = ReuseMode::kExact;
  std::int64_t kv_pool_bytes = 0;   // 0: a quarter of the machine's free memory, at least one full context
  std::int64_t max_running = 64;    // sequences decoded side by side
  std::int64_t max_waiting = 1024;  // beyond it ResourceExhausted at once
  std::int64_t prefill_chunk_tokens = 512;
};

// Receives one request's outcome. Called on the engine's thread, never under a lock; must not block.
class GenerateSink {
 public:
  virtual ~GenerateSink() = default;
  virtual void OnChunk(TokenChunk chunk) = 0;
  virtual void OnDone(GenerateReply reply) = 0;  // last call
  virtual void OnError(Status status) = 0;       // last call
};

// Thread-safe. Tokenize, Detokenize and Render run on the caller's thread; Generate and Explain on the engine's.
class Service {
 public:
  virtual ~Service() = default;

  virtual ServerInfo Info() const = 0;
  virtual Result<std::vector<TokenId>> Tokenize(std::string_view text) const = 0;
  virtual Result<std::string> Detokenize(std::span<const TokenId> ids) const = 0;
  virtual Result<RenderReply> Render(const RenderRequest& request) const = 0;

  // Checks the request (window, ids, parameters), then queues it. Returns its id; the sink is then called until OnDone
  // or OnError. Returns InvalidArgument (naming the limit), ResourceExhausted (queue full) or Unavailable (draining),
  // and then the sink is never called.
  virtual Result<std::uint64_t> Generate(const GenerateRequest& request, std::shared_ptr<GenerateSink> sink) = 0;
  virtual void Cancel(std::uint64_t request_id) = 0;  // of an unknown or finished request: nothing happens

  virtual Result<Explanation> Explain(const ExplainRequest& request) = 0;
  virtual Stats GetStats() const = 0;

  // Forgets all stored KV that no running request uses. Statistics stay.
  virtual void ClearPool() = 0;
  // Ends when all running and waiting requests have. New ones are refused from now on.
  virtual void Drain() = 0;
  // For tests and debugging: Internal naming the first broken invariant of the pool.
  virtual Status CheckIntegrity() = 0;
};

// Takes the model; starts the engine's thread. ResourceExhausted when the pool cannot hold one full context.
Result<std::unique_ptr<Service>> NewService(std::unique_ptr<runtime::Model> model, const ServiceOptions& options);

}  // namespace kvshare::agentd
