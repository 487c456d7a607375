// kvctl bench quality: every case exactly and under each reuse policy, compared token by token and answer by answer
// (bench/quality, docs/design/quality-judge.md).
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "bench/quality/quality_run.h"
#include "bench/quality/report.h"
#include "bench/quality/suite.h"
#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/files.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

// Gives each of the world's kinds a few dozen questions.
constexpr std::int64_t kDefaultSamples = 75;

Result<std::unique_ptr<runtime::Model>> Load(const QualityOptions& options, kernels::DType dtype) {
  return LoadModelAt(options.model, {.dtype = dtype, .threads = options.threads, .lora = options.lora});
}

Result<quality::Suite> MakeSuite(const QualityOptions& options, const runtime::Model& model) {
  if (options.world) {
    const std::int64_t samples = options.samples > 0 ? options.samples : kDefaultSamples;
    return quality::WorldSuite(model, {.seed = *options.world, .samples = samples});
  }
  KVS_ASSIGN_OR_RETURN(const std::string lines, ReadFile(options.cases_file));
  auto suite = quality::FileSuite(model, lines, options.samples);
  return suite.ok() ? std::move(suite) : suite.status().WithContext(options.cases_file);
}

// A line that counts, where somebody watches; Ctrl-C ends the run.
bool Progress(std::int64_t done, std::int64_t all) {
  if (isatty(STDERR_FILENO) == 1) {
    std::fprintf(stderr, "\r%lld of %lld", static_cast<long long>(done), static_cast<long long>(all));
    if (done == all) std::fputc('\n', stderr);
  }
  return !Interrupted();
}

// What was asked, what was answered, what it cost: one line per question and policy.
std::string DumpLines(const quality::Suite& suite, const quality::QualityRun& run) {
  std::string lines;
  for (const quality::PolicyRun& policy : run.policies) {
    for (std::size_t i = 0; i < policy.cases.size(); ++i) {
      const quality::JudgedCase& judged = suite.judged[i];
      const quality::CaseResult& result = policy.cases[i];
      Json chunks = Json::array();
      for (std::size_t c = 0; c < result.chunks.size(); ++c) {
        const quality::Chunk& chunk = judged.c.chunks[c];
        chunks.push_back({{"begin", chunk.begin},
                          {"end", chunk.end},
                          {"slot", chunk.slot},
                          {"cached_tokens", result.chunks[c].cached_tokens},
                          {"computed_pairs", result.chunks[c].computed_pairs}});
      }
      Json line = {{"id", judged.c.id},
                   {"policy", ReuseModeName(policy.policy.mode)},
                   {"kind", judged.kind},
                   {"turn", judged.turn},
                   {"several_chunks", judged.crosses},
                   {"known_reader", judged.known_reader},
                   {"prompt_tokens", judged.c.prompt.size()},
                   {"text", result.text},
                   {"exact_text", result.exact_text},
                   {"kl", result.kl},
                   {"floor_kl", run.floor.kl[i]},
                   {"error_estimate", result.error_estimate},
                   {"escalated", result.escalated},
                   {"chunks", std::move(chunks)}};
      if (judged.answer) {
        line["answer"] = *judged.answer;
        line["right"] = result.right;
        line["exact_right"] = result.exact_right;
      }
      lines += JsonText(line) + "\n";
    }
  }
  return lines;
}

std::optional<quality::StoredIn> StoredInOf(const std::string& name) {
  if (name == "alone") return quality::StoredIn::kAlone;
  if (name == "thread") return quality::StoredIn::kThread;
  if (name == "reversed") return quality::StoredIn::kReversed;
  if (name == "behind") return quality::StoredIn::kBehind;
  if (name == "amid") return quality::StoredIn::kAmid;
  return std::nullopt;
}

}  // namespace

int RunBenchQuality(const QualityOptions& options) {
  const Clock::time_point start = Clock::now();
  auto model = Load(options, options.dtype);
  if (!model.ok()) return Fail(kModel, model.status().message());
  auto suite = MakeSuite(options, **model);
  if (!suite.ok()) return Fail(suite.status());
  quality::QualityOptions run_options{.policies = {}, .floor_model = nullptr, .progress = Progress};
  for (const ReuseMode mode : options.policies) {
    run_options.policies.push_back({.mode = mode,
                                    .budget = options.budget,
                                    .stored_in = StoredInOf(options.stored_in),
                                    .gradual = mode == ReuseMode::kCacheBlend && options.blend_filter == "gradual"});
  }
  std::unique_ptr<runtime::Model> other;
  if (options.noise_floor) {
    const bool is_f32 = options.dtype == kernels::DType::kF32;
    auto loaded = Load(options, is_f32 ? kernels::DType::kBf16 : kernels::DType::kF32);
    if (!loaded.ok()) return Fail(kModel, loaded.status().message());
    other = std::move(*loaded);
    run_options.floor_model = other.get();
  }
  const auto run = quality::Judge(model->get(), *suite, run_options);
  if (!run.ok()) {
    if (Interrupted()) return Fail(kInterrupted, "interrupted");
    // A policy that this build cannot judge is a wrong value of --policies.
    if (run.status().code() == StatusCode::kUnimplemented) return Fail(kUsage, run.status().message());
    return Fail(run.status());
  }
  quality::QualityReport report = quality::Summarise(*suite, *run, (*model)->config().num_layers);
  const std::filesystem::path path(options.model);
  report.model = (path.has_filename() ? path : path.parent_path()).filename().string() +
                 (options.lora.empty() ? "" : " + adapter");
  report.dtype = kernels::DTypeName(options.dtype);
  report.source = options.world ? "world " + std::to_string(*options.world) : options.cases_file;
  report.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  if (!options.html_file.empty()) {
    const Status status = WriteFile(options.html_file, quality::ReportHtml(report));
    if (!status.ok()) return Fail(status);
  }
  if (!options.dump_file.empty()) {
    const Status status = WriteFile(options.dump_file, DumpLines(*suite, *run));
    if (!status.ok()) return Fail(status);
  }
  if (options.format == OutputFormat::kJson) {
    std::puts(quality::ReportJson(report).c_str());
  } else {
    std::fputs(quality::ReportText(report).c_str(), stdout);
  }
  return kOk;
}

}  // namespace kvshare::kvctl
