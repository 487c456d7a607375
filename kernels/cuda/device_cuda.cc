#include "kernels/cuda/device_cuda.h"

#include <cuda_runtime_api.h>

#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/gemm_cublaslt.h"
#include "kernels/cuda/launch.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {
namespace {

constexpr int kOldest = 80;  // mma.m16n8k16 of bf16, cp.async, max.NaN

std::string ArchName(int major, int minor) { return "sm_" + std::to_string(major) + std::to_string(minor); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int device) : device_(device) {}
  ~CudaDevice() override {
    cudaSetDevice(device_);
    gemm_.reset();
    for (cudaEvent_t& mark : marks_) {
      if (mark != nullptr) cudaEventDestroy(mark);
    }
    for (cudaEvent_t mark : aside_marks_) cudaEventDestroy(mark);
    if (fence_ != nullptr) cudaEventDestroy(fence_);
    if (aside_ != nullptr) cudaStreamDestroy(aside_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  Status Start(DeviceFacts facts) {
    KVS_RETURN_IF_ERROR(ToStatus(cudaSetDevice(device_), "cudaSetDevice"));
    KVS_RETURN_IF_ERROR(
        ToStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
    for (cudaEvent_t& mark : marks_) {
      KVS_RETURN_IF_ERROR(
          ToStatus(cudaEventCreateWithFlags(&mark, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
    }
    KVS_RETURN_IF_ERROR(
        ToStatus(cudaStreamCreateWithFlags(&aside_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
    KVS_RETURN_IF_ERROR(
        ToStatus(cudaEventCreateWithFlags(&fence_, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
    KVS_RETURN_IF_ERROR(ToStatus(PrepareKernels(), "shared memory of the attention kernels"));
    KVS_ASSIGN_OR_RETURN(gemm_, cuda::Gemm::Create(stream_));
    facts_ = std::move(facts);
    facts_.linear = cuda::Gemm::Version();
    return OkStatus();
  }

  const DeviceFacts& facts() const override { return facts_; }

  Result<std::byte*> Allocate(std::size_t bytes) override {
    void* data = nullptr;
    KVS_RETURN_IF_ERROR(Use());
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation) cudaGetLastError();  // not sticky: the device goes on
    KVS_RETURN_IF_ERROR(ToStatus(error, "cudaMalloc"));
    return static_cast<std::byte*>(data);
  }
  void Free(std::byte* data) override {
    cudaSetDevice(device_);
    cudaFree(data);  // waits for the stream; what failed before shows in Synchronize
  }
  Result<std::byte*> AllocatePinned(std::size_t bytes) override {
    void* data = nullptr;
    KVS_RETURN_IF_ERROR(Use());
    const cudaError_t error = cudaMallocHost(&data, bytes);
    if (error == cudaErrorMemoryAllocation) cudaGetLastError();  // as above: agentd does without
    KVS_RETURN_IF_ERROR(ToStatus(error, "cudaMallocHost"));
    return static_cast<std::byte*>(data);
  }
  void FreePinned(std::byte* data) override {
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaStreamSynchronize(aside_);
    cudaFreeHost(data);
  }

  Status Fill(std::byte* to, int value, std::size_t bytes) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaMemsetAsync(to, value, bytes, stream_), "cudaMemsetAsync");
  }
  Status CopyIn(std::byte* to, const void* from, std::size_t bytes) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync to the GPU");
  }
  Status CopyOut(void* to, const std::byte* from, std::size_t bytes) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync from the GPU");
  }
  Status Mark(int mark) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaEventRecord(marks_[mark], stream_), "cudaEventRecord");
  }
  Status Wait(int mark) override { return ToStatus(cudaEventSynchronize(marks_[mark]), "cudaEventSynchronize"); }
  Status Synchronize() override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  Status AsideFollows() override {
    KVS_RETURN_IF_ERROR(Use());
    KVS_RETURN_IF_ERROR(ToStatus(cudaEventRecord(fence_, stream_), "cudaEventRecord"));
    return ToStatus(cudaStreamWaitEvent(aside_, fence_, 0), "cudaStreamWaitEvent");
  }
  Status CopyInAside(std::byte* to, const std::byte* pinned, std::size_t bytes) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaMemcpyAsync(to, pinned, bytes, cudaMemcpyHostToDevice, aside_), "cudaMemcpyAsync to the GPU");
  }
  Status CopyOutAside(std::byte* pinned, const std::byte* from, std::size_t bytes) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaMemcpyAsync(pinned, from, bytes, cudaMemcpyDeviceToHost, aside_),
                    "cudaMemcpyAsync from the GPU");
  }
  Status MarkAside(int mark) override {
    KVS_RETURN_IF_ERROR(Use());
    while (static_cast<int>(aside_marks_.size()) <= mark) {
      cudaEvent_t event = nullptr;
      KVS_RETURN_IF_ERROR(
          ToStatus(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
      aside_marks_.push_back(event);
    }
    return ToStatus(cudaEventRecord(Aside(mark), aside_), "cudaEventRecord");
  }
  Status FollowAside(int mark) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(cudaStreamWaitEvent(stream_, Aside(mark), 0), "cudaStreamWaitEvent");
  }
  Result<bool> PassedAside(int mark) override {
    KVS_RETURN_IF_ERROR(Use());
    const cudaError_t error = cudaEventQuery(Aside(mark));
    if (error == cudaErrorNotReady) {
      cudaGetLastError();  // else the next launch would find it and take it for its own
      return false;
    }
    KVS_RETURN_IF_ERROR(ToStatus(error, "cudaEventQuery"));
    return true;
  }
  Status WaitAside(int mark) override { return ToStatus(cudaEventSynchronize(Aside(mark)), "cudaEventSynchronize"); }

  Status Attention(const AttentionArgs& args, int head_dim, int items, bool spread) override {
    KVS_CHECK(head_dim == 64 || head_dim == 128);
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchAttention(args, head_dim, items, spread, stream_), "attention");
  }
  Status Merge(const AttentionArgs& args, int head_dim, std::int64_t packed_rows) override {
    KVS_CHECK(head_dim == 64 || head_dim == 128);
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchMerge(args, head_dim, packed_rows, stream_), "merge");
  }
  Status Embed(const EmbedArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchEmbed(args, stream_), "embed");
  }
  Status RmsNorm(const RmsNormArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchRmsNorm(args, stream_), "rms_norm");
  }
  Status StoreKv(const StoreKvArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchStoreKv(args, stream_), "store_kv");
  }
  Status SwiGlu(const SwiGluArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchSwiGlu(args, stream_), "swiglu");
  }
  Status AddBias(const AddBiasArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchAddBias(args, stream_), "bias");
  }
  Status CopyPageRows(const CopyPageRowsArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchCopyPageRows(args, stream_), "copy_page_rows");
  }
  Status CopyRows(const CopyRowsArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchCopyRows(args, stream_), "copy_rows");
  }
  Status CopyPages(const CopyPagesArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchCopyPages(args, stream_), "copy_pages");
  }
  Status CodePages(const CodePagesArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchCodePages(args, stream_), "code_pages");
  }
  Status Deviation(const DeviationArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchDeviation(args, stream_), "deviation");
  }
  Status Mass(const MassArgs& args, int head_dim) override {
    KVS_CHECK(head_dim == 64 || head_dim == 128);
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchMass(args, head_dim, stream_), "attention_mass");
  }
  Status Score(const ScoreArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchScore(args, stream_), "score");
  }
  Status Choose(const ChooseArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchChoose(args, stream_), "choose");
  }
  Status AnchorDistances(const AnchorArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchAnchorDistances(args, stream_), "anchor_distances");
  }
  Status ApplyAnchors(const AnchorArgs& args) override {
    KVS_RETURN_IF_ERROR(Use());
    return ToStatus(LaunchApplyAnchors(args, stream_), "apply_anchors");
  }

  Result<int> GemmCandidates(const GemmShape& shape) override {
    KVS_RETURN_IF_ERROR(Use());
    return gemm_->Candidates(shape);
  }
  std::uint64_t GemmIdentity(const GemmShape& shape, int algorithm) override {
    return gemm_->Identity(shape, algorithm);
  }
  Status Gemm(const GemmArgs& args, int algorithm) override {
    KVS_RETURN_IF_ERROR(Use());
    return gemm_->Run(args, algorithm);
  }

 private:
  // The current device is the thread's, and calls may come from one thread after another.
  Status Use() const { return ToStatus(cudaSetDevice(device_), "cudaSetDevice"); }

  cudaEvent_t Aside(int mark) const { return aside_marks_[static_cast<std::size_t>(mark)]; }

  const int device_;
  DeviceFacts facts_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t marks_[kMarks] = {};
  cudaStream_t aside_ = nullptr;
  cudaEvent_t fence_ = nullptr;
  std::vector<cudaEvent_t> aside_marks_;
  std::unique_ptr<cuda::Gemm> gemm_;
};

}  // namespace

Status ProbeDevice(int device, CudaDeviceInfo* info) {
  int count = 0;  // left as it is where there is no driver
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    int driver = 0;
    const bool none =
        error == cudaErrorInsufficientDriver && (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0);
    const Status status = ToStatus(error, "cudaGetDeviceCount");
    if (none) {
      return Unavailable("no NVIDIA driver on this machine: install one where there is a GPU, or use the CPU (" +
                         status.message() + ")");
    }
    if (error == cudaErrorInsufficientDriver) {
      return Unavailable("the NVIDIA driver is for CUDA " + std::to_string(driver / 1000) + "." +
                         std::to_string(driver % 1000 / 10) + " and older, this build for CUDA " +
                         std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
                         ": install a newer driver (" + status.message() + ")");
    }
    return Unavailable("no GPU can be used: " + status.message());
  }
  if (count == 0) return Unavailable("no NVIDIA GPU in this machine, or none that CUDA_VISIBLE_DEVICES shows");
  info->devices = count;
  if (device < 0 || device >= count) {
    return InvalidArgument("there is no GPU " + std::to_string(device) + ": this machine has " + std::to_string(count));
  }
  cudaDeviceProp properties{};
  KVS_RETURN_IF_ERROR(ToStatus(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties"));
  info->name = properties.name;
  info->arch = ArchName(properties.major, properties.minor);
  info->memory_bytes = properties.totalGlobalMem;
  if (properties.major * 10 + properties.minor < kOldest) {
    return FailedPrecondition("GPU " + std::to_string(device) + " (" + info->name + ") is " + info->arch +
                              ", older than sm_80: use the CPU");
  }
  return OkStatus();
}

Result<std::unique_ptr<Device>> NewCudaDevice(int device, std::size_t* free_bytes) {
  CudaDeviceInfo info;
  KVS_RETURN_IF_ERROR(ProbeDevice(device, &info));
  KVS_RETURN_IF_ERROR(ToStatus(cudaSetDevice(device), "cudaSetDevice"));
  std::size_t total = 0;
  KVS_RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(free_bytes, &total), "cudaMemGetInfo"));
  int multiprocessors = 0;
  KVS_RETURN_IF_ERROR(ToStatus(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                               "cudaDeviceGetAttribute"));
  auto made = std::make_unique<CudaDevice>(device);
  KVS_RETURN_IF_ERROR(made->Start({.name = info.name,
                                   .arch = info.arch,
                                   .linear = "",
                                   .memory_bytes = info.memory_bytes,
                                   .multiprocessors = multiprocessors}));
  return std::unique_ptr<Device>(std::move(made));
}

}  // namespace kvshare::kernels::cuda
