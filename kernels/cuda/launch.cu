// Every kernel, for every architecture of the build: bodies are in the *_block.h files, over CudaLane.
#include "kernels/cuda/launch.h"

#include <utility>

#include "kernels/cuda/anchor_block.h"
#include "kernels/cuda/attention_block.h"
#include "kernels/cuda/lane_cuda.cuh"
#include "kernels/cuda/mass_block.h"
#include "kernels/cuda/merge_block.h"
#include "kernels/cuda/movers_block.h"
#include "kernels/cuda/row_ops_block.h"

namespace kvshare::kernels::cuda {
namespace {

extern __shared__ __align__(128) std::byte g_shared[];

template <int kHeadDim, DType kHalf>
__global__ void __launch_bounds__(kAttentionThreads, 2) AttentionKernel(const __grid_constant__ AttentionArgs args) {
  CudaLane lane(g_shared);
  AttentionBlock<CudaLane, kHeadDim, kHalf>(args, lane).Run();
}

template <int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads)
    MergeKernel(const __grid_constant__ AttentionArgs args, std::int64_t packed_rows) {
  CudaLane lane(g_shared);
  MergeBlock<CudaLane, kHeadDim>(args, packed_rows, lane);
}

template <int kHeadDim, DType kHalf, bool kShares>
__global__ void __launch_bounds__(kAttentionThreads, 4) MassKernel(const __grid_constant__ MassArgs args) {
  CudaLane lane(g_shared);
  MassBlock<CudaLane, kHeadDim, kHalf, kShares>(args, lane).Run();
}
__global__ void __launch_bounds__(kMergeThreads) MassTotalsKernel(const __grid_constant__ MassArgs args) {
  CudaLane lane(g_shared);
  MassTotalsBlock(args, lane);
}
__global__ void __launch_bounds__(kMergeThreads) MassSumKernel(const __grid_constant__ MassArgs args) {
  CudaLane lane(g_shared);
  MassSumBlock(args, lane);
}

__global__ void __launch_bounds__(kRowThreads) EmbedKernel(const __grid_constant__ EmbedArgs args) {
  CudaLane lane(g_shared);
  EmbedBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) RmsNormKernel(const __grid_constant__ RmsNormArgs args) {
  CudaLane lane(g_shared);
  RmsNormBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) StoreKvKernel(const __grid_constant__ StoreKvArgs args) {
  CudaLane lane(g_shared);
  StoreKvBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) SwiGluKernel(const __grid_constant__ SwiGluArgs args) {
  CudaLane lane(g_shared);
  SwiGluBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) AddBiasKernel(const __grid_constant__ AddBiasArgs args) {
  CudaLane lane(g_shared);
  AddBiasBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) CopyPageRowsKernel(const __grid_constant__ CopyPageRowsArgs args) {
  CudaLane lane(g_shared);
  CopyPageRowsBlock(args, lane);
}

__global__ void __launch_bounds__(kRowThreads) CopyRowsKernel(const __grid_constant__ CopyRowsArgs args) {
  CudaLane lane(g_shared);
  CopyRowsBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) CopyPagesKernel(const __grid_constant__ CopyPagesArgs args) {
  CudaLane lane(g_shared);
  CopyPagesBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) CodePagesKernel(const __grid_constant__ CodePagesArgs args) {
  CudaLane lane(g_shared);
  CodePagesBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) DeviationKernel(const __grid_constant__ DeviationArgs args) {
  CudaLane lane(g_shared);
  DeviationBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) ScoreKernel(const __grid_constant__ ScoreArgs args) {
  CudaLane lane(g_shared);
  ScoreBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) RankKernel(const __grid_constant__ ChooseArgs args) {
  CudaLane lane(g_shared);
  RankBlock(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) PlaceKernel(const __grid_constant__ ChooseArgs args) {
  CudaLane lane(g_shared);
  PlaceBlock(args, lane);
}
template <DType kHalf>
__global__ void __launch_bounds__(kRowThreads) AnchorDifferenceKernel(const __grid_constant__ AnchorArgs args) {
  CudaLane lane(g_shared);
  AnchorDifferenceBlock<CudaLane, kHalf>(args, lane);
}
__global__ void __launch_bounds__(kRowThreads) AnchorDistanceKernel(const __grid_constant__ AnchorArgs args) {
  CudaLane lane(g_shared);
  AnchorDistanceBlock(args, lane);
}
template <DType kHalf>
__global__ void __launch_bounds__(kRowThreads) ApplyAnchorsKernel(const __grid_constant__ AnchorArgs args) {
  CudaLane lane(g_shared);
  ApplyAnchorsBlock<CudaLane, kHalf>(args, lane);
}

template <int kHeadDim, DType kHalf>
cudaError_t Attention(const AttentionArgs& args, int items, bool spread, cudaStream_t stream) {
  using Shared = AttentionShared<kHeadDim>;
  const dim3 grid(static_cast<unsigned>(items), static_cast<unsigned>(args.pages.kv_heads));
  const std::size_t bytes = spread ? Shared::kSpreadBytes : Shared::kWalkBytes;
  AttentionKernel<kHeadDim, kHalf><<<grid, kAttentionThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t Merge(const AttentionArgs& args, std::int64_t packed_rows, cudaStream_t stream) {
  constexpr int kRows = kMergeThreads / 32;
  const dim3 grid(static_cast<unsigned>((packed_rows + kRows - 1) / kRows), static_cast<unsigned>(args.pages.kv_heads));
  MergeKernel<kHeadDim><<<grid, kMergeThreads, 0, stream>>>(args, packed_rows);
  return cudaGetLastError();
}

template <int kHeadDim, DType kHalf>
cudaError_t Mass(const MassArgs& args, cudaStream_t stream) {
  constexpr std::size_t kShared = MassShared<kHeadDim>::kBytes;
  static_assert(kShared <= 48 << 10, "more has to be asked for");
  const auto heads = static_cast<unsigned>(args.attention.pages.kv_heads);
  const dim3 all(static_cast<unsigned>(args.items), heads), asked(static_cast<unsigned>(args.asked_items), heads);
  const dim3 rows(static_cast<unsigned>((args.packed_rows + kMergeThreads - 1) / kMergeThreads), heads);
  MassKernel<kHeadDim, kHalf, false><<<all, kAttentionThreads, kShared, stream>>>(args);
  MassTotalsKernel<<<rows, kMergeThreads, 0, stream>>>(args);
  MassKernel<kHeadDim, kHalf, true><<<asked, kAttentionThreads, kShared, stream>>>(args);
  MassSumKernel<<<static_cast<unsigned>(args.num_columns), kMergeThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t PrepareKernels() {
  for (const auto& [kernel, bytes] :
       {std::pair{&AttentionKernel<64, DType::kBf16>, AttentionShared<64>::kWalkBytes},
        std::pair{&AttentionKernel<64, DType::kF16>, AttentionShared<64>::kWalkBytes},
        std::pair{&AttentionKernel<128, DType::kBf16>, AttentionShared<128>::kWalkBytes},
        std::pair{&AttentionKernel<128, DType::kF16>, AttentionShared<128>::kWalkBytes}}) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LaunchAttention(const AttentionArgs& args, int head_dim, int items, bool spread, cudaStream_t stream) {
  return ForHeads(head_dim, args.pages.dtype,
                  [&]<int kHeadDim, DType kHalf>() { return Attention<kHeadDim, kHalf>(args, items, spread, stream); });
}

cudaError_t LaunchMerge(const AttentionArgs& args, int head_dim, std::int64_t packed_rows, cudaStream_t stream) {
  return head_dim == 64 ? Merge<64>(args, packed_rows, stream) : Merge<128>(args, packed_rows, stream);
}

cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream) {
  EmbedKernel<<<static_cast<unsigned>(args.rows), kRowThreads, kRowShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchRmsNorm(const RmsNormArgs& args, cudaStream_t stream) {
  RmsNormKernel<<<static_cast<unsigned>(args.rows), kRowThreads, kRowShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchStoreKv(const StoreKvArgs& args, cudaStream_t stream) {
  StoreKvKernel<<<static_cast<unsigned>(args.rows), kRowThreads, kRowShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchSwiGlu(const SwiGluArgs& args, cudaStream_t stream) {
  SwiGluKernel<<<static_cast<unsigned>(args.rows), kRowThreads, kRowShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchAddBias(const AddBiasArgs& args, cudaStream_t stream) {
  AddBiasKernel<<<static_cast<unsigned>(args.rows), kRowThreads, kRowShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchCopyPageRows(const CopyPageRowsArgs& args, cudaStream_t stream) {
  CopyPageRowsKernel<<<static_cast<unsigned>(args.slabs), kRowThreads, kRowShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchCopyRows(const CopyRowsArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.rows), static_cast<unsigned>(args.layers));
  CopyRowsKernel<<<grid, kRowThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchCopyPages(const CopyPagesArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.count),
                  static_cast<unsigned>((args.page_bytes + kPieceBytes - 1) / kPieceBytes));
  CopyPagesKernel<<<grid, kRowThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchCodePages(const CodePagesArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.count), static_cast<unsigned>(args.slabs));
  CodePagesKernel<<<grid, kRowThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchDeviation(const DeviationArgs& args, cudaStream_t stream) {
  DeviationKernel<<<static_cast<unsigned>(args.rows), kRowThreads, kDeviationShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchMass(const MassArgs& args, int head_dim, cudaStream_t stream) {
  return ForHeads(head_dim, args.attention.pages.dtype,
                  [&]<int kHeadDim, DType kHalf>() { return Mass<kHeadDim, kHalf>(args, stream); });
}
cudaError_t LaunchScore(const ScoreArgs& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((args.n + kRowThreads - 1) / kRowThreads);
  ScoreKernel<<<blocks, kRowThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchChoose(const ChooseArgs& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((args.n + kRowThreads - 1) / kRowThreads);
  RankKernel<<<blocks, kRowThreads, 0, stream>>>(args);
  PlaceKernel<<<blocks, kRowThreads, 0, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchAnchorDistances(const AnchorArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(2 * args.tokens),
                  static_cast<unsigned>((args.count + kAnchorsAtATime - 1) / kAnchorsAtATime));
  const auto difference =
      args.dtype == DType::kF16 ? AnchorDifferenceKernel<DType::kF16> : AnchorDifferenceKernel<DType::kBf16>;
  difference<<<grid, kRowThreads, kAnchorDifferenceShared, stream>>>(args);
  AnchorDistanceKernel<<<static_cast<unsigned>(args.count), kRowThreads, kRowShared, stream>>>(args);
  return cudaGetLastError();
}
cudaError_t LaunchApplyAnchors(const AnchorArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.tokens),
                  static_cast<unsigned>((args.layers + kLayersAtATime - 1) / kLayersAtATime));
  const auto apply = args.dtype == DType::kF16 ? ApplyAnchorsKernel<DType::kF16> : ApplyAnchorsKernel<DType::kBf16>;
  apply<<<grid, kRowThreads, kAnchorWeightsShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace kvshare::kernels::cuda
