// kvctl doctor: what this machine offers kvshare, what is missing, and what to do about it.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "kernels/cuda_plugin.h"
#include "libkvshare/core/json_text.h"
#include "libkvshare/core/status_macros.h"
#include "tools/kvctl/ceilings.h"
#include "tools/kvctl/commands.h"
#include "tools/kvctl/machine.h"
#include "tools/kvctl/target.h"

namespace kvshare::kvctl {
namespace {

using Json = nlohmann::ordered_json;

struct Finding {
  bool ok = true;
  std::string what;
  std::string advice;  // when not ok
};

Result<Json> Measure(std::vector<Finding>* findings) {
  KVS_ASSIGN_OR_RETURN(const auto backend, kernels::NewCpuBackend({}));
  const kernels::Capabilities& device = backend->capabilities();
  const Status self_test = backend->SelfTest();
  findings->push_back({self_test.ok(), "matrix products give each row the same bits in any batch",
                       self_test.message() + "; exact reuse would not be exact: use another oneDNN version"});
  const bool fast = device.isa == "amx-bf16" || device.isa == "avx512-bf16";
  findings->push_back({fast, "bfloat16 matrix instructions (AMX-BF16 or AVX-512-BF16)",
                       "this CPU runs the " + device.isa + " kernels: right, and slower"});
  KVS_ASSIGN_OR_RETURN(const double flops, MeasureMatmulFlops(*backend));
  const double read = MeasureReadBytesPerSecond(device.threads);
  return Json{
      {"isa", device.isa},          {"linear", device.linear},      {"dtype", kernels::DTypeName(device.compute)},
      {"threads", device.threads},  {"matmul_gflops", flops / 1e9}, {"memory_read_gbps", read / 1e9},
      {"self_test", self_test.ok()}};
}

// Whether the CUDA backend can be used, and why not. Opens its plug-in, as nothing else does unasked.
Json CheckCuda(std::vector<Finding>* findings) {
  const auto device = kernels::ProbeCuda();
  findings->push_back({device.ok(), "the CUDA backend can be used", device.status().message()});
  if (!device.ok()) return {{"usable", false}, {"reason", device.status().message()}};
  return {{"usable", true},
          {"reason", ""},
          {"device", device->name},
          {"arch", device->arch},
          {"memory_bytes", device->memory_bytes},
          {"devices", device->devices}};
}

void CheckMachine(std::vector<Finding>* findings) {
  const std::int64_t available = AvailableMemoryBytes();
  findings->push_back({available == 0 || available > (std::int64_t{2} << 30), "2 GiB of memory to spare",
                       "free some memory, or give agentd a small --kv-pool-size"});
  findings->push_back({!FindSmolLm2().empty(), "SmolLM2-135M-Instruct is at hand",
                       "./quickstart fetches it; any Llama-family model works with --model"});
}

void CheckModel(const ModelOptions& options, std::vector<Finding>* findings) {
  if (options.source.model.empty()) return;
  auto model = LoadModelAt(options.source.model, LoadOptionsOf(options.source));
  findings->push_back({model.ok(), "the model loads: " + options.source.model, model.status().message()});
  if (!model.ok()) return;
  const auto& config = (*model)->config();
  const auto page = static_cast<std::int64_t>((*model)->kv_layout().page_bytes());
  const std::int64_t context = config.max_positions / kernels::kPageTokens * page;
  const std::int64_t memory = AvailableMemoryBytes();
  findings->push_back({memory == 0 || context * 2 < memory, "memory holds two full contexts of it",
                       "one context of " + std::to_string(config.max_positions) + " tokens takes " +
                           std::to_string(context >> 20) + " MiB"});
  findings->push_back(
      {(*model)->chat_template() != nullptr, "it has a chat template", "only --prompt and --ids work with it"});
}

void CheckLimits(std::vector<Finding>* findings) {
  rlimit files{};
  const bool known = getrlimit(RLIMIT_NOFILE, &files) == 0;
  findings->push_back({!known || files.rlim_cur >= 1024, "1024 open files (a client needs two or three)",
                       "raise it with `ulimit -n 4096` before agentd starts"});
  const int memory = memfd_create("kvctl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  findings->push_back({memory >= 0, "memory that can be handed to clients (memfd)",
                       "leases cannot be read in place here; everything else works"});
  if (memory >= 0) close(memory);
}

void CheckColdDir(const std::string& directory, std::vector<Finding>* findings, Json* facts) {
  if (directory.empty()) return;
  const Result<DiskFacts> disk = JudgeDisk(directory);
  findings->push_back({disk.ok(), "KV can be kept in " + directory, disk.status().message()});
  if (!disk.ok()) return;
  findings->push_back({disk->direct, "that disk can be read past the page cache (O_DIRECT)",
                       "the cold tier works through the page cache there, which takes memory and time"});
  findings->push_back({disk->free_bytes > (std::int64_t{8} << 30), "8 GiB are free there",
                       "give agentd a --cold-size below the " + std::to_string(disk->free_bytes >> 20) + " MiB"});
  (*facts)["cold_dir"] = {{"path", directory}, {"free_bytes", disk->free_bytes}, {"direct", disk->direct}};
}

}  // namespace

int RunDoctor(const ModelOptions& options) {
  std::vector<Finding> findings;
  CheckMachine(&findings);
  CheckLimits(&findings);
  Json disk = Json::object();
  CheckColdDir(options.cold_dir, &findings, &disk);
  auto measured = Measure(&findings);
  if (!measured.ok()) return Fail(measured.status());
  CheckModel(options, &findings);
  Json cuda = CheckCuda(&findings);
  Json facts = {{"cpu", CpuName()},
                {"os", OsName()},
                {"cores", AvailableCores()},
                {"memory_bytes", TotalMemoryBytes()},
                {"memory_available_bytes", AvailableMemoryBytes()},
                {"smollm2", FindSmolLm2()}};
  facts.update(*measured);
  facts.update(disk);
  facts["cuda"] = std::move(cuda);
  if (options.format == OutputFormat::kJson) {
    facts["checks"] = Json::array();
    for (const Finding& f : findings)
      facts["checks"].push_back({{"check", f.what}, {"ok", f.ok}, {"advice", f.ok ? "" : f.advice}});
    std::puts(JsonText(facts).c_str());
    return kOk;
  }
  std::printf("machine   %s, %d cores, %.1f GiB memory (%.1f free), %s\n", CpuName().c_str(), AvailableCores(),
              static_cast<double>(TotalMemoryBytes()) / (1 << 30),
              static_cast<double>(AvailableMemoryBytes()) / (1 << 30), OsName().c_str());
  std::printf("kernels   %s, %s, %s\n", facts["isa"].get<std::string>().c_str(),
              facts["linear"].get<std::string>().c_str(), facts["dtype"].get<std::string>().c_str());
  if (facts["cuda"]["usable"].get<bool>()) {
    std::printf("gpu       %s, %s, %.0f GiB (agentd --device cuda)\n",
                facts["cuda"]["device"].get<std::string>().c_str(), facts["cuda"]["arch"].get<std::string>().c_str(),
                static_cast<double>(facts["cuda"]["memory_bytes"].get<std::uint64_t>()) / (1 << 30));
  }
  std::printf("measured  %.0f GFLOP/s in a large matrix product, %.1f GB/s from memory\n",
              facts["matmul_gflops"].get<double>(), facts["memory_read_gbps"].get<double>());
  for (const Finding& f : findings) {
    std::printf("%-9s %s%s%s\n", f.ok ? "ok" : "look", f.what.c_str(), f.ok ? "" : ": no. ",
                f.ok ? "" : f.advice.c_str());
  }
  return kOk;
}

}  // namespace kvshare::kvctl
