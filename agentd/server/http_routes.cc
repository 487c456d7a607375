#include "agentd/server/http_routes.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "agentd/server/metrics.h"
#include "libkvshare/core/json_text.h"

namespace kvshare::agentd {
namespace {

using Json = nlohmann::ordered_json;

HttpAnswer JsonLine(int status, const Json& json) {
  return {.status = status, .content_type = "application/json", .body = JsonText(json) + "\n"};
}

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

HttpAnswer HttpRoutes::Handle(const HttpRequest& request) {
  const std::string& path = request.path;
  const bool health = path == "/health" || path == "/live";
  if (!health && path != "/ready" && path != "/metrics" && path != "/version") {
    return HttpError(404, "no such path; there are /health, /ready, /metrics and /version");
  }
  if (request.method != "GET" && request.method != "HEAD") {
    HttpAnswer answer = HttpError(405, "only GET and HEAD are known here");
    answer.headers = {{"Allow", "GET, HEAD"}};
    return answer;
  }
  if (health) return JsonLine(200, {{"status", "ok"}});
  if (path == "/ready") return Ready();
  if (path == "/metrics") return Metrics();
  return Version();
}

HttpAnswer HttpRoutes::Ready() {
  Phase phase;
  {
    const std::lock_guard lock(mu_);
    phase = phase_;
  }
  if (phase == Phase::kServing) return JsonLine(200, {{"status", "ready"}});
  HttpAnswer answer = JsonLine(503, {{"status", phase == Phase::kLoading ? "loading the model" : "draining"}});
  answer.headers = {{"Retry-After", "1"}};
  return answer;
}

HttpAnswer HttpRoutes::Metrics() {
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
  return {.status = 200, .content_type = std::string(kMetricsContentType), .body = MetricsText(input)};
}

HttpAnswer HttpRoutes::Version() {
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
  return JsonLine(200, json);
}

}  // namespace kvshare::agentd
