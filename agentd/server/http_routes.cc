#include "agentd/server/http_routes.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "agentd/server/metrics.h"

namespace kvshare::agentd {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kJson = "application/json";

std::string Line(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n"; }

}  // namespace

void HttpRoutes::SetLoading() {
  const std::lock_guard lock(mu_);
  phase_ = Phase::kLoading;
}

void HttpRoutes::Serve(Service* service, const RouterServer* wire) {
  const std::lock_guard lock(mu_);
  phase_ = Phase::kServing;
  service_ = service;
  wire_ = wire;
}

void HttpRoutes::SetDraining() {
  const std::lock_guard lock(mu_);
  if (phase_ == Phase::kServing) phase_ = Phase::kDraining;
}

void HttpRoutes::Close() {
  const std::lock_guard lock(mu_);
  phase_ = Phase::kStopped;
  service_ = nullptr;
  wire_ = nullptr;
}

void HttpRoutes::Handle(const HttpRequest& request, HttpReply& reply) {
  const std::string& path = request.path;
  const bool health = path == "/health" || path == "/live";
  if (!health && path != "/ready" && path != "/metrics" && path != "/version") {
    reply.Send(404, kJson, HttpErrorJson(404, "no such path; there are /health, /ready, /metrics and /version"));
  } else if (request.method != "GET" && request.method != "HEAD") {
    reply.Send(405, kJson, HttpErrorJson(405, "only GET and HEAD are known here"), {{"Allow", "GET, HEAD"}});
  } else if (health) {
    reply.Send(200, kJson, Line({{"status", "ok"}}));
  } else if (path == "/ready") {
    Ready(reply);
  } else if (path == "/metrics") {
    Metrics(reply);
  } else {
    Version(reply);
  }
}

void HttpRoutes::Ready(HttpReply& reply) {
  Phase phase;
  {
    const std::lock_guard lock(mu_);
    phase = phase_;
  }
  if (phase == Phase::kServing) {
    reply.Send(200, kJson, Line({{"status", "ready"}}));
    return;
  }
  const char* status = phase == Phase::kLoading ? "loading the model" : "draining";
  reply.Send(503, kJson, Line({{"status", status}}), {{"Retry-After", "1"}});
}

void HttpRoutes::Metrics(HttpReply& reply) {
  MetricsInput input;
  input.version = version_;
  if (const HttpServer* server = server_; server != nullptr) input.http = server->counters();
  {
    const std::lock_guard lock(mu_);
    input.ready = phase_ == Phase::kServing;
    if (service_ != nullptr) {
      input.info = service_->Info();
      input.stats = service_->GetStats();
    }
    if (wire_ != nullptr) input.wire = wire_->counters();
  }
  reply.Send(200, kMetricsContentType, MetricsText(input));
}

void HttpRoutes::Version(HttpReply& reply) {
  Json json = {{"name", "agentd"}, {"version", version_}};
  {
    const std::lock_guard lock(mu_);
    if (service_ != nullptr) {
      const ServerInfo info = service_->Info();
      json["model"] = info.model;
      json["space"] = info.space;
      json["dtype"] = info.dtype;
      json["device"] = info.device;
      json["isa"] = info.isa;
      json["reuse"] = ReuseModeName(info.reuse);
      json["max_context_tokens"] = info.max_context_tokens;
    }
  }
  reply.Send(200, kJson, Line(json));
}

}  // namespace kvshare::agentd
