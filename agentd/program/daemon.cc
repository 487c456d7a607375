#include "agentd/program/daemon.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
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
#include "libkvshare/core/status_macros.h"
#include "runtime/model.h"

namespace kvshare::agentd {
namespace {

ServiceOptions OptionsOf(const Config& config) {
  ServiceOptions options;
  options.reuse = config.reuse;
  options.max_running = config.max_running;
  options.max_waiting = config.max_waiting;
  options.prefill_chunk_tokens = config.prefill_chunk;
  options.kv_pool_bytes = config.pool_bytes;
  options.eviction_policy = config.eviction;
  options.blend_recompute = config.blend_recompute;
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

}  // namespace

int RunDaemon(const Config& config, SignalWatch& signals) {
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

}  // namespace kvshare::agentd
