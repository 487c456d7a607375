// Launches of our kernels on a stream (launch.cu). What a launch itself can fail with comes back at once; what the
// kernel fails with, later, from whatever asks the stream next.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/anchor_args.h"
#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/mass_args.h"
#include "kernels/cuda/mover_args.h"
#include "kernels/cuda/row_ops_args.h"

namespace kvshare::kernels::cuda {

// Once for each device: lets blocks of attention have the shared memory they need.
cudaError_t PrepareKernels();

// head_dim: 64 or 128.
cudaError_t LaunchAttention(const AttentionArgs& args, int head_dim, int items, bool spread, cudaStream_t stream);
cudaError_t LaunchMerge(const AttentionArgs& args, int head_dim, std::int64_t packed_rows, cudaStream_t stream);
cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream);
cudaError_t LaunchRmsNorm(const RmsNormArgs& args, cudaStream_t stream);
cudaError_t LaunchStoreKv(const StoreKvArgs& args, cudaStream_t stream);
cudaError_t LaunchSwiGlu(const SwiGluArgs& args, cudaStream_t stream);
cudaError_t LaunchAddBias(const AddBiasArgs& args, cudaStream_t stream);
cudaError_t LaunchCopyPageRows(const CopyPageRowsArgs& args, cudaStream_t stream);
cudaError_t LaunchCopyRows(const CopyRowsArgs& args, cudaStream_t stream);
cudaError_t LaunchCopyPages(const CopyPagesArgs& args, cudaStream_t stream);
cudaError_t LaunchCodePages(const CodePagesArgs& args, cudaStream_t stream);
cudaError_t LaunchDeviation(const DeviationArgs& args, cudaStream_t stream);
cudaError_t LaunchScore(const ScoreArgs& args, cudaStream_t stream);
cudaError_t LaunchChoose(const ChooseArgs& args, cudaStream_t stream);
cudaError_t LaunchMass(const MassArgs& args, int head_dim, cudaStream_t stream);
cudaError_t LaunchAnchorDistances(const AnchorArgs& args, cudaStream_t stream);
cudaError_t LaunchApplyAnchors(const AnchorArgs& args, cudaStream_t stream);

}  // namespace kvshare::kernels::cuda
