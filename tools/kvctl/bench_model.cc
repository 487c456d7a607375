// kvctl bench model: prefill and decode speed of a model, beside what the machine can do at most.
//
//   ppN: N random prompt tokens through the paged cache, logits of the last row: tokens per second
//   tgN: N random tokens one by one from an empty cache, each with logits: tokens per second
//
// Fresh random ids in every repetition, one warm-up of every test, repetitions of all tests interleaved; the ceilings
// are measured in the same run on the same threads.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <random>

#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/ceilings.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/machine.h"
#include "tools/kvctl/sequence.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

// As the daemon cuts long prompts.
constexpr std::int64_t kPrefillRows = 512;

struct Test {
  bool decode = false;
  std::int64_t tokens = 0;
  std::vector<double> tokens_per_second;

  std::string Name() const { return (decode ? "tg" : "pp") + std::to_string(tokens); }
};

struct Ceilings {
  double matmul_flops = 0;
  double read_bytes = 0;
};

// Multiply-adds of one prompt token, counted twice: every linear layer but the output head (which runs once per
// prompt), and attention over half the prompt on average.
double PrefillFlopsPerToken(const runtime::ModelConfig& c, std::int64_t prompt) {
  const double hidden = static_cast<double>(c.hidden_size);
  const double heads = static_cast<double>(c.num_heads) * c.head_dim;
  const double kv = 2.0 * c.num_kv_heads * c.head_dim;
  const double linear =
      hidden * (heads + kv) + heads * hidden + 3.0 * hidden * static_cast<double>(c.intermediate_size);
  const double attention = 2.0 * heads * static_cast<double>(prompt) / 2;
  return 2.0 * c.num_layers * (linear + attention);
}

Result<double> TimeOnce(runtime::Model& model, Sequence& sequence, const Test& test, std::mt19937_64& random) {
  std::uniform_int_distribution<TokenId> any(0, static_cast<TokenId>(model.config().vocab_size - 1));
  std::vector<TokenId> ids(static_cast<std::size_t>(test.tokens));
  for (TokenId& id : ids) id = any(random);
  std::vector<float> logits(static_cast<std::size_t>(model.config().vocab_size));
  sequence.Clear();
  const std::int64_t step = test.decode ? 1 : std::min(kPrefillRows, model.max_batch_rows());
  const std::span<const TokenId> all(ids);
  const Clock::time_point start = Clock::now();
  for (std::int64_t done = 0; done < test.tokens && !Interrupted();) {
    const std::int64_t rows = std::min(step, test.tokens - done);
    const std::int64_t last = rows - 1;
    const bool wanted = test.decode || done + rows == test.tokens;
    KVS_RETURN_IF_ERROR(sequence.Append(all.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(rows)),
                                        std::span(&last, wanted ? 1 : 0), logits.data()));
    done += rows;
  }
  return static_cast<double>(test.tokens) / std::chrono::duration<double>(Clock::now() - start).count();
}

Status RunTests(runtime::Model& model, std::int64_t repeat, std::vector<Test>* tests) {
  std::int64_t longest = 0;
  for (const Test& test : *tests) longest = std::max(longest, test.tokens);
  if (longest > model.config().max_positions) {
    return InvalidArgument(std::to_string(longest) + " tokens do not fit the model's window of " +
                           std::to_string(model.config().max_positions));
  }
  KVS_ASSIGN_OR_RETURN(Sequence sequence, Sequence::New(&model, longest));
  std::mt19937_64 random(std::random_device{}());
  for (std::int64_t run = 0; run <= repeat; ++run) {
    for (Test& test : *tests) {
      KVS_ASSIGN_OR_RETURN(const double speed, TimeOnce(model, sequence, test, random));
      if (Interrupted()) return Cancelled("interrupted");
      if (run > 0) test.tokens_per_second.push_back(speed);
    }
  }
  return OkStatus();
}

Json ResultJson(const Test& test, std::int64_t threads, const runtime::Model& model, const Ceilings& ceilings) {
  std::vector<double> sorted = test.tokens_per_second;
  std::sort(sorted.begin(), sorted.end());
  const std::size_t n = sorted.size();
  const double median = n % 2 == 1 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
  const double share = test.decode ? median * static_cast<double>(model.weight_bytes()) / ceilings.read_bytes
                                   : median * PrefillFlopsPerToken(model.config(), test.tokens) / ceilings.matmul_flops;
  return {{"test", test.Name()},   {"threads", threads},   {"tokens_per_second", median},
          {"min", sorted.front()}, {"max", sorted.back()}, {"percent_of_ceiling", 100 * share}};
}

void PrintText(const Json& results) {
  std::printf("%-8s %8s %12s %12s %12s   %s\n", "test", "threads", "tok/s", "min", "max", "of the ceiling");
  for (const Json& r : results) {
    const std::string test = r["test"].get<std::string>();
    std::printf("%-8s %8lld %12.1f %12.1f %12.1f   %.0f %% of %s\n", test.c_str(),
                static_cast<long long>(r["threads"].get<std::int64_t>()), r["tokens_per_second"].get<double>(),
                r["min"].get<double>(), r["max"].get<double>(), r["percent_of_ceiling"].get<double>(),
                test.starts_with("pp") ? "the matrix product" : "reading the weights");
  }
}

}  // namespace

int RunBenchModel(const BenchOptions& options) {
  std::vector<std::int64_t> threads = options.threads;
  if (threads.empty()) threads.push_back(AvailableCores());
  Json results = Json::array();
  Json per_threads = Json::array();
  for (const std::int64_t count : threads) {
    auto model = LoadModelAt(options.source.model, {.dtype = options.source.dtype,
                                                    .threads = static_cast<int>(count),
                                                    .random_weights = options.random_weights,
                                                    .lora = options.source.lora});
    if (!model.ok()) return Fail(kModel, model.status().message());
    std::vector<Test> tests;
    for (std::int64_t n : options.prompt_tokens)
      tests.push_back({.decode = false, .tokens = n, .tokens_per_second = {}});
    for (std::int64_t n : options.gen_tokens) tests.push_back({.decode = true, .tokens = n, .tokens_per_second = {}});
    std::fprintf(stderr, "%lld thread%s: ceilings, then %zu tests %lld times\n", static_cast<long long>(count),
                 count == 1 ? "" : "s", tests.size(), static_cast<long long>(options.repeat));
    const auto flops = MeasureMatmulFlops((*model)->backend());
    if (!flops.ok()) return Fail(flops.status());
    const Ceilings ceilings{.matmul_flops = *flops, .read_bytes = MeasureReadBytesPerSecond(static_cast<int>(count))};
    const Status status = RunTests(**model, options.repeat, &tests);
    if (!status.ok()) return Fail(status);
    for (const Test& test : tests) results.push_back(ResultJson(test, count, **model, ceilings));
    const kernels::Capabilities& device = (*model)->backend().capabilities();
    per_threads.push_back({{"threads", count},
                           {"matmul_gflops", ceilings.matmul_flops / 1e9},
                           {"memory_read_gbps", ceilings.read_bytes / 1e9},
                           {"dtype", kernels::DTypeName(device.compute)},
                           {"isa", device.isa},
                           {"linear", device.linear},
                           {"weight_bytes", (*model)->weight_bytes()}});
    if (options.format == OutputFormat::kText) {
      std::printf("%lld thread%s, %s, %s: matrix product %.0f GFLOP/s, memory reads %.1f GB/s\n",
                  static_cast<long long>(count), count == 1 ? "" : "s", device.isa.c_str(), device.linear.c_str(),
                  ceilings.matmul_flops / 1e9, ceilings.read_bytes / 1e9);
    }
  }
  if (options.format == OutputFormat::kText) {
    PrintText(results);
  } else {
    const Json out = {{"results", std::move(results)}, {"ceilings", {{"per_threads", std::move(per_threads)}}}};
    std::puts(JsonText(out).c_str());
  }
  return kOk;
}

}  // namespace kvshare::kvctl
