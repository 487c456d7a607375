#include "tools/kvctl/target.h"

#include <utility>

#include "agentd/in_process_client.h"

namespace kvshare::kvctl {

Result<std::unique_ptr<runtime::Model>> LoadModelAt(const std::string& path, const runtime::LoadOptions& options) {
  auto model = runtime::LoadModel(path, options);
  if (model.ok() || model.status().message().find(path) != std::string::npos) return model;
  return model.status().WithContext(path);
}

TargetOptions TargetOf(const Source& source) {
  return {.model = source.model,
          .endpoint = source.endpoint,
          .timeout = source.timeout,
          .dtype = source.dtype,
          .threads = source.threads,
          .lora = source.lora};
}

runtime::LoadOptions LoadOptionsOf(const Source& source) {
  return {.dtype = source.dtype, .threads = source.threads, .lora = source.lora, .device = source.device};
}

std::unique_ptr<Target> Target::Open(const TargetOptions& options, Failure* failure) {
  auto target = std::make_unique<Target>();
  if (!options.endpoint.empty()) {
    auto client = Connect({.endpoint = options.endpoint, .timeout = options.timeout});
    if (!client.ok()) {
      *failure = {kUsage, client.status().WithContext("--endpoint")};
      return nullptr;
    }
    target->client_ = std::move(*client);
    auto info = target->client_->Ping(options.timeout);
    if (!info.ok()) {
      const bool version = info.status().code() == StatusCode::kFailedPrecondition;
      *failure = {version ? kVersion : kCannotConnect, info.status().WithContext(options.endpoint)};
      return nullptr;
    }
    target->info_ = std::move(*info);
    return target;
  }
  auto model = LoadModelAt(options.model, {.dtype = options.dtype, .threads = options.threads, .lora = options.lora});
  if (!model.ok()) {
    *failure = {kModel, model.status()};
    return nullptr;
  }
  std::int64_t pool = options.kv_pool_bytes;
  if (pool == 0) {
    const std::int64_t pages = (*model)->config().max_positions / kernels::kPageTokens + 2;
    pool = pages * static_cast<std::int64_t>((*model)->kv_layout().page_bytes());
  }
  agentd::ServiceOptions service_options{.reuse = options.reuse, .kv_pool_bytes = pool};
  service_options.blend_recompute = options.blend_recompute;
  service_options.blend_gradual = options.blend_gradual;
  auto service = agentd::NewService(std::move(*model), service_options);
  if (!service.ok()) {
    *failure = {service.status().code() == StatusCode::kResourceExhausted ? kUsage : kFailed, service.status()};
    return nullptr;
  }
  target->service_ = std::move(*service);
  target->client_ = agentd::NewInProcessClient(target->service_.get());
  target->info_ = target->service_->Info();
  return target;
}

int Fail(const Failure& failure) { return Fail(failure.code, failure.status.message()); }

}  // namespace kvshare::kvctl
