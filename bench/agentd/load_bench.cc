// What a request waits for when its prefix lies on disk: pages loaded whole, then the rest computed; or the first
// layers computed while the last are loaded (docs/design/cold-tier.md). Both on one machine in turns, beside what
// bounds them.
//
//   load_bench MODEL [DIRECTORY] [STORED TOKENS] [ROUNDS]
//
// DIRECTORY lies on the disk that is to be measured. A row per number of fresh tokens, medians in ms to the first
// token:
//   computed   reuse off
//   memory     the prefix is in memory: what the fresh tokens cost alone
//   whole      the prefix is on disk, and loaded before anything is computed
//   in parts   the same, overlapped
//   limit      the longer of loading alone (whole - memory) and computing alone (memory): nothing of the other is seen
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agentd/service.h"
#include "runtime/model.h"

namespace kvshare::agentd {
namespace {

namespace fs = std::filesystem;

// What a request stored is on disk by then, and does not disturb the next one.
constexpr std::chrono::milliseconds kSettle{50};

class Waiter final : public GenerateSink {
 public:
  void OnChunk(TokenChunk) override {}
  void OnDone(GenerateReply reply) override { promise_.set_value(std::move(reply)); }
  void OnError(Status status) override { promise_.set_value(std::move(status)); }
  Result<GenerateReply> Wait() { return promise_.get_future().get(); }

 private:
  std::promise<Result<GenerateReply>> promise_;
};

[[noreturn]] void Die(const Status& status) {
  std::cerr << "load_bench: " << status.message() << '\n';
  std::exit(1);
}

struct Bench {
  std::unique_ptr<Service> service;
  std::vector<TokenId> stored;
  std::mt19937_64 rng{1};

  // Milliseconds to the first token of the stored prompt and `rows` tokens that nobody has seen.
  double Ask(std::int64_t rows, ReuseMode reuse) {
    std::vector<TokenId> ids = stored;
    for (std::int64_t i = 0; i < rows; ++i) ids.push_back(static_cast<TokenId>(100 + rng() % 10000));
    GenerateRequest request;
    request.prompt = TokenPrompt{std::move(ids)};
    request.max_tokens = 1;
    request.ignore_eos = true;
    request.reuse = reuse;
    const auto sink = std::make_shared<Waiter>();
    if (const auto id = service->Generate(request, sink); !id.ok()) Die(id.status());
    const Result<GenerateReply> reply = sink->Wait();
    if (!reply.ok()) Die(reply.status());
    const auto wanted = static_cast<std::int64_t>(stored.size());
    if (reuse == ReuseMode::kExact && reply->reuse.prefix_tokens < wanted) {
      Die(Internal("only " + std::to_string(reply->reuse.prefix_tokens) + " tokens were found"));
    }
    std::this_thread::sleep_for(kSettle);
    return reply->timings.ttft_ms;
  }

  void LeaveMemory() {
    EvictRequest evict;
    evict.cold = false;
    if (const auto evicted = service->Evict(evict); !evicted.ok()) Die(evicted.status());
    std::this_thread::sleep_for(kSettle);
  }
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

int Main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: load_bench MODEL [DIRECTORY] [STORED TOKENS] [ROUNDS]\n";
    return 2;
  }
  const std::string model = argv[1];
  const fs::path scratch = fs::path(argc > 2 ? argv[2] : ".") / ("load_bench." + std::to_string(getpid()));
  const std::int64_t stored = argc > 3 ? std::atoll(argv[3]) : 2048;
  const int rounds = argc > 4 ? std::atoi(argv[4]) : 9;

  Bench benches[2];  // loads whole, loads in parts
  for (const bool in_parts : {false, true}) {
    auto loaded = runtime::LoadModel(model, {});
    if (!loaded.ok()) Die(loaded.status());
    ServiceOptions options;
    options.cold_dir = (scratch / (in_parts ? "parts" : "whole")).string();
    options.always_load = true;
    options.load_in_parts = in_parts;
    options.kv_pool_bytes = std::int64_t{2} << 30;
    auto service = NewService(std::move(*loaded), options);
    if (!service.ok()) Die(service.status());
    Bench& bench = benches[in_parts];
    bench.service = std::move(*service);
    bench.Ask(512, ReuseMode::kOff);
    bench.Ask(512, ReuseMode::kOff);  // and what computing costs is known
    std::vector<TokenId> prefix;
    for (std::int64_t i = 0; i < stored; ++i) prefix.push_back(static_cast<TokenId>(100 + bench.rng() % 10000));
    GenerateRequest request;
    request.prompt = TokenPrompt{prefix};
    request.max_tokens = 1;
    const auto sink = std::make_shared<Waiter>();
    if (const auto id = bench.service->Generate(request, sink); !id.ok()) Die(id.status());
    if (const auto reply = sink->Wait(); !reply.ok()) Die(reply.status());
    bench.stored = prefix;
  }
  std::printf("%6s %10s %10s %10s %10s %10s   %s\n", "fresh", "computed", "memory", "whole", "in parts", "limit",
              "in parts / whole");
  for (const std::int64_t n : {32, 128, 512}) {
    std::vector<double> computed, memory, whole, parts;
    for (int i = 0; i < rounds; ++i) {
      computed.push_back(benches[0].Ask(n, ReuseMode::kOff));
      for (const bool in_parts : {i % 2 == 0, i % 2 != 0}) {
        Bench& bench = benches[in_parts];
        bench.LeaveMemory();
        (in_parts ? parts : whole).push_back(bench.Ask(n, ReuseMode::kExact));
      }
      memory.push_back(benches[0].Ask(n, ReuseMode::kExact));
    }
    const double whole_ms = Median(whole), memory_ms = Median(memory), parts_ms = Median(parts);
    std::printf("%6lld %10.1f %10.1f %10.1f %10.1f %10.1f   %.2f\n", static_cast<long long>(n), Median(computed),
                memory_ms, whole_ms, parts_ms, std::max(memory_ms, whole_ms - memory_ms), parts_ms / whole_ms);
  }
  for (Bench& bench : benches) bench.service.reset();
  fs::remove_all(scratch);
  return 0;
}

}  // namespace
}  // namespace kvshare::agentd

int main(int argc, char** argv) { return kvshare::agentd::Main(argc, argv); }
