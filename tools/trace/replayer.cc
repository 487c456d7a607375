#include "tools/trace/replayer.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "libkvshare/core/status_macros.h"

namespace kvshare::trace {
namespace {

using Clock = std::chrono::steady_clock;

double MsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

Result<RequestResult> SendOne(Client* client, const TraceRequest& recorded, const PreparedPrompt& prompt,
                              ReuseMode mode, std::chrono::milliseconds timeout) {
  GenerateRequest request{.prompt = TokenPrompt{prompt.ids}};
  request.max_tokens = prompt.max_tokens;
  request.ignore_eos = true;
  request.agent = recorded.agent;
  request.session = recorded.session;
  request.reuse = mode;
  request.timeout = timeout;
  RequestResult result;
  const Clock::time_point start = Clock::now();
  std::optional<double> first;
  KVS_ASSIGN_OR_RETURN(const auto stream, client->Generate(request));
  while (true) {
    KVS_ASSIGN_OR_RETURN(const auto chunk, stream->Next());
    if (!first) first = MsSince(start);
    if (!chunk) break;
  }
  const GenerateReply& reply = stream->reply();
  result.ttft_ms = *first;
  result.output_ids = reply.ids;
  result.reuse = reply.reuse;
  return result;
}

// Threads that send what the schedule says. All state is under one mutex; sending is not.
class Run {
 public:
  Run(Client* client, const Trace& trace, const std::vector<PreparedPrompt>& prompts, ReuseMode mode,
      const ReplayOptions& options)
      : client_(client),
        trace_(trace),
        prompts_(prompts),
        options_(options),
        schedule_(&trace, prompts.size(), options.schedule) {
    result_.mode = mode;
    result_.requests.resize(prompts.size());
  }

  Result<ModeResult> Go(int threads) {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([this] { Work(); });
    Work();
    for (std::thread& thread : others) thread.join();
    result_.wall_s = MsSince(start_) / 1000;
    if (!error_.ok()) return error_;
    return std::move(result_);
  }

 private:
  void Work() {
    std::unique_lock lock(mutex_);
    while (error_.ok()) {
      const Schedule::Step step = schedule_.Next(MsSince(start_));
      if (step.kind == Schedule::Step::Kind::kDone) break;
      if (step.kind == Schedule::Step::Kind::kWait) {
        if (step.until_ms) {
          changed_.wait_until(lock, start_ + std::chrono::duration_cast<Clock::duration>(
                                                 std::chrono::duration<double, std::milli>(*step.until_ms)));
        } else {
          changed_.wait(lock);
        }
        continue;
      }
      lock.unlock();
      const TraceRequest& recorded = trace_.requests[step.request];
      const double start_ms = MsSince(start_);
      Result<RequestResult> one = SendOne(client_, recorded, prompts_[step.request], result_.mode, options_.timeout);
      const double end_ms = MsSince(start_);
      lock.lock();
      if (one.ok()) {
        one->start_ms = start_ms;
        one->end_ms = end_ms;
      }
      Record(step.request, std::move(one));
    }
    changed_.notify_all();
  }

  void Record(std::size_t request, Result<RequestResult> one) {
    if (!one.ok()) {
      if (error_.ok()) error_ = one.status().WithContext("request " + trace_.requests[request].id);
    } else {
      progress_.prompt_tokens += static_cast<std::int64_t>(prompts_[request].ids.size());
      progress_.prefix_tokens += one->reuse.prefix_tokens;
      result_.requests[request] = std::move(*one);
      ++progress_.done;
      progress_.total = prompts_.size();
      progress_.elapsed_s = MsSince(start_) / 1000;
      if (options_.progress) options_.progress(progress_);
    }
    schedule_.Complete(request, MsSince(start_));
    changed_.notify_all();
  }

  Client* const client_;
  const Trace& trace_;
  const std::vector<PreparedPrompt>& prompts_;
  const ReplayOptions& options_;
  const Clock::time_point start_ = Clock::now();

  std::mutex mutex_;
  std::condition_variable changed_;
  Schedule schedule_;
  ReplayProgress progress_;
  ModeResult result_;
  Status error_;
};

}  // namespace

Result<ModeResult> ReplayMode(Client* client, const Trace& trace, const std::vector<PreparedPrompt>& prompts,
                              ReuseMode mode, const ReplayOptions& options) {
  const bool sequential = options.schedule.as_fast_as_possible && options.schedule.slots == 1;
  const auto threads = std::min<std::size_t>(prompts.size(), sequential ? 1 : kMaxInFlight);
  Run run(client, trace, prompts, mode, options);
  KVS_ASSIGN_OR_RETURN(ModeResult result, run.Go(static_cast<int>(threads)));
  KVS_ASSIGN_OR_RETURN(const Stats stats, client->GetStats());
  result.pool_bytes = stats.pool.capacity_bytes;
  // What a page takes shows once there are some.
  if (stats.pool.pages > 0 && stats.pool.used_bytes > 0) {
    result.pool_pages = stats.pool.capacity_bytes / (stats.pool.used_bytes / stats.pool.pages);
  }
  return result;
}

}  // namespace kvshare::trace
