#include "agentd/program/daemon.h"

#include <sys/resource.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "agentd/program/exit_code.h"
#include "agentd/server/http_routes.h"
#include "agentd/server/http_server.h"
#include "agentd/server/router_server.h"
#include "agentd/service.h"
#include "kernels/cuda_plugin.h"
#include "kvshare/status.h"
#include "kvshare/types.h"
#include "libkvshare/core/endpoint.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/model.h"

namespace kvshare::agentd {
namespace {

runtime::LoadOptions LoadOptionsOf(const Config& config, runtime::Device device) {
  runtime::LoadOptions load;
  load.device = device;
  load.dtype = kernels::DTypeNamed(config.dtype).value();  // one of the option's choices
  load.threads = config.threads;
  load.lora = config.lora;
  load.max_batch_rows = config.max_running + config.prefill_chunk;
  return load;
}

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
  options.exact_agents = config.exact_agents;
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

bool IsLoopback(const std::string& host) { return host == "127.0.0.1" || host == "localhost" || host == "[::1]"; }
constexpr char kReachable[] = " can be reached from elsewhere, and nothing there asks who comes";

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
    const auto handle = [this](const HttpRequest& request) { return routes_.Handle(request); };
    KVS_ASSIGN_OR_RETURN(server_, StartHttpServer({.host = config.http_host, .port = config.http_port}, handle));
    routes_.SetServer(server_.get());
    if (!IsLoopback(config.http_host)) log.Warn("--http: " + config.http_host + kReachable);
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

// A model that cannot be loaded onto a device because of the device: it failed, is too small, computes wrongly, or has
// no kernels for these sizes. What is wrong with the files has other codes.
bool MayBeTheDevices(const Status& status) {
  return status.code() == StatusCode::kResourceExhausted || status.code() == StatusCode::kUnavailable ||
         status.code() == StatusCode::kInternal || status.code() == StatusCode::kFailedPrecondition;
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

// libzmq ends the process when a connection finds no descriptor left, so there should be as many as may be had.
void RaiseDescriptorLimit(const Log& log) {
  constexpr rlim_t kFew = 4096;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0 && getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  if (limit.rlim_cur >= kFew) return;
  log.Warn("this process may open " + std::to_string(limit.rlim_cur) +
           " files at most, and ends when its connections reach that; raise the limit (ulimit -n) to " +
           std::to_string(kFew) + " or more");
}

class Daemon {
 public:
  Daemon(const Config& config, SignalWatch& signals)
      : config_(config), signals_(signals), log_(config.log_level), listen_(config.listen) {}

  int Run() {
    RaiseDescriptorLimit(log_);
    if (const Status started = http_.Start(config_, log_); !started.ok()) return FailListen("--http", started);
    const Result<runtime::Device> device = runtime::ParseDevice(config_.device);
    if (!device.ok()) return Fail(kExitUsage, "--device: " + device.status().message());
    if (*device == runtime::Device::kCuda) {
      const Status usable = kernels::ProbeCuda().status();
      if (!usable.ok()) return Fail(kExitUsage, "--device cuda: " + usable.message());
    }
    Ended ended = Serve(*device);
    // At most once: the CPU is no device that can be lost.
    if (ended.device_lost && *device == runtime::Device::kAuto) {
      ended = signals_.NothingToDrain() ? Serve(runtime::Device::kCpu) : Ended{kExitOk};
    }
    if (ended.device_lost || ended.exit_code == kExitOk) LogTotals();
    return ended.exit_code;
  }

 private:
  struct Ended {
    int exit_code = kExitOk;
    bool device_lost = false;
  };

  // One service, from loading its model until it is drained and gone.
  Ended Serve(runtime::Device device) {
    http_.routes().SetLoading();
    const auto start = std::chrono::steady_clock::now();
    const runtime::LoadOptions load = LoadOptionsOf(config_, device);
    const bool cpu_follows = device == runtime::Device::kAuto;
    // Asked before it can fail.
    const bool may_use_gpu = cpu_follows && load.dtype == kernels::DType::kBf16 && kernels::ProbeCuda().ok();
    Result<std::unique_ptr<runtime::Model>> model = runtime::LoadModel(config_.model, load);
    if (!model.ok()) {
      const bool by_device = may_use_gpu && MayBeTheDevices(model.status());
      return {Fail(kExitModel, "--model: " + model.status().message() + (by_device ? "; trying the CPU" : "")),
              by_device};
    }
    ServiceOptions options = OptionsOf(config_);
    if (cpu_follows) options.after_device_loss = "agentd goes on on the CPU, so ask again";
    std::atomic<bool> device_lost = false;
    options.on_device_lost = [&](const Status& status) {
      Fail(kExitFailed, status.message());
      device_lost = true;
      signals_.Wake();
    };
    Result<std::unique_ptr<Service>> service = NewService(std::move(*model), options);
    if (!service.ok()) return {FailService(config_, service.status())};
    Result<std::unique_ptr<RouterServer>> server =
        StartRouterServer(service->get(), {.endpoint = listen_, .on_drain = [this] { signals_.Drain(); }});
    if (!server.ok()) return {FailListen("--listen", server.status())};
    const Result<Endpoint> endpoint = ParseEndpoint(listen_, EndpointUse::kListen);
    if (endpoint.ok() && endpoint->transport == Transport::kTcp && !IsLoopback(endpoint->host)) {
      log_.Warn("--listen: " + endpoint->host + kReachable + "; whoever comes may read and drop what is stored");
    }
    listen_ = (*server)->endpoint();
    const ServedOverHttp served(&http_.routes(), service->get(), server->get());
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (const std::string& warning : (*service)->Warnings()) log_.Warn(warning);
    log_.Info(ReadyLine((*service)->Info(), (*service)->GetStats(), listen_, seconds));

    signals_.Ready();
    signals_.Wait(device_lost);
    http_.routes().SetDraining();
    if (!device_lost || !cpu_follows) {
      log_.Info("draining: requests under way are finished, new ones refused; signal again to stop at once");
    }
    (*server)->DrainAndStop();
    (*service)->Drain();  // the cold tier takes what only memory has
    const ReuseTotals totals = (*service)->GetStats().totals;
    requests_ += totals.requests;
    prompt_tokens_ += totals.prompt_tokens;
    reused_tokens_ += totals.prefix_tokens + totals.moved_tokens;
    if (device_lost) return {kExitFailed, true};
    return {kExitOk};
  }

  void LogTotals() const {
    log_.Info("stopped after " + std::to_string(requests_) + " requests; " + std::to_string(reused_tokens_) + " of " +
              std::to_string(prompt_tokens_) + " prompt tokens were reused");
  }

  const Config& config_;
  SignalWatch& signals_;
  const Log log_;
  HttpFront http_;
  std::string listen_;  // once a service has listened, the very port it had

  // Of all services.
  std::int64_t requests_ = 0;
  std::int64_t prompt_tokens_ = 0;
  std::int64_t reused_tokens_ = 0;
};

}  // namespace

int RunDaemon(const Config& config, SignalWatch& signals) { return Daemon(config, signals).Run(); }

}  // namespace kvshare::agentd
