#include "agentd/in_process_client.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using SteadyClock = std::chrono::steady_clock;

// Where the engine's thread leaves a reply and the caller's thread fetches it. The engine must not wait for a slow
// reader, so what was not fetched yet is one chunk that grows: it never holds more than the reply itself.
class Mailbox final : public GenerateSink {
 public:
  void OnChunk(TokenChunk chunk) override {
    {
      const std::lock_guard lock(mutex_);
      pending_.ids.insert(pending_.ids.end(), chunk.ids.begin(), chunk.ids.end());
      pending_.text += chunk.text;
      has_pending_ = true;
    }
    changed_.notify_one();
  }

  void OnDone(GenerateReply reply) override {
    {
      const std::lock_guard lock(mutex_);
      reply_ = std::move(reply);
    }
    changed_.notify_one();
  }

  void OnError(Status status) override {
    {
      const std::lock_guard lock(mutex_);
      error_ = std::move(status);
    }
    changed_.notify_one();
  }

  // The next piece, nullopt at the end; DeadlineExceeded when nothing came by `deadline`.
  Result<std::optional<TokenChunk>> Fetch(SteadyClock::time_point deadline) {
    std::unique_lock lock(mutex_);
    const bool in_time =
        changed_.wait_until(lock, deadline, [this] { return has_pending_ || reply_.has_value() || !error_.ok(); });
    if (!in_time) return DeadlineExceeded("the request's timeout passed before it was done");
    if (has_pending_) {
      has_pending_ = false;
      return std::optional<TokenChunk>(std::exchange(pending_, {}));
    }
    if (!error_.ok()) return error_;
    return std::optional<TokenChunk>();
  }

  // Requires OnDone to have been called.
  GenerateReply TakeReply() {
    const std::lock_guard lock(mutex_);
    KVS_CHECK(reply_.has_value());
    return std::move(*reply_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  TokenChunk pending_;  // guarded by mutex_, as all below
  bool has_pending_ = false;
  std::optional<GenerateReply> reply_;
  Status error_;
};

class InProcessStream final : public TokenStream {
 public:
  InProcessStream(Service* service, std::shared_ptr<Mailbox> mailbox, std::uint64_t id,
                  SteadyClock::time_point deadline)
      : service_(service), mailbox_(std::move(mailbox)), id_(id), deadline_(deadline) {}

  ~InProcessStream() override {
    if (!ended_.has_value()) service_->Cancel(id_);
  }

  Result<std::optional<TokenChunk>> Next() override {
    if (ended_.has_value()) {
      if (!ended_->ok()) return *ended_;
      return std::optional<TokenChunk>();
    }
    Result<std::optional<TokenChunk>> chunk = mailbox_->Fetch(deadline_);
    if (!chunk.ok()) {
      ended_ = chunk.status();
      service_->Cancel(id_);  // nothing happens if the engine ended it; else it stops working for nobody
    } else if (!chunk->has_value()) {
      ended_ = OkStatus();
      reply_ = mailbox_->TakeReply();
    }
    return chunk;
  }

  void Cancel() override {
    if (ended_.has_value()) return;
    ended_ = Cancelled("the request was cancelled");
    service_->Cancel(id_);
  }

  const GenerateReply& reply() const override {
    KVS_CHECK(ended_.has_value() && ended_->ok());
    return reply_;
  }

 private:
  Service* const service_;
  const std::shared_ptr<Mailbox> mailbox_;  // shared: the engine may still write when the stream is gone
  const std::uint64_t id_;
  const SteadyClock::time_point deadline_;
  std::optional<Status> ended_;
  GenerateReply reply_;
};

// A lease that is read where the service itself writes.
class InProcessLease final : public Lease::Backing {
 public:
  InProcessLease(Service* service, LeaseInfo info)
      : service_(service), shared_(service->Shared()), info_(std::move(info)) {}
  ~InProcessLease() override {
    // Not found: its time was up.
    if (!released_ && info_.id != 0) static_cast<void>(service_->Release(info_.id));
  }

  const LeaseInfo& info() const override { return info_; }

  Result<std::span<const std::byte>> PageBytes(std::size_t index) const override {
    if (shared_.memory == nullptr) return FailedPrecondition("KV that lies on a device cannot be read here");
    return std::span(shared_.memory + info_.pages[index].offset, static_cast<std::size_t>(info_.layout.page_bytes));
  }

  bool Valid(std::size_t index) const override {
    if (shared_.generations == nullptr) return false;
    const LeasePage& page = info_.pages[index];
    // What was read of the page was read before this load.
    std::atomic_thread_fence(std::memory_order_acquire);
    return shared_.generations[page.offset / info_.layout.page_bytes].load(std::memory_order_acquire) ==
           page.generation;
  }

  Status Release() override {
    released_ = true;
    return info_.id == 0 ? OkStatus() : service_->Release(info_.id);
  }

 private:
  Service* const service_;
  const SharedPages shared_;
  const LeaseInfo info_;
  bool released_ = false;
};

class InProcessClient final : public Client {
 public:
  explicit InProcessClient(Service* service) : service_(service) {}

  Result<ServerInfo> Ping(std::chrono::milliseconds) override { return service_->Info(); }
  Result<std::vector<TokenId>> Tokenize(std::string_view text) override { return service_->Tokenize(text); }
  Result<std::string> Detokenize(std::span<const TokenId> ids) override { return service_->Detokenize(ids); }
  Result<RenderReply> Render(const RenderRequest& request) override { return service_->Render(request); }
  Result<Explanation> Explain(const ExplainRequest& request) override { return service_->Explain(request); }
  Result<Stats> GetStats() override { return service_->GetStats(); }
  Result<Match> Lookup(const LookupRequest& request) override { return service_->Lookup(request); }
  Result<PinInfo> Pin(const PinRequest& request) override { return service_->Pin(request); }
  Status Unpin(const std::string& key) override { return service_->Unpin(key); }
  Result<std::int64_t> Prefetch(const LookupRequest& request) override { return service_->Prefetch(request); }
  Result<std::int64_t> Evict(const EvictRequest& request) override { return service_->Evict(request); }
  Result<std::vector<Entry>> Entries(const EntriesRequest& request) override { return service_->Entries(request); }
  Status Drain() override {
    service_->Drain();
    return OkStatus();
  }

  Result<Lease> Acquire(const AcquireRequest& request) override {
    KVS_ASSIGN_OR_RETURN(LeaseInfo info, service_->Acquire(request));
    return Lease(std::make_unique<InProcessLease>(service_, std::move(info)));
  }

  Result<std::unique_ptr<TokenStream>> Generate(const GenerateRequest& request) override {
    const auto deadline =
        SteadyClock::now() + std::min<std::chrono::milliseconds>(request.timeout, std::chrono::hours(24 * 365));
    auto mailbox = std::make_shared<Mailbox>();
    KVS_ASSIGN_OR_RETURN(const std::uint64_t id, service_->Generate(request, mailbox));
    return std::unique_ptr<TokenStream>(std::make_unique<InProcessStream>(service_, std::move(mailbox), id, deadline));
  }

 private:
  Service* const service_;
};

}  // namespace

std::unique_ptr<Client> NewInProcessClient(Service* service) { return std::make_unique<InProcessClient>(service); }

}  // namespace kvshare::agentd
