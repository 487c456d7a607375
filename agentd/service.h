// Service: the daemon without its socket. The ZeroMQ server and the in-process client both stand on it, so that tests,
// benches and embedding programs run the very code that agentd runs.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
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

class ColdTier;

struct ServiceOptions {
  ReuseMode reuse = ReuseMode::kExact;
  std::int64_t kv_pool_bytes = 0;   // where the model computes; 0: a quarter of what is free, at least one full context
  std::int64_t max_running = 64;    // sequences decoded side by side
  std::int64_t max_waiting = 1024;  // beyond it ResourceExhausted at once
  std::int64_t prefill_chunk_tokens = 512;
  std::string eviction_policy;  // of the memory pool; empty: the default (docs/design/eviction.md names them)

  // In modes that repair moved chunks: share of their tokens to compute anew, 0..1; unset: the mode's own.
  std::optional<double> blend_recompute;
  bool blend_gradual = false;  // in mode cacheblend: choose them gradually (docs/design/repair.md)
  // In mode auto: an agent with one of these words in its name is answered exactly, whatever the case. Who compares
  // others' answers may choose otherwise where each is nearly right (arXiv 2601.08343).
  std::vector<std::string> exact_agents = {"judge", "verifier"};
  std::int64_t anchor_memory = std::int64_t{512} << 20;  // bytes for what mode kvcomm has learnt, of all sessions

  std::string cold_dir;                 // where KV is kept on disk; empty: nowhere
  std::int64_t cold_bytes = 8ll << 30;  // what may be used there, all in all
  bool always_load = false;             // load from disk what is there, also where computing would be faster
  bool load_in_parts = true;            // compute a model's first layers while the last are loaded; false to compare
  std::optional<double> seconds_per_token;  // of computing, to weigh loads against; unset: as measured
  std::int64_t max_leases = 4096;           // held at once by all clients
  std::int64_t max_pins = 1024;             // likewise
  std::chrono::milliseconds max_lease_ttl = std::chrono::minutes(10);

  // Called once, on the engine's thread, when the device that computes has failed for good and every request has been
  // told. Must be short.
  std::function<void(const Status&)> on_device_lost;
  // What every request is told then, between "the device has failed, and" and the cause.
  std::string after_device_loss = "nothing can be computed until agentd is started again";
};

// The memory that leases' offsets point into, as this process has it and as others of this machine may map it. Lives as
// long as the service.
struct SharedPages {
  const std::byte* memory = nullptr;  // null: not for others (device memory)
  // One for each page: how often it stopped holding what it held (KvPool::generation), as LeasePage::generation has it.
  const std::atomic<std::uint64_t>* generations = nullptr;
  std::int64_t num_pages = 0;
  KvLayoutInfo layout;
  int memory_fd = -1;       // a sealed memfd that only this process may write; -1: not to be mapped by others
  int generations_fd = -1;  // likewise
};

// Receives one request's outcome. Called on the engine's thread, never under a lock; must not block.
class GenerateSink {
 public:
  virtual ~GenerateSink() = default;
  virtual void OnChunk(TokenChunk chunk) = 0;
  virtual void OnDone(GenerateReply reply) = 0;  // last call
  virtual void OnError(Status status) = 0;       // last call
};

// Thread-safe. Tokenize, Detokenize and Render run on the caller's thread; all others have their work done on the
// engine's, between two steps, and all but Generate wait for it there.
class Service {
 public:
  virtual ~Service() = default;

  virtual ServerInfo Info() const = 0;
  virtual Result<std::vector<TokenId>> Tokenize(std::string_view text) const = 0;
  virtual Result<std::string> Detokenize(std::span<const TokenId> ids) const = 0;
  virtual Result<RenderReply> Render(const RenderRequest& request) const = 0;

  // Checks the request (window, ids, parameters), then queues it. Returns its id; the sink is then called until OnDone
  // or OnError. Returns InvalidArgument (naming the limit), ResourceExhausted (queue full) or Unavailable (draining, or
  // the device has failed), and then the sink is never called.
  virtual Result<std::uint64_t> Generate(const GenerateRequest& request, std::shared_ptr<GenerateSink> sink) = 0;
  virtual void Cancel(std::uint64_t request_id) = 0;  // of an unknown or finished request: nothing happens

  virtual Result<Explanation> Explain(const ExplainRequest& request) = 0;
  virtual Stats GetStats() const = 0;

  // ---- stored KV by name. Keys are hex digests of a page's context (docs/formats/keys.md). ----

  // What of a prompt is stored at this moment.
  virtual Result<Match> Lookup(const LookupRequest& request) = 0;
  // Leases the prompt's stored prefix, loaded from the cold tier where need be: waits for the disk. The lease ends by
  // Release or its ttl; whoever asked for a client releases what a client left behind. ResourceExhausted when leases
  // and pins hold as much of the pool as they may.
  virtual Result<LeaseInfo> Acquire(const AcquireRequest& request) = 0;
  virtual Status Release(std::uint64_t lease) = 0;  // NotFound: unknown, or ended
  // Keeps the prompt's stored prefix in memory. A pin of the same prefix gets the new ttl. NotFound when nothing of the
  // prompt is stored, ResourceExhausted as Acquire. May wait for the disk.
  virtual Result<PinInfo> Pin(const PinRequest& request) = 0;
  virtual Status Unpin(const std::string& key) = 0;  // NotFound: not pinned (any more)
  // Loads from the cold tier to memory. Returns the leading tokens of the prompt that are in memory then. May wait for
  // the disk.
  virtual Result<std::int64_t> Prefetch(const LookupRequest& request) = 0;
  // Returns how many pages were dropped; what is in use stays. NotFound for a key that no entry has, InvalidArgument
  // for one that is not a key, or begins several.
  virtual Result<std::int64_t> Evict(const EvictRequest& request) = 0;
  // Stored pages, most recently used first; those of memory before those that are in the cold tier only. Errors as
  // Evict.
  virtual Result<std::vector<Entry>> Entries(const EntriesRequest& request) = 0;

  // Where leased pages lie. Never changes.
  virtual SharedPages Shared() const { return {}; }

  // What works worse here than it could, and why, for whoever runs the daemon. Never changes.
  virtual std::vector<std::string> Warnings() const { return {}; }

  // Forgets all stored KV that no running request uses. Statistics stay.
  virtual void ClearPool() = 0;
  // Ends when all running and waiting requests have, and the cold tier has all that memory has. New requests are
  // refused from now on.
  virtual void Drain() = 0;
  // For tests and debugging: Internal naming the first broken invariant of the pool.
  virtual Status CheckIntegrity() = 0;
};

// Takes the model, opens the cold tier where one is wanted, starts the engine's thread. ResourceExhausted when the pool
// cannot hold one full context; FailedPrecondition when another process has the cold tier's directory. Where the disk
// is too full or fails, the service has no cold tier, and says so in Warnings and statistics.
Result<std::unique_ptr<Service>> NewService(std::unique_ptr<runtime::Model> model, const ServiceOptions& options);

// The same over a cold tier that is open already, or null; options.cold_dir and cold_bytes are not looked at.
// `cold_missing`: why there is none although one was wanted.
Result<std::unique_ptr<Service>> NewServiceOn(std::unique_ptr<runtime::Model> model, std::unique_ptr<ColdTier> cold,
                                              const ServiceOptions& options, const std::string& cold_missing = "");

}  // namespace kvshare::agentd
