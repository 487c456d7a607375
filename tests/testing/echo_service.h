// EchoService: a Service whose outcome a test knows beforehand, for tests of the wire only. What the wire carries for
// the real service is tested in tests/e2e.
//
// A prompt's tokens are its bytes (or its ids); generation answers with them, over and over, up to max_tokens, one
// chunk a token, and its text is one letter a token.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "agentd/pool/shared_memory.h"
#include "agentd/service.h"

namespace kvshare::testing {

class EchoService final : public agentd::Service {
 public:
  EchoService();
  ~EchoService() override;

  // From now on a generation stops after `chunks` chunks, until OpenGate().
  void CloseGate(int chunks);
  void OpenGate();

  // From now on Generate does not return, until LetIn(). Waits until one is there: false after 20 seconds.
  void HoldGenerate();
  bool WaitForHeld() const;
  void LetIn();

  // The next Generate throws, as one for whose prompt there is no memory.
  void FailNextGenerate();

  // Leases lie in shared memory from now on, `num_pages` pages of it: page i of any prompt on page i % num_pages.
  // Before a server starts. Without this call leases are metadata.
  Status ShareMemory(std::int64_t num_pages, std::int64_t page_bytes = 4096);
  // Page `page` holds something else from now on, and its generation says so. It is written all over with `fill`.
  void Reuse(std::int64_t page, unsigned char fill);
  // What a byte of a page is before any Reuse.
  static unsigned char FillOf(std::int64_t page) { return static_cast<unsigned char>(1 + page % 251); }

  // What was seen so far.
  int generations() const;    // accepted
  int cancellations() const;  // ended by Cancel
  int finished() const;       // ended by OnDone
  int texts() const;          // tokenised
  int running() const;
  // Waits until `cancellations()` or `finished()` is at least `count`. False after 20 seconds.
  bool WaitForCancellations(int count) const;
  bool WaitForFinished(int count) const;
  GenerateRequest last_request() const;

  // The tokens and the text that Generate answers with.
  static GenerateReply Expected(const GenerateRequest& request);

  ServerInfo Info() const override;
  Result<std::vector<TokenId>> Tokenize(std::string_view text) const override;
  Result<std::string> Detokenize(std::span<const TokenId> ids) const override;
  Result<RenderReply> Render(const RenderRequest& request) const override;
  Result<std::uint64_t> Generate(const GenerateRequest& request, std::shared_ptr<agentd::GenerateSink> sink) override;
  void Cancel(std::uint64_t request_id) override;
  Result<Explanation> Explain(const ExplainRequest& request) override;
  Stats GetStats() const override;
  // Every prompt is stored in memory, whole; leases and pins are given to whoever asks, and counted.
  Result<Match> Lookup(const LookupRequest& request) override;
  Result<LeaseInfo> Acquire(const AcquireRequest& request) override;
  Status Release(std::uint64_t lease) override;
  Result<PinInfo> Pin(const PinRequest& request) override;
  Status Unpin(const std::string& key) override;
  Result<std::int64_t> Prefetch(const LookupRequest& request) override;
  Result<std::int64_t> Evict(const EvictRequest& request) override;
  Result<std::vector<Entry>> Entries(const EntriesRequest& request) override;
  int leases() const;  // held now
  // Waits until as many leases are held, or fewer. False after 20 seconds.
  bool WaitForLeases(int at_most) const;
  agentd::SharedPages Shared() const override;
  void ClearPool() override {}
  void Drain() override {}
  Status CheckIntegrity() override { return OkStatus(); }

 private:
  struct Active {
    GenerateReply reply;  // what remains to be told, whole
    std::size_t told = 0;
    bool cancelled = false;
    std::shared_ptr<agentd::GenerateSink> sink;
  };

  void Run();
  // The next request that may take a step, or null. Requires: mu_ held.
  Active* Runnable(std::uint64_t* request_id);

  mutable std::mutex mu_;
  mutable std::condition_variable changed_;
  bool stopping_ = false;
  bool holds_ = false, held_ = false, fails_ = false;
  int gate_ = -1;  // chunks a generation may tell; -1: all
  std::uint64_t last_id_ = 0;
  int cancellations_ = 0;
  int finished_ = 0;
  mutable int texts_ = 0;
  GenerateRequest last_request_;
  std::map<std::uint64_t, Active> active_;
  std::uint64_t last_lease_ = 0;
  std::set<std::uint64_t> leases_;
  std::set<std::string> pins_;
  std::unique_ptr<agentd::SharedMemory> memory_;
  std::unique_ptr<agentd::SharedMemory> generations_;
  std::int64_t num_pages_ = 0;
  std::int64_t page_bytes_ = 4096;
  std::thread thread_;
};

}  // namespace kvshare::testing
