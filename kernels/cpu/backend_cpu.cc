// The CPU backend: checks shapes, cuts work into tasks, and calls the kernels of the instruction set chosen at start.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/thread_pool.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels {

namespace {

// Raised when a kernel's arithmetic changes: KV made before must not meet KV made after.
constexpr int kKernelRevision = 2;

// As attention has it.
constexpr int kMaxHeadDim = 256;

// Rows of an element-wise operation that one task takes: a few microseconds of work.
constexpr std::int64_t kRowsPerTask = 16;

// Anonymous pages of the kernel's: zeroed, and given back as a whole.
class MappedBuffer : public Buffer {
 public:
  MappedBuffer(std::byte* data, std::size_t size) : data_(data), size_(size) {}
  ~MappedBuffer() override { munmap(data_, std::max<std::size_t>(size_, 1)); }
  std::byte* data() const override { return data_; }
  std::size_t size() const override { return size_; }

 private:
  std::byte* data_;
  std::size_t size_;
};

class CpuBackend : public Backend {
 public:
  CpuBackend(CpuIsa isa, DType compute, int threads)
      : isa_(isa), compute_(compute), pool_(threads), elementwise_(ElementwiseFor(isa)) {}

  Status Start() {
    KVS_ASSIGN_OR_RETURN(linear_, NewLinearEngine({.isa = isa_, .compute = compute_}, elementwise_, pool_));
    Describe();
    return OkStatus();
  }

  const Capabilities& capabilities() const override { return capabilities_; }

  Result<std::unique_ptr<Buffer>> Allocate(std::size_t bytes) override {
    const std::size_t size = std::max<std::size_t>(bytes, 1);
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      return ResourceExhausted("the machine has no " + std::to_string(bytes >> 20) + " MiB of memory to give");
    }
    madvise(data, size, MADV_HUGEPAGE);  // fewer page faults where the system allows it
    return std::unique_ptr<Buffer>(std::make_unique<MappedBuffer>(static_cast<std::byte*>(data), bytes));
  }

  Result<std::unique_ptr<LinearWeights>> MakeLinear(const LinearSpec& spec) override {
    auto weights = linear_->Pack(spec);
    Describe();  // a shape that failed its check multiplies differently, and the numerics id says so
    return weights;
  }

  void Embed(const EmbedParams& p) override {
    const auto rows = static_cast<std::int64_t>(p.ids.size());
    KVS_CHECK(p.out.rows == rows && p.out.cols == p.table.cols && p.out.dtype == DType::kF32);
    ForRows(rows, [&](std::int64_t r) {
      const std::int64_t id = p.ids[static_cast<std::size_t>(r)];
      KVS_CHECK(id >= 0 && id < p.table.rows);
      const std::byte* row =
          p.table.row<std::byte>(0) + static_cast<std::size_t>(id * p.table.stride) * DTypeBytes(p.table.dtype);
      elementwise_.widen(row, p.table.dtype, p.table.cols, p.out.row<float>(r));
    });
  }

  void RmsNorm(const RmsNormParams& p) override {
    KVS_CHECK(p.x.dtype == DType::kF32 && p.out.rows == p.x.rows && p.out.cols == p.x.cols);
    KVS_CHECK(static_cast<std::int64_t>(p.weight.size()) == p.x.cols);
    ForRows(p.x.rows, [&](std::int64_t r) {
      std::byte* out = p.out.row<std::byte>(0) + static_cast<std::size_t>(r * p.out.stride) * DTypeBytes(p.out.dtype);
      elementwise_.rms_norm(p.x.row<float>(r), p.weight.data(), p.eps, p.x.cols, p.out.dtype, out);
    });
  }

  void Linear(const LinearParams& p) override { linear_->Run(p); }
  void GatedLinear(const GatedLinearParams& p) override { linear_->RunGated(p); }

  void StoreKv(const StoreKvParams& p) override {
    const KvLayout& layout = p.pages.layout;
    const int d = layout.head_dim;
    KVS_CHECK(p.qkv.dtype == DType::kF32 && p.qkv.cols == std::int64_t{p.num_heads + 2 * layout.num_kv_heads} * d);
    KVS_CHECK(static_cast<std::int64_t>(p.positions.size()) == p.qkv.rows &&
              static_cast<std::int64_t>(p.slots.size()) == p.qkv.rows);
    KVS_CHECK(p.layer >= 0 && p.layer < layout.num_layers && 2 * p.rope.half <= d && d <= kMaxHeadDim);
    KVS_CHECK(p.q_norm.empty() || static_cast<int>(p.q_norm.size()) == d);
    KVS_CHECK(p.k_norm.empty() || static_cast<int>(p.k_norm.size()) == d);
    ForRows(p.qkv.rows, [&](std::int64_t r) { StoreRow(p, r); });
  }

  void Attention(const AttentionParams& p) override { CpuAttention(p, isa_, pool_); }

  void CopyPageRows(const KvPages& pages, PageIndex from, PageIndex to, int tokens) override {
    KVS_CHECK(from < pages.num_pages && to < pages.num_pages && tokens >= 0 && tokens <= kPageTokens);
    const KvLayout& layout = pages.layout;
    const std::size_t bytes = layout.slab_bytes() / kPageTokens * static_cast<std::size_t>(tokens);
    pool_.ParallelFor(layout.num_layers, [&](std::int64_t layer) {
      for (int value = 0; value < 2; ++value) {
        for (int head = 0; head < layout.num_kv_heads; ++head) {
          std::memcpy(pages.slab(to, static_cast<int>(layer), value, head),
                      pages.slab(from, static_cast<int>(layer), value, head), bytes);
        }
      }
    });
  }

  Status Sync() override { return OkStatus(); }

  Status SelfTest() override {
    Status status = linear_->SelfTest();
    Describe();
    return status;
  }

 private:
  void Describe() {
    capabilities_ = {.device = "cpu",
                     .isa = std::string(CpuIsaName(isa_)),
                     .linear = linear_->description(),
                     .compute = compute_,
                     .threads = pool_.size(),
                     .numerics_id = ""};
    capabilities_.numerics_id = "cpu/" + capabilities_.isa + "/" + std::string(DTypeName(compute_)) + "/" +
                                capabilities_.linear + "/split" + std::to_string(kSplitTokens) + "/r" +
                                std::to_string(kKernelRevision);
  }

  template <typename Fn>
  void ForRows(std::int64_t rows, Fn&& fn) {
    pool_.ParallelForAtHome((rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, int) {
      const std::int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
      for (std::int64_t r = task * kRowsPerTask; r < end; ++r) fn(r);
    });
  }

  // One row of StoreKv: norms, rotation of k, and the copy into the page.
  void StoreRow(const StoreKvParams& p, std::int64_t r) {
    const KvLayout& layout = p.pages.layout;
    const int d = layout.head_dim;
    const KvSlot slot = p.slots[static_cast<std::size_t>(r)];
    const std::int64_t position = p.positions[static_cast<std::size_t>(r)];
    const bool stored = slot != kNoSlot;
    KVS_CHECK(!stored || (slot.page < p.pages.num_pages && slot.offset >= 0 && slot.offset < kPageTokens));
    KVS_CHECK(position >= 0 && position < p.rope.positions);
    const float* cos = p.rope.cos.data() + position * p.rope.half;
    const float* sin = p.rope.sin.data() + position * p.rope.half;
    float* q = p.qkv.row<float>(r);
    float* k = q + std::int64_t{p.num_heads} * d;
    const float* v = k + std::int64_t{layout.num_kv_heads} * d;
    if (!p.q_norm.empty()) {
      for (int h = 0; h < p.num_heads; ++h) {
        elementwise_.rms_norm(q + h * d, p.q_norm.data(), p.eps, d, DType::kF32, q + h * d);
      }
    }
    const std::size_t row_offset = static_cast<std::size_t>(slot.offset) * layout.slab_bytes() / kPageTokens;
    for (int h = 0; h < layout.num_kv_heads; ++h) {
      float* head = k + h * d;
      if (!p.k_norm.empty()) elementwise_.rms_norm(head, p.k_norm.data(), p.eps, d, DType::kF32, head);
      if (!stored) continue;
      float rotated[kMaxHeadDim];
      std::copy_n(head, d, rotated);
      elementwise_.rotate(rotated, cos, sin, p.rope.half);
      elementwise_.narrow(rotated, d, layout.dtype, p.pages.slab(slot.page, p.layer, 0, h) + row_offset);
      elementwise_.narrow(v + h * d, d, layout.dtype, p.pages.slab(slot.page, p.layer, 1, h) + row_offset);
    }
  }

  const CpuIsa isa_;
  const DType compute_;
  ThreadPool pool_;
  const ElementwiseKernel& elementwise_;
  std::unique_ptr<LinearEngine> linear_;
  Capabilities capabilities_;
};

}  // namespace

Result<std::unique_ptr<Backend>> NewCpuBackend(const CpuBackendOptions& options) {
  if (options.threads < 0 || options.threads > 1024) {
    return InvalidArgument("threads must be from 1 to 1024 (0: one per core), not " + std::to_string(options.threads));
  }
  if (options.compute == DType::kF16) {
    return InvalidArgument("the CPU computes in bfloat16 or float32; float16 is for a GPU (--device cuda)");
  }
  KVS_ASSIGN_OR_RETURN(const CpuIsa isa, ResolveCpuIsa(options.isa));
  auto backend =
      std::make_unique<CpuBackend>(isa, options.compute, options.threads == 0 ? UsableCores() : options.threads);
  KVS_RETURN_IF_ERROR(backend->Start());
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace kvshare::kernels
