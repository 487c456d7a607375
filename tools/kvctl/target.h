// What a command talks to: a daemon (--endpoint) or a model loaded into this process (--model).
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "agentd/service.h"
#include "kvshare/client.h"
#include "kvshare/types.h"
#include "runtime/model.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/exit_code.h"

namespace kvshare::kvctl {

struct TargetOptions {
  std::string model;  // exactly one of model and endpoint is given
  std::string endpoint;
  std::chrono::milliseconds timeout{30000};
  kernels::DType dtype = kernels::DType::kBf16;
  int threads = 0;
  ReuseMode reuse = ReuseMode::kExact;  // of the in-process service
  std::int64_t kv_pool_bytes = 0;       // of the in-process service; 0: one full context
  std::string lora = "";
  std::optional<double> blend_recompute;  // of the in-process service; unset: its default
  bool blend_gradual = false;             // likewise
};

// What a command's --model, --endpoint and their companions ask for.
TargetOptions TargetOf(const Source& source);
runtime::LoadOptions LoadOptionsOf(const Source& source);

// A failure and the exit code that goes with it.
struct Failure {
  ExitCode code;
  Status status;
};

// LoadModel with the exit code of a model that cannot be loaded; the message names `path`.
Result<std::unique_ptr<runtime::Model>> LoadModelAt(const std::string& path, const runtime::LoadOptions& options);

class Target {
 public:
  // Waits for a daemon up to the timeout. On failure `failure` says why.
  static std::unique_ptr<Target> Open(const TargetOptions& options, Failure* failure);

  Client& client() { return *client_; }
  const ServerInfo& info() const { return info_; }
  bool in_process() const { return service_ != nullptr; }

 private:
  std::unique_ptr<agentd::Service> service_;  // outlives client_
  std::unique_ptr<Client> client_;
  ServerInfo info_;
};

int Fail(const Failure& failure);

}  // namespace kvshare::kvctl
