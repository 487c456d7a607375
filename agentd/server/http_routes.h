// What is served over HTTP: the daemon's health and numbers, for probes, Prometheus and people. Nothing here changes
// anything.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "agentd/server/http_server.h"
#include "agentd/server/router_server.h"
#include "agentd/service.h"

namespace kvshare::agentd {

// Lives from before the model is loaded until after the last request. Thread-safe.
class HttpRoutes {
 public:
  explicit HttpRoutes(std::string version) : version_(std::move(version)) {}

  // A service is on its way, and /ready says so: at first, and again where another one follows.
  void SetLoading();
  // From now on requests are accepted. Both must outlive Close().
  void Serve(Service* service, const RouterServer* wire);
  // No new requests are accepted; /ready says so.
  void SetDraining();
  // Waits for answers under way that ask the service, and forgets it: it may be destroyed then.
  void Close();
  // The server whose handler this is, for its counters; null: none.
  void SetServer(const HttpServer* server) { server_ = server; }

  HttpAnswer Handle(const HttpRequest& request);

 private:
  enum class Phase { kLoading, kServing, kDraining, kStopped };

  HttpAnswer Ready();
  HttpAnswer Metrics();
  HttpAnswer Version();

  const std::string version_;
  std::atomic<const HttpServer*> server_ = nullptr;
  std::mutex mu_;
  Phase phase_ = Phase::kLoading;       // guarded by mu_, as all below
  Service* service_ = nullptr;          // held while it is asked for statistics, which never takes long
  const RouterServer* wire_ = nullptr;  // likewise
};

}  // namespace kvshare::agentd
