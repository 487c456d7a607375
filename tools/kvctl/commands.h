// The commands of kvctl: options as the command line gave them, and what runs them. Each returns the exit code.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/tensor.h"
#include "kvshare/types.h"
#include "runtime/model.h"

namespace kvshare::kvctl {

enum class OutputFormat { kText, kJson };

// Where a command finds its model; commands that take only --model leave endpoint empty.
struct Source {
  std::string model;
  std::string endpoint;
  std::chrono::milliseconds timeout{30000};
  kernels::DType dtype = kernels::DType::kBf16;
  int threads = 0;
  std::string lora = "";
  runtime::Device device = runtime::Device::kCpu;
};

struct LogitsOptions {
  Source source;
  std::string ids_file;
  std::string out_file;
  std::vector<std::int64_t> chunks;  // empty: whole blocks
};
int RunLogits(const LogitsOptions& options);  // logits.cc

struct TextOptions {
  Source source;
  std::string jsonl_file;
  std::string messages_file;
  std::string tools_file;
  bool add_generation_prompt = true;
};
int RunTokenize(const TextOptions& options);    // text.cc
int RunDetokenize(const TextOptions& options);  // text.cc
int RunRender(const TextOptions& options);      // text.cc

struct GenerateOptions {
  Source source;
  std::optional<std::string> prompt;
  std::string messages_file;
  std::string tools_file;
  std::string ids_file;
  int max_tokens = 128;
  SamplingParams sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;
  std::string agent;
  std::string session;
  std::optional<ReuseMode> reuse;
  std::optional<double> blend_recompute;  // of the model in this process
  std::string blend_filter;               // likewise: once or gradual; empty: once
  OutputFormat format = OutputFormat::kText;
};
int RunGenerate(const GenerateOptions& options);  // generate.cc

struct DaemonOptions {
  Source source;
  std::string messages_file;
  std::uint64_t request_id = 0;
  std::string agent;
  std::string session;
  std::optional<ReuseMode> reuse;
  std::string topic;       // info: one section; empty: all
  double interval_s = 0;   // stat, top: again and again; 0: once
  std::int64_t count = 0;  // of times; 0: until interrupted
  OutputFormat format = OutputFormat::kText;
};
int RunPing(const DaemonOptions& options);     // daemon.cc
int RunExplain(const DaemonOptions& options);  // daemon.cc
int RunDrain(const DaemonOptions& options);    // daemon.cc
int RunInfo(const DaemonOptions& options);     // stat.cc
int RunStat(const DaemonOptions& options);     // stat.cc
int RunTop(const DaemonOptions& options);      // top.cc

// Stored KV, by prompt or by key.
struct EntriesOptions {
  Source source;
  std::optional<std::string> prompt;
  std::string messages_file;
  std::string ids_file;
  std::string agent;
  std::string session;
  std::string key;
  std::string tier;  // host, cold, or empty: both
  bool yes = false;
  std::int64_t limit = 100;
  std::chrono::milliseconds ttl{0};
  OutputFormat format = OutputFormat::kText;
};
int RunLs(const EntriesOptions& options);        // entries.cc
int RunInspect(const EntriesOptions& options);   // entries.cc
int RunClear(const EntriesOptions& options);     // entries.cc
int RunEvict(const EntriesOptions& options);     // entries.cc
int RunPin(const EntriesOptions& options);       // entries.cc
int RunUnpin(const EntriesOptions& options);     // entries.cc
int RunPrefetch(const EntriesOptions& options);  // entries.cc

struct BenchOptions {
  Source source;
  bool random_weights = false;
  std::vector<std::int64_t> prompt_tokens = {512};
  std::vector<std::int64_t> gen_tokens = {64};
  std::vector<std::int64_t> threads;  // empty: one per core
  std::int64_t repeat = 3;
  OutputFormat format = OutputFormat::kText;
};
int RunBenchModel(const BenchOptions& options);  // bench_model.cc

struct QualityOptions {
  std::string model;
  std::string lora;
  kernels::DType dtype = kernels::DType::kBf16;
  int threads = 0;
  std::optional<std::uint64_t> world;  // exactly one of world and cases_file is given
  std::string cases_file;
  std::vector<ReuseMode> policies;
  std::optional<double> budget;
  std::string blend_filter;  // once or gradual; empty: once
  std::string stored_in;     // alone, thread, reversed or behind; empty: each policy's own
  std::int64_t samples = 0;  // 0: 75 of the world, all of a file
  bool noise_floor = true;
  std::string html_file;
  std::string dump_file;
  OutputFormat format = OutputFormat::kText;
};
int RunBenchQuality(const QualityOptions& options);  // bench_quality.cc

struct ModelOptions {
  Source source;
  std::string cold_dir;  // doctor: what the disk there can do
  OutputFormat format = OutputFormat::kText;
};
int RunModel(const ModelOptions& options);   // model.cc
int RunDoctor(const ModelOptions& options);  // doctor.cc

struct TraceOptions {
  Source source;
  std::string file;
  std::vector<ReuseMode> compare;
  std::int64_t limit = 0;  // 0: all
  int max_output = 0;      // 0: as recorded
  double speedup = 1;
  bool as_fast_as_possible = false;
  bool open_loop = false;
  std::optional<std::chrono::milliseconds> max_delay;
  int slots = 0;  // 0: the clock's default
  std::int64_t kv_pool_bytes = 0;
  std::string out_dir;
  std::string dump_file;
  OutputFormat format = OutputFormat::kText;
};
int RunTraceInfo(const TraceOptions& options);    // trace_info.cc
int RunTraceReplay(const TraceOptions& options);  // trace_replay.cc

struct SimulateOptions {
  std::string file;
  std::vector<double> pool_fractions = {0.05, 0.2};
  std::vector<std::string> policies = {"lru", "default", "belady"};
  OutputFormat format = OutputFormat::kText;
};
int RunTraceSimulate(const SimulateOptions& options);  // trace_simulate.cc

struct TraceConvertOptions {
  Source source;  // optional: tokenises texts
  std::string in_file;
  std::string out_file;
  bool to_mooncake = false;  // else KTR-1
  std::int64_t block_tokens = 512;
};
int RunTraceConvert(const TraceConvertOptions& options);  // trace_convert.cc

struct TraceRecordOptions {
  Source source;
  std::string in_file = "-";
  std::string out_file;
  int max_tokens = 128;  // where a request says nothing
  std::optional<ReuseMode> reuse;
};
int RunTraceRecord(const TraceRecordOptions& options);  // trace_record.cc

struct TraceReportOptions {
  std::string file;
  std::string html_file;
  std::string csv_file;
  OutputFormat format = OutputFormat::kText;
};
int RunTraceReport(const TraceReportOptions& options);  // trace_report.cc

}  // namespace kvshare::kvctl
