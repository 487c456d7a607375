// Backend: the one interface to device compute. It knows tensors and paged KV; no models, no caches.
//
// Numerics contract (docs/ARCHITECTURE.md), which every backend and every version of every kernel keeps:
//   - 16-bit or fp32 storage, fp32 accumulation.
//   - Batch-invariant: each output row is a function of that row's inputs and absolute positions alone. It does
//     not depend on how many rows stand beside it, where the batch was cut, how many threads run, or on which
//     pages the keys lie. Hence an exact cache hit equals recomputation bit for bit.
//
// Methods are called by one thread at a time (the engine's). Shapes are the caller's responsibility and are
// checked invariants: no byte from wire, disk or model file may reach a backend unvalidated. The CPU backend
// completes each call before it returns; a device backend may only enqueue, and reports failures in Sync().
//
// Where things lie: matrices, weights, norms, RoPE tables and pages in the backend's memory (Allocate, Upload); ids,
// positions, slots, and segments with their tables in host memory, read before the call returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/paged_kv.h"
#include "kernels/tensor.h"
#include "kvshare/status.h"

namespace kvshare::kernels {

class DeviceKv;

// Device memory; freed with the handle. The handle must not outlive its backend.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual std::byte* data() const = 0;
  virtual std::size_t size() const = 0;
};

// Weights of one linear layer in whatever form the backend multiplies fastest.
class LinearWeights {
 public:
  virtual ~LinearWeights() = default;
  virtual std::int64_t in_features() const = 0;   // K
  virtual std::int64_t out_features() const = 0;  // N
  virtual std::size_t bytes() const = 0;          // as stored; what one row of output has to read
};

// A host matrix [out_features, in_features], row-major, as model files hold it.
struct HostMatrix {
  const float* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

// Several linear layers over the same input, concatenated along the output: [q; k; v], [gate; up].
struct LinearSpec {
  std::span<const HostMatrix> parts;
  std::span<const float> bias;  // [sum of rows] or empty
  bool gated = false;           // two parts of equal rows, combined by GatedLinear
};

// cos and sin of every (position, frequency), made in double precision: RoPE's static kinds only.
//   cos[p * half + j] = factor * cos(p * inv_freq[j]), half = rotary_dim / 2
struct RopeTable {
  std::span<const float> cos;  // [positions, half], on the device
  std::span<const float> sin;
  std::int64_t positions = 0;
  int half = 0;  // rotary_dim / 2; dimensions beyond rotary_dim are not rotated
};

struct EmbedParams {
  std::span<const std::int32_t> ids;  // [T], each < table rows
  MatrixView table;                   // [vocab, hidden], fp32 or bf16
  MatrixView out;                     // [T, hidden] fp32
};

// out = x / sqrt(mean(x^2) + eps) * weight, per row; the mean in fp32 in a fixed order.
struct RmsNormParams {
  MatrixView x;                   // [T, hidden] fp32
  std::span<const float> weight;  // [hidden]
  float eps = 0;
  MatrixView out;  // [T, hidden], compute dtype
};

// out = x W^T + bias, or out += x W^T + bias with `accumulate`.
struct LinearParams {
  MatrixView x;  // [T, K], compute dtype
  const LinearWeights* weights = nullptr;
  MatrixView out;  // [T, N] fp32
  bool accumulate = false;
};

// out = silu(x Wg^T + bg) * (x Wu^T + bu) (SwiGLU, arXiv 2002.05202), weights made with LinearSpec::gated.
struct GatedLinearParams {
  MatrixView x;  // [T, K], compute dtype
  const LinearWeights* weights = nullptr;
  MatrixView out;  // [T, N / 2], compute dtype
};

// Splits qkv rows [q heads | k heads | v heads]; applies the per-head RMS norms of QK-norm models in place to q and to
// k, both of which stay un-rotated there (attention rotates q per segment); stores k, rotated at the row's position,
// and v at the row's slot in the dtype of the pages. Rows of kNoSlot are not stored.
struct StoreKvParams {
  MatrixView qkv;  // [T, (num_heads + 2 num_kv_heads) * head_dim] fp32
  int num_heads = 0;
  int layer = 0;
  std::span<const float> q_norm;  // [head_dim] or empty
  std::span<const float> k_norm;
  float eps = 0;
  RopeTable rope;
  std::span<const std::int64_t> positions;  // [T]
  std::span<const KvSlot> slots;            // [T]
  KvPages pages;
};

// Attention of rows over segments (docs/design/attention.md):
//   out[i, h] = sum_j softmax_j(scale * <R(pos_i - shift_s) q[i, h], k_j>) v_j
// over all keys j of all segments s that row i sees, with position_j <= pos_i (and > pos_i - window if window > 0).
//
// Order of computation, which fixes the bits: a segment is cut into splits of kSplitTokens at multiples counted from
// row 0 of its first page; within a split, online softmax over tiles of 64 keys (one page) in ascending order gives a
// partial (out, lse); partials are folded left to right, over splits and then over segments in the order given. A row
// that sees no key gets zeros.
struct AttentionParams {
  MatrixView q;  // [T, >= num_heads * head_dim] fp32, un-rotated
  int num_heads = 0;
  int layer = 0;
  float scale = 0;
  std::int64_t window = 0;  // sliding window, 0 = none
  RopeTable rope;
  std::span<const std::int64_t> positions;  // [T]
  std::span<const KvSegment> segments;
  KvPages pages;
  MatrixView out;  // [T, num_heads * head_dim], compute dtype
};

inline constexpr std::int64_t kSplitTokens = 1024;

struct Capabilities {
  std::string device;  // "cpu"
  std::string isa;     // amx-bf16 | avx512-bf16 | avx512 | avx2 | plain
  std::string linear;  // the library and version behind Linear
  DType compute = DType::kF32;
  int threads = 1;
  // Names everything that can change a result's bits; part of the KV's `space`.
  std::string numerics_id;
  bool host_memory = true;          // the host reads and writes the backend's memory in place
  std::vector<int> head_dims = {};  // those that Attention has kernels for; empty: all
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const Capabilities& capabilities() const = 0;

  // Zeroed, aligned to 64 bytes. ResourceExhausted when the device has no more.
  virtual Result<std::unique_ptr<Buffer>> Allocate(std::size_t bytes) = 0;
  virtual Result<std::unique_ptr<LinearWeights>> MakeLinear(const LinearSpec& spec) = 0;
  // What Allocate could still give, of memory that is the backend's own; 0 where it is the host's.
  virtual std::size_t free_bytes() const { return 0; }

  virtual void Embed(const EmbedParams& p) = 0;
  virtual void RmsNorm(const RmsNormParams& p) = 0;
  virtual void Linear(const LinearParams& p) = 0;
  virtual void GatedLinear(const GatedLinearParams& p) = 0;
  virtual void StoreKv(const StoreKvParams& p) = 0;
  virtual void Attention(const AttentionParams& p) = 0;

  // Copies the first `tokens` token rows of every slab of page `from` into page `to`.
  virtual void CopyPageRows(const KvPages& pages, PageIndex from, PageIndex to, int tokens) = 0;

  // Between host memory and the backend's. Upload has read `from` when it returns; Download comes after all work that
  // was enqueued before. What the host reads in place anyway is copied.
  virtual Status Upload(std::byte* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return OkStatus();
  }
  virtual Status Download(void* to, const std::byte* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return OkStatus();
  }

  // What is done to KV in the backend's own memory (device_kv.h); null where the host reads that memory.
  virtual DeviceKv* device_kv() { return nullptr; }

  virtual Status Sync() = 0;

  // Checks on this machine, with this library, that Linear is row-invariant. Internal when it is not.
  virtual Status SelfTest() = 0;
};

enum class CpuIsa { kAuto, kAmxBf16, kAvx512Bf16, kAvx512, kAvx2, kPlain };
Result<CpuIsa> ParseCpuIsa(std::string_view name);

struct CpuBackendOptions {
  DType compute = DType::kBf16;  // or kF32: of activations between ops and of KV; weights follow where the ISA can
  int threads = 0;               // 0: one per core this process may use
  CpuIsa isa = CpuIsa::kAuto;    // for tests; InvalidArgument when this machine lacks it
};

// The environment variable KVSHARE_ISA (amx-bf16 | avx512-bf16 | avx512 | avx2 | plain) stands in for isa == kAuto.
Result<std::unique_ptr<Backend>> NewCpuBackend(const CpuBackendOptions& options);

}  // namespace kvshare::kernels
