// kvctl trace replay: a recorded workload against a model, once per reuse mode.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/machine.h"
#include "tools/kvctl/target.h"
#include "tools/trace/prompts.h"
#include "tools/trace/replayer.h"
#include "tools/trace/report.h"
#include "tools/trace/trace_reader.h"

namespace kvshare::kvctl {
namespace {

// Progress on stderr: one live line on a terminal, otherwise a line per tenth of the work.
class Progress {
 public:
  explicit Progress(std::string title) : title_(std::move(title)), live_(isatty(STDERR_FILENO) != 0) {}

  void Update(std::size_t done, std::size_t total, const std::string& detail) {
    const std::size_t tenth = 10 * done / total;
    if (!live_ && tenth == tenth_) return;
    tenth_ = tenth;
    std::fprintf(stderr, "%s  %-8s %4zu of %zu requests  %s%s", live_ ? "\r" : "", title_.c_str(), done, total,
                 detail.c_str(), live_ && done < total ? "   " : "\n");
  }

 private:
  std::string title_;
  bool live_;
  std::size_t tenth_ = 0;
};

std::string Describe(const trace::ReplayProgress& p) {
  char text[128];
  const double share =
      p.prompt_tokens == 0 ? 0 : 100.0 * static_cast<double>(p.prefix_tokens) / static_cast<double>(p.prompt_tokens);
  const double left = p.elapsed_s / static_cast<double>(p.done) * static_cast<double>(p.total - p.done);
  std::snprintf(text, sizeof text, "%5.1f %% reused  %5.1f s, about %.0f s to go", share, p.elapsed_s, left);
  return text;
}

Result<std::vector<trace::PreparedPrompt>> Prepare(Target& target, const trace::Trace& trace, std::size_t count,
                                                   int max_output) {
  trace::PromptBuilder builder(&target.client(), &trace,
                               {.window = target.info().max_context_tokens, .max_output = max_output});
  KVS_RETURN_IF_ERROR(builder.ProbeRoles());
  std::vector<trace::PreparedPrompt> prompts;
  for (std::size_t r = 0; r < count; ++r) {
    if (Interrupted()) return Cancelled("interrupted");
    KVS_ASSIGN_OR_RETURN(auto prompt, builder.Build(r));
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

trace::ScheduleOptions ScheduleOf(const TraceOptions& options, const trace::Trace& trace) {
  trace::ScheduleOptions schedule{
      .as_fast_as_possible = options.as_fast_as_possible, .open_loop = options.open_loop, .speedup = options.speedup};
  if (options.max_delay) schedule.max_delay_ms = static_cast<double>(options.max_delay->count());
  // An open loop that queued behind itself would not be open.
  const bool open_loop = !options.as_fast_as_possible && trace.header.time_base == trace::TimeBase::kArrival;
  schedule.slots = options.slots > 0 ? options.slots : open_loop ? trace::kMaxInFlight : 1;
  return schedule;
}

class Replayer {
 public:
  explicit Replayer(const TraceOptions& options) : options_(options) {}

  int Go() {
    const std::size_t limit = options_.limit > 0 ? static_cast<std::size_t>(options_.limit) : SIZE_MAX;
    auto trace = trace::ReadTrace(options_.file, limit);
    if (!trace.ok()) return Fail(trace.status());
    std::vector<ReuseMode> modes = options_.compare;
    // On one daemon, exact requests leave KV behind; off must not look as if it came second.
    if (!options_.source.endpoint.empty()) {
      std::stable_partition(modes.begin(), modes.end(), [](ReuseMode mode) { return mode == ReuseMode::kOff; });
    }
    for (const ReuseMode mode : modes) {
      if (const int code = RunMode(*trace, mode); code != kOk) return code;
    }
    return Report(*trace);
  }

 private:
  // With --model every mode gets a service of its own, and with it an empty pool.
  int OpenTarget(ReuseMode mode) {
    if (target_ && !target_->in_process()) return kOk;
    target_.reset();
    ResetPeakRss();
    Failure failure;
    const Source& source = options_.source;
    target_ = Target::Open({.model = source.model,
                            .endpoint = source.endpoint,
                            .timeout = source.timeout,
                            .dtype = source.dtype,
                            .threads = source.threads,
                            .reuse = mode,
                            .kv_pool_bytes = PoolBytes(),
                            .lora = source.lora},
                           &failure);
    if (!target_) return Fail(failure);
    info_ = target_->info();
    return kOk;
  }

  // One full context would evict what the next agent needs: a quarter of the free memory unless told otherwise.
  std::int64_t PoolBytes() const {
    if (options_.kv_pool_bytes > 0) return options_.kv_pool_bytes;
    return std::max<std::int64_t>(AvailableMemoryBytes() / 4, std::int64_t{256} << 20);
  }

  int RunMode(const trace::Trace& trace, ReuseMode mode) {
    if (const int code = OpenTarget(mode); code != kOk) return code;
    if (prompts_.empty()) {
      auto prompts = Prepare(*target_, trace, trace.requests.size(), options_.max_output);
      if (!prompts.ok()) return Fail(prompts.status());
      prompts_ = std::move(*prompts);
    }
    Progress progress(std::string(ReuseModeName(mode)));
    trace::ReplayOptions replay{.schedule = ScheduleOf(options_, trace), .progress = {}};
    replay.progress = [&](const trace::ReplayProgress& p) { progress.Update(p.done, p.total, Describe(p)); };
    auto result = trace::ReplayMode(&target_->client(), trace, prompts_, mode, replay);
    if (!result.ok()) return Fail(result.status());
    if (target_->in_process()) result->peak_rss_bytes = PeakRssBytes();
    results_.push_back(std::move(*result));
    return kOk;
  }

  int Report(const trace::Trace& trace) {
    const trace::Replay replay{.trace = trace,
                               .trace_name = trace.header.name,
                               .model = info_.model,
                               .dtype = info_.dtype,
                               .isa = info_.isa,
                               .prompts = prompts_,
                               .modes = results_};
    const auto write = [&](const std::string& path, void (*rows)(const trace::Replay&, std::ostream&)) {
      std::ofstream file(path, std::ios::binary);
      rows(replay, file);
      file.close();
      return static_cast<bool>(file);
    };
    if (!options_.dump_file.empty() && !write(options_.dump_file, trace::WriteDump)) {
      return Fail(kFailed, options_.dump_file + ": could not be written");
    }
    // From what report.json says, so that `trace report` makes the same text and the same page of it.
    const std::string json = trace::ReportJson(trace::MakeReport(replay)) + "\n";
    const auto report = trace::ParseReport(json);
    if (!report.ok()) return Fail(report.status());
    if (!options_.out_dir.empty()) {
      std::error_code error;
      std::filesystem::create_directories(options_.out_dir, error);
      for (const auto& [name, content] :
           {std::pair{"/report.json", json}, {"/report.html", trace::ReportHtml(*report)}}) {
        if (const Status status = WriteFile(options_.out_dir + name, content); !status.ok()) return Fail(status);
      }
      const std::string csv = options_.out_dir + "/requests.csv";
      if (!write(csv, trace::WriteRequestsCsv)) return Fail(kFailed, csv + ": could not be written");
    }
    std::fputs((options_.format == OutputFormat::kJson ? json : trace::ReportText(*report)).c_str(), stdout);
    return kOk;
  }

  const TraceOptions& options_;
  std::unique_ptr<Target> target_;
  ServerInfo info_;
  std::vector<trace::PreparedPrompt> prompts_;
  std::vector<trace::ModeResult> results_;
};

}  // namespace

int RunTraceReplay(const TraceOptions& options) { return Replayer(options).Go(); }

}  // namespace kvshare::kvctl
