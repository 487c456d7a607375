// agentd: one model, one pool of KV, one socket. Settings, signals and exit codes; everything else is the Service's.
#include <malloc.h>
#include <pthread.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agentd/config/config.h"
#include "agentd/config/options.h"
#include "agentd/server/http_routes.h"
#include "agentd/server/http_server.h"
#include "agentd/server/router_server.h"
#include "agentd/service.h"
#include "kernels/cuda_plugin.h"
#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/status_macros.h"
#include "libkvshare/core/suggest.h"
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

// What the command line holds beside the settings that agentd/config knows.
struct CommandLine {
  std::string config_file;
  bool check_config = false;
  bool print_config = false;
  std::vector<std::pair<std::size_t, std::string>> flags;  // option and text, in order
};

void DefineFlags(CLI::App& app, CommandLine& line) {
  app.set_version_flag("--version", std::string("agentd ") + KVSHARE_VERSION);
  app.add_option("--config", line.config_file, "A YAML file of settings; environment and flags win over it")
      ->type_name("FILE");
  app.add_flag("--check-config", line.check_config, "Check the settings and end: exit code 0 or 2");
  app.add_flag("--print-config", line.print_config, "Print the settings and where each comes from, and end");
  const std::span<const Option> options = Options();
  for (std::size_t i = 0; i < options.size(); ++i) {
    const Option& option = options[i];
    const std::string fallback = *option.fallback == '\0' ? "" : std::string(" [") + option.fallback + "]";
    app.add_option_function<std::string>(
           option.flag, [&line, i](const std::string& text) { line.flags.emplace_back(i, text); },
           option.help + fallback)
        ->type_name(ValuesOf(option));
  }
}

std::string Usage(const CLI::App& app, const CLI::ParseError& error) {
  // An unknown word is the likely cause of whatever else went wrong.
  for (const std::string& word : app.remaining()) {
    if (word == "--") continue;
    std::vector<std::string> known;
    for (const CLI::Option* option : app.get_options()) {
      for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
    }
    const std::string name = word.substr(0, word.find('='));
    const std::string near = Nearest(name, known);
    return "unknown argument '" + name + "'" + (near.empty() ? "" : "; did you mean '" + near + "'?") +
           "; see agentd --help";
  }
  return std::string(error.what()) + "; see agentd --help";
}

// All layers, the lowest first.
Status Collect(const CommandLine& line, Settings& settings) {
  std::string file = line.config_file;
  if (const char* named = std::getenv("KVSHARE_CONFIG"); file.empty() && named != nullptr) file = named;
  if (!file.empty()) {
    const Result<std::string> text = ReadConfigFile(file);
    if (!text.ok()) return text.status();
    KVS_RETURN_IF_ERROR(settings.AddFile(*text, file));
  }
  std::vector<std::string> environment;
  for (char** variable = environ; variable != nullptr && *variable != nullptr; ++variable) {
    environment.emplace_back(*variable);
  }
  KVS_RETURN_IF_ERROR(settings.AddEnvironment(environment));
  for (const auto& [option, text] : line.flags) KVS_RETURN_IF_ERROR(settings.AddFlag(option, text));
  return OkStatus();
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
  // As a first signal, if none has come; any thread's.
  void End() {
    std::call_once(ended_, [this] { first_.set_value(); });
  }

 private:
  void Run() {
    int signal = 0;
    sigwait(&signals_, &signal);
    if (!ready_) std::_Exit(kExitOk);
    End();
    sigwait(&signals_, &signal);
    std::_Exit(kExitInterrupted);
  }

  sigset_t signals_;
  std::atomic<bool> ready_ = false;
  std::once_flag ended_;
  std::promise<void> first_;
};

ServiceOptions OptionsOf(const Config& config) {
  ServiceOptions options;
  options.reuse = config.reuse;
  options.max_running = config.max_running;
  options.max_waiting = config.max_waiting;
  options.prefill_chunk_tokens = config.prefill_chunk;
  options.kv_pool_bytes = config.pool_bytes;
  options.eviction_policy = config.eviction;
  options.blend_recompute = config.blend_recompute;
  options.blend_gradual = config.blend_gradual;
  options.anchor_memory = config.anchor_memory;
  options.cold_dir = config.cold_dir;
  options.cold_bytes = config.cold_bytes;
  return options;
}

// What agentd says on stderr besides errors.
class Log {
 public:
  explicit Log(LogLevel level) : level_(level) {}
  void Warn(const std::string& line) const { Say(LogLevel::kWarn, line); }
  void Info(const std::string& line) const { Say(LogLevel::kInfo, line); }

 private:
  void Say(LogLevel level, const std::string& line) const {
    if (level <= level_) std::fprintf(stderr, "agentd: %s\n", line.c_str());
  }
  const LogLevel level_;
};

// HTTP from the first moment to the last; the service comes and goes in between.
class HttpFront {
 public:
  HttpFront() : routes_(KVSHARE_VERSION) {}
  ~HttpFront() {
    routes_.Close();
    routes_.SetServer(nullptr);
  }

  Status Start(const Config& config, const Log& log) {
    if (config.http_host.empty()) return OkStatus();
    const auto handle = [this](const HttpRequest& request, HttpReply& reply) { routes_.Handle(request, reply); };
    KVS_ASSIGN_OR_RETURN(server_, StartHttpServer({.host = config.http_host, .port = config.http_port}, handle));
    routes_.SetServer(server_.get());
    if (config.http_host != "127.0.0.1" && config.http_host != "localhost" && config.http_host != "[::1]") {
      log.Warn("--http: " + config.http_host + " can be reached from elsewhere, and nothing there asks who comes");
    }
    log.Info("http at " + config.http_host + ":" + std::to_string(server_->port()));
    return OkStatus();
  }
  HttpRoutes& routes() { return routes_; }

 private:
  HttpRoutes routes_;
  std::unique_ptr<HttpServer> server_;  // ends before the routes it calls
};

// Takes the service from HTTP before it is destroyed, however Serve ends.
class ServedOverHttp {
 public:
  ServedOverHttp(HttpRoutes* routes, Service* service, const RouterServer* wire) : routes_(routes) {
    routes_->Serve(service, wire);
  }
  ServedOverHttp(const ServedOverHttp&) = delete;
  ServedOverHttp& operator=(const ServedOverHttp&) = delete;
  ~ServedOverHttp() { routes_->Close(); }

 private:
  HttpRoutes* const routes_;
};

// What the settings made wrong is theirs to mend; the rest is this machine's, or the disk's.
int FailService(const Config& config, const Status& status) {
  const bool pool = config.pool_bytes > 0 && status.code() == StatusCode::kResourceExhausted;
  const bool usage = pool || status.code() == StatusCode::kInvalidArgument;
  return Fail(usage ? kExitUsage : kExitFailed, (pool ? "--kv-pool-size: " : "") + status.message());
}

int FailListen(const char* flag, const Status& status) {
  return Fail(status.code() == StatusCode::kInvalidArgument ? kExitUsage : kExitCannotListen,
              std::string(flag) + ": " + status.message());
}

std::string ReadyLine(const ServerInfo& info, const Stats& stats, const std::string& endpoint, double seconds) {
  constexpr double kGiB = 1 << 30;
  std::array<char, 64> numbers;
  std::snprintf(numbers.data(), numbers.size(), "KV pool of %.2f GiB, started in %.1f s",
                static_cast<double>(stats.pool.capacity_bytes) / kGiB, seconds);
  return "ready at " + endpoint + ": " + info.model + ", " + info.dtype + " on " +
         (info.device == "cpu" ? "" : info.device + " ") + info.isa + ", reuse " +
         std::string(ReuseModeName(info.reuse)) + ", " + numbers.data();
}

int Serve(const Config& config, SignalWatch& signals) {
  const Log log(config.log_level);
  HttpFront http;
  if (const Status started = http.Start(config, log); !started.ok()) return FailListen("--http", started);
  const auto start = std::chrono::steady_clock::now();
  runtime::LoadOptions load;
  const Result<runtime::Device> device = runtime::ParseDevice(config.device);
  if (!device.ok()) return Fail(kExitUsage, "--device: " + device.status().message());
  load.device = *device;
  if (load.device == runtime::Device::kCuda) {
    const Status usable = kernels::ProbeCuda().status();
    if (!usable.ok()) return Fail(kExitUsage, "--device cuda: " + usable.message());
  }
  load.dtype = config.float32 ? kernels::DType::kF32 : kernels::DType::kBf16;
  load.threads = config.threads;
  load.lora = config.lora;
  load.max_batch_rows = config.max_running + config.prefill_chunk;
  Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(config.model, load);
  if (!model.ok()) return Fail(kExitModel, "--model: " + model.status().message());
  ServiceOptions options = OptionsOf(config);
  std::atomic<bool> device_lost = false;
  options.on_device_lost = [&](const Status& status) {
    device_lost = true;
    Fail(kExitFailed, status.message());
    signals.End();
  };
  Result<std::unique_ptr<Service>> service = NewService(std::move(*model), options);
  if (!service.ok()) return FailService(config, service.status());
  // A client's wish to drain takes the way of SIGTERM.
  Result<std::unique_ptr<RouterServer>> server =
      StartRouterServer(service->get(), {.endpoint = config.listen, .on_drain = [] { kill(getpid(), SIGTERM); }});
  if (!server.ok()) return FailListen("--listen", server.status());
  const ServedOverHttp served(&http.routes(), service->get(), server->get());
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  log.Info(ReadyLine((*service)->Info(), (*service)->GetStats(), (*server)->endpoint(), seconds));

  signals.Ready();
  signals.Wait();
  http.routes().SetDraining();
  log.Info("draining: requests under way are finished, new ones refused; signal again to stop at once");
  (*server)->DrainAndStop();
  (*service)->Drain();  // the cold tier takes what only memory has
  const ReuseTotals totals = (*service)->GetStats().totals;
  log.Info("stopped after " + std::to_string(totals.requests) + " requests; " +
           std::to_string(totals.prefix_tokens + totals.moved_tokens) + " of " + std::to_string(totals.prompt_tokens) +
           " prompt tokens were reused");
  return device_lost ? kExitFailed : kExitOk;
}

int Main(int argc, char** argv) {
  // Buffers of a step come and go; given back to the system each time, they would be faulted in again each time.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);

  CLI::App app("agentd serves one model and shares its KV between agents.");
  CommandLine line;
  try {
    DefineFlags(app, line);
    app.allow_extras();  // so that Usage can name an unknown flag's nearest
    app.parse(argc, argv);
    if (!app.remaining().empty()) return Fail(kExitUsage, Usage(app, CLI::ExtrasError(app.remaining())));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return Fail(kExitUsage, Usage(app, error));
  }
  Settings settings;
  const Status collected = Collect(line, settings);
  if (!collected.ok()) return Fail(kExitUsage, collected.message());
  if (line.print_config) std::fputs(settings.Print().c_str(), stdout);
  const Result<Config> config = settings.Finish();
  if (line.print_config) return kExitOk;
  if (!config.ok()) return Fail(kExitUsage, config.status().message());
  if (line.check_config) return kExitOk;
  // Outlives the frame it is made in: its thread is never joined.
  static SignalWatch signals;
  return Serve(*config, signals);
}

}  // namespace
}  // namespace kvshare::agentd

int main(int argc, char** argv) { return kvshare::agentd::Main(argc, argv); }
