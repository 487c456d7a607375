// LoadModel: from files to a model that computes.
#include "runtime/model.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <exception>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "kernels/cuda_plugin.h"
#include "libkvshare/core/status_macros.h"
#include "runtime/llama.h"
#include "runtime/model_files.h"
#include "runtime/parallel.h"
#include "runtime/weights.h"

namespace kvshare::runtime {
namespace {

constexpr std::uint64_t kRandomWeightsSeed = 1;
// Raised when KV that an earlier daemon stored may be wrong. 1: what was computed over chunks for an answer of no
// tokens was stored as exact.
constexpr std::uint64_t kStoredKvRevision = 2;

Result<ModelFiles> OpenFiles(const std::string& path, bool config_only) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return NotFound(path + ": no such file or directory");
  if (std::filesystem::is_directory(status)) return OpenHfDirectory(path, config_only);
  return OpenGguf(path);
}

// A configuration may claim any size, and with random weights no file limits it: more than the machine's memory is
// refused before anything is allocated.
Status CheckMemory(const ModelConfig& c, const LoadOptions& options) {
  const double q = static_cast<double>(c.num_heads) * c.head_dim, kv = static_cast<double>(c.num_kv_heads) * c.head_dim;
  const double hidden = static_cast<double>(c.hidden_size), inner = static_cast<double>(c.intermediate_size);
  const double element = static_cast<double>(kernels::DTypeBytes(options.dtype));
  const double layer = hidden * (2 * q + 2 * kv + 3 * inner);
  const double activations = static_cast<double>(options.max_batch_rows) * (12 * hidden + 8 * (2 * q + kv) + 4 * inner);
  const double rope = static_cast<double>(c.max_positions) * c.head_dim * sizeof(float);
  const double bytes =
      element * (c.num_layers * layer + 2 * static_cast<double>(c.vocab_size) * hidden) + activations + rope;
  const double memory = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (bytes <= memory) return OkStatus();
  const auto gib = [](double b) { return std::to_string(static_cast<std::int64_t>(b / (1 << 30)) + 1); };
  return ResourceExhausted("the model needs about " + gib(bytes) + " GiB of memory, this machine has " + gib(memory));
}

// Asked before anything is loaded, and not by the first prompt.
Status CheckHeads(const ModelConfig& c, const kernels::Capabilities& capabilities) {
  const std::vector<int>& known = capabilities.head_dims;
  if (known.empty() || std::find(known.begin(), known.end(), c.head_dim) != known.end()) return OkStatus();
  std::string list;
  for (const int head_dim : known) list += (list.empty() ? "" : ", ") + std::to_string(head_dim);
  return FailedPrecondition("head_dim = " + std::to_string(c.head_dim) + ": the " + capabilities.device +
                            " backend has attention kernels for " + list + "; use the CPU");
}

// Everything that decides what the bits of K and V are, or what a token id means.
Digest SpaceDigest(const ModelConfig& c, const Digest& weights, const Tokenizer* tokenizer,
                   const kernels::Capabilities& capabilities) {
  const auto real = [](double value) { return std::bit_cast<std::uint64_t>(value); };
  const auto whole = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  DigestBuilder builder("space");
  builder.U64(kStoredKvRevision);
  builder.Text(c.family).U64(whole(c.vocab_size)).U64(whole(c.hidden_size)).U64(whole(c.intermediate_size));
  builder.U64(whole(c.num_layers)).U64(whole(c.num_heads)).U64(whole(c.num_kv_heads)).U64(whole(c.head_dim));
  builder.U64(real(c.rms_norm_eps)).U64(whole(c.sliding_window));
  builder.U64(c.tied_embeddings).U64(c.qk_norm).U64(c.qkv_bias).U64(c.output_bias).U64(c.mlp_bias);
  const RopeConfig& r = c.rope;
  builder.U64(static_cast<std::uint64_t>(r.kind)).U64(real(r.theta)).U64(real(r.factor));
  builder.U64(real(r.low_freq_factor)).U64(real(r.high_freq_factor)).U64(whole(r.original_max_position));
  builder.U64(real(r.attention_factor)).U64(real(r.beta_fast)).U64(real(r.beta_slow)).U64(r.divisors.size());
  for (const double divisor : r.divisors) builder.U64(real(divisor));
  builder.Child(weights).Child(tokenizer != nullptr ? tokenizer->digest() : Digest{});
  builder.U64(kernels::kPageTokens).Text(kernels::DTypeName(capabilities.compute)).Text(capabilities.numerics_id);
  return builder.Finish();
}

Result<std::unique_ptr<kernels::Backend>> MakeBackend(const LoadOptions& options) {
  const bool narrow = options.dtype != kernels::DType::kF32;
  if (options.device == Device::kCuda && !narrow) {
    return InvalidArgument("the CUDA backend computes in bfloat16 or float16, not in float32");
  }
  if (options.device != Device::kCpu && narrow) {
    auto cuda = kernels::NewCudaBackend({.dtype = options.dtype});
    const bool cpu_can = options.device == Device::kAuto && options.dtype != kernels::DType::kF16;
    if (cuda.ok() || !cpu_can) return cuda;
  }
  return kernels::NewCpuBackend({.compute = options.dtype, .threads = options.threads});
}

// `backend`: what to compute on; null: what the options say.
Result<std::unique_ptr<Model>> Load(const std::string& path, const LoadOptions& options,
                                    std::unique_ptr<kernels::Backend> backend) {
  if (options.max_batch_rows < 1 || options.max_batch_rows > (std::int64_t{1} << 20)) {
    return InvalidArgument("max_batch_rows must be in 1..1048576");
  }
  const int threads = LoaderThreads(options.threads);
  KVS_ASSIGN_OR_RETURN(ModelFiles files, OpenFiles(path, options.random_weights));
  if (!options.random_weights) {
    KVS_RETURN_IF_ERROR(CheckTensors(files.config, files.tensors).WithContext(path));
  }
  if (backend == nullptr) {
    KVS_ASSIGN_OR_RETURN(backend, MakeBackend(options));
  }
  KVS_RETURN_IF_ERROR(CheckHeads(files.config, backend->capabilities()).WithContext(path));
  // Of the host's memory; a GPU's says itself when it is full.
  if (backend->capabilities().host_memory) {
    KVS_RETURN_IF_ERROR(CheckMemory(files.config, options).WithContext(path));
  }
  if (!options.lora.empty()) {
    if (options.random_weights) return InvalidArgument("a LoRA adapter needs the model's weights, not random ones");
    auto lora = OpenLora(options.lora, files.config);
    if (!lora.ok()) return lora.status().WithContext("LoRA adapter");
    files.lora = std::move(*lora);
  }

  ModelParts parts;
  parts.config = files.config;
  if (files.tokenizer.has_value()) {
    auto tokenizer = NewTokenizer(std::move(*files.tokenizer));
    if (!tokenizer.ok()) return tokenizer.status().WithContext(path + ": tokenizer");
    parts.tokenizer = std::move(*tokenizer);
    if (parts.tokenizer->vocab_size() > files.config.vocab_size) {
      return InvalidArgument(path + ": the tokenizer has " + std::to_string(parts.tokenizer->vocab_size()) +
                             " tokens, more than vocab_size = " + std::to_string(files.config.vocab_size));
    }
  }
  if (!files.chat_template.empty()) {
    auto chat = NewChatTemplate(files.chat_template, {.bos = files.bos_text, .eos = files.eos_text});
    if (!chat.ok()) return chat.status().WithContext(path + ": chat template");
    parts.chat_template = std::move(*chat);
  }
  parts.backend = std::move(backend);
  // First of all, because what it finds is part of the numerics id, and so of `space`.
  KVS_RETURN_IF_ERROR(parts.backend->SelfTest());

  Digest weights_digest;
  if (options.random_weights) {
    weights_digest = DigestBuilder("random-weights").U64(kRandomWeightsSeed).Finish();
    KVS_ASSIGN_OR_RETURN(parts.weights,
                         MakeRandomWeights(files.config, parts.backend.get(), threads, kRandomWeightsSeed));
  } else {
    weights_digest = WeightsDigest(files.config, files.tensors, threads);
    if (!files.lora.updates.empty()) {
      weights_digest = DigestBuilder("adapted-weights").Child(weights_digest).Child(files.lora.digest).Finish();
    }
    KVS_ASSIGN_OR_RETURN(parts.weights, LoadWeights(files, parts.backend.get(), threads));
  }
  parts.space = SpaceDigest(parts.config, weights_digest, parts.tokenizer.get(), parts.backend->capabilities());
  return NewLlamaModel(std::move(parts), options.max_batch_rows, threads);
}

}  // namespace

Result<Device> ParseDevice(std::string_view name) {
  if (name == "cpu") return Device::kCpu;
  if (name == "cuda") return Device::kCuda;
  if (name == "auto") return Device::kAuto;
  return InvalidArgument("'" + std::string(name) + "' is not a device: cpu, cuda or auto");
}

Result<std::unique_ptr<Model>> LoadModel(const std::string& path, const LoadOptions& options) {
  return LoadModelOn(nullptr, path, options);
}

Result<std::unique_ptr<Model>> LoadModelOn(std::unique_ptr<kernels::Backend> backend, const std::string& path,
                                           const LoadOptions& options) {
  // The standard library reports lack of memory or threads by exceptions; none may leave here.
  try {
    return Load(path, options, std::move(backend));
  } catch (const std::exception& error) {
    return ResourceExhausted(path + ": cannot be loaded: " + error.what());
  }
}

}  // namespace kvshare::runtime
