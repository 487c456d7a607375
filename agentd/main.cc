// agentd: one model, one pool of KV, one socket. Flags, signals and exit codes; everything else is the Service's.
#include <malloc.h>
#include <pthread.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "agentd/server/router_server.h"
#include "agentd/service.h"
#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/endpoint.h"
#include "runtime/model.h"

namespace kvshare::agentd {
namespace {

// The exit codes of all our programs; docs/ARCHITECTURE.md lists them.
constexpr int kExitOk = 0;
constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;
constexpr int kExitCannotListen = 3;
constexpr int kExitModel = 5;
constexpr int kExitInterrupted = 130;

int Fail(int exit_code, const std::string& message) {
  std::fprintf(stderr, "agentd: %s\n", message.c_str());
  return exit_code;
}

struct Flags {
  std::string model;
  std::string listen;
  std::string reuse = "exact";
  std::string dtype = "bfloat16";
  int threads = 0;
  std::string kv_pool_size;
  std::int64_t max_running = 64;
  std::int64_t max_waiting = 1024;
  std::int64_t prefill_chunk = 512;
};

// "8GiB", "512MiB", "4KiB" or plain bytes.
std::optional<std::int64_t> ParseBytes(const std::string& text) {
  std::size_t digits = 0;
  std::int64_t value = 0;
  for (; digits < text.size() && text[digits] >= '0' && text[digits] <= '9'; ++digits) {
    if (value > (std::numeric_limits<std::int64_t>::max() - 9) / 10) return std::nullopt;
    value = value * 10 + (text[digits] - '0');
  }
  if (digits == 0) return std::nullopt;
  const std::string unit = text.substr(digits);
  int shift = 0;
  if (unit == "KiB") {
    shift = 10;
  } else if (unit == "MiB") {
    shift = 20;
  } else if (unit == "GiB") {
    shift = 30;
  } else if (unit == "TiB") {
    shift = 40;
  } else if (!unit.empty() && unit != "B") {
    return std::nullopt;
  }
  if (value > (std::numeric_limits<std::int64_t>::max() >> shift)) return std::nullopt;
  return value << shift;
}

void DefineFlags(CLI::App& app, Flags& flags) {
  app.set_version_flag("--version", std::string("agentd ") + KVSHARE_VERSION);
  app.add_option("--model", flags.model, "A Hugging Face directory or one .gguf file");
  app.add_option("--listen", flags.listen, "ipc://PATH or tcp://HOST:PORT");
  app.add_option("--reuse", flags.reuse, "off | exact: how stored KV may be used")->capture_default_str();
  app.add_option("--dtype", flags.dtype, "float32 | bfloat16: what KV and activations are kept in")
      ->capture_default_str();
  app.add_option("--threads", flags.threads, "Threads that compute; 0 is one per core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  app.add_option("--kv-pool-size", flags.kv_pool_size,
                 "Memory for KV: 8GiB, 512MiB or bytes (default: a quarter of what is free)");
  app.add_option("--max-running", flags.max_running, "Requests computed side by side")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--max-waiting", flags.max_waiting, "Requests that may wait; more are refused")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--prefill-chunk", flags.prefill_chunk, "Prompt tokens computed per step")
      ->check(CLI::Range(1, 8192))
      ->capture_default_str();
}

// Signals by a thread of their own: a handler could do next to nothing. The first one starts the drain, the second one
// ends the program at once. All threads started later inherit the blocked mask.
class SignalWatch {
 public:
  SignalWatch() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGTERM);
    sigaddset(&signals_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    std::signal(SIGPIPE, SIG_IGN);  // a reader of our log that went away must not end the daemon
    // Detached and never joined: it waits for signals until the program ends, and the object lives as long (main).
    std::thread([this] { Run(); }).detach();
  }

  // Before this, there is nothing to drain and the first signal ends the program with exit code 0.
  void Ready() { ready_ = true; }
  void Wait() { first_.get_future().wait(); }

 private:
  void Run() {
    int signal = 0;
    sigwait(&signals_, &signal);
    if (!ready_) std::_Exit(kExitOk);
    first_.set_value();
    sigwait(&signals_, &signal);
    std::_Exit(kExitInterrupted);
  }

  sigset_t signals_;
  std::atomic<bool> ready_ = false;
  std::promise<void> first_;
};

int Serve(const Flags& flags, SignalWatch& signals) {
  // Checked here and not by CLI11, which would name a missing flag before a misspelt one.
  if (flags.model.empty()) return Fail(kExitUsage, "--model is required: a Hugging Face directory or one .gguf file");
  if (flags.listen.empty()) return Fail(kExitUsage, "--listen is required: ipc://PATH or tcp://HOST:PORT");
  if (const auto endpoint = ParseEndpoint(flags.listen, EndpointUse::kListen); !endpoint.ok()) {
    return Fail(kExitUsage, "--listen: " + endpoint.status().message());
  }
  const Result<ReuseMode> reuse = ParseReuseMode(flags.reuse);
  if (!reuse.ok()) return Fail(kExitUsage, "--reuse: " + reuse.status().message());
  if (flags.dtype != "float32" && flags.dtype != "bfloat16") {
    return Fail(kExitUsage, "--dtype: \"" + flags.dtype + "\" is not known; use float32 or bfloat16");
  }
  ServiceOptions options;
  options.reuse = *reuse;
  options.max_running = flags.max_running;
  options.max_waiting = flags.max_waiting;
  options.prefill_chunk_tokens = flags.prefill_chunk;
  if (!flags.kv_pool_size.empty()) {
    const std::optional<std::int64_t> bytes = ParseBytes(flags.kv_pool_size);
    if (!bytes.has_value() || *bytes == 0) {
      return Fail(kExitUsage,
                  "--kv-pool-size: \"" + flags.kv_pool_size + "\" is not a size; write 8GiB, 512MiB or bytes");
    }
    options.kv_pool_bytes = *bytes;
  }

  const auto start = std::chrono::steady_clock::now();
  runtime::LoadOptions load;
  load.dtype = flags.dtype == "float32" ? kernels::DType::kF32 : kernels::DType::kBf16;
  load.threads = flags.threads;
  load.max_batch_rows = flags.max_running + flags.prefill_chunk;
  Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(flags.model, load);
  if (!model.ok()) return Fail(kExitModel, "--model: " + model.status().message());
  Result<std::unique_ptr<Service>> service = NewService(std::move(*model), options);
  if (!service.ok()) {
    const bool by_flag = options.kv_pool_bytes > 0;
    return Fail(by_flag ? kExitUsage : kExitFailed, (by_flag ? "--kv-pool-size: " : "") + service.status().message());
  }
  Result<std::unique_ptr<RouterServer>> server = StartRouterServer(service->get(), {.endpoint = flags.listen});
  if (!server.ok()) {
    const bool usage = server.status().code() == StatusCode::kInvalidArgument;
    return Fail(usage ? kExitUsage : kExitCannotListen, "--listen: " + server.status().message());
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const ServerInfo info = (*service)->Info();
  constexpr double kGiB = 1 << 30;
  std::fprintf(stderr, "agentd: ready at %s: %s, %s on %s, reuse %s, KV pool of %.2f GiB, started in %.1f s\n",
               (*server)->endpoint().c_str(), info.model.c_str(), info.dtype.c_str(), info.isa.c_str(),
               std::string(ReuseModeName(info.reuse)).c_str(),
               static_cast<double>((*service)->GetStats().pool.capacity_bytes) / kGiB, seconds);

  signals.Ready();
  signals.Wait();
  std::fprintf(stderr,
               "agentd: draining: requests under way are finished, new ones refused; signal again to stop at once\n");
  (*server)->DrainAndStop();
  const Stats stats = (*service)->GetStats();
  std::fprintf(stderr, "agentd: stopped after %lld requests; %lld of %lld prompt tokens were reused\n",
               static_cast<long long>(stats.totals.requests), static_cast<long long>(stats.totals.prefix_tokens),
               static_cast<long long>(stats.totals.prompt_tokens));
  return kExitOk;
}

int Main(int argc, char** argv) {
  // Buffers of a step come and go; given back to the system each time, they would be faulted in again each time.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);

  CLI::App app("agentd serves one model and shares its KV between agents.");
  Flags flags;
  try {
    DefineFlags(app, flags);
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return Fail(kExitUsage, std::string(error.what()) + "; see agentd --help");
  }
  // Outlives the frame it is made in: its thread is never joined.
  static SignalWatch signals;
  return Serve(flags, signals);
}

}  // namespace
}  // namespace kvshare::agentd

int main(int argc, char** argv) { return kvshare::agentd::Main(argc, argv); }
