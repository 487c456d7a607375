// Linear layers on oneDNN: the only room that sees it.
//
// out = x W^T is cut twice, and neither cut changes a bit of the result:
//   - rows into blocks of at most kRowBlock: what one thread multiplies at a time;
//   - columns into panels, fixed when the weights are packed: small batches still give work to every thread.
// A block times a panel goes to a dense scratch that stays in the L2 cache (oneDNN is slow with a strided destination);
// an epilogue then adds the bias, accumulates, applies SwiGLU or converts on the way to the output.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/thread_pool.h"

namespace kvshare::kernels {

class LinearEngine {
 public:
  virtual ~LinearEngine() = default;
  virtual Result<std::unique_ptr<LinearWeights>> Pack(const LinearSpec& spec) = 0;
  virtual void Run(const LinearParams& p) = 0;
  virtual void RunGated(const GatedLinearParams& p) = 0;
  // Internal when a row's result depends on its companions, for any shape made so far. Pack() has checked them too, and
  // made those that failed multiply one number of rows only; this looks again.
  virtual Status SelfTest() = 0;
  virtual std::string description() const = 0;  // library, version, instruction set, weights' type, shapes that failed
};

struct LinearOptions {
  CpuIsa isa = CpuIsa::kPlain;   // one this machine has
  DType compute = DType::kBf16;  // of activations
  bool fixed_rows = false;       // for tests: every shape as if it had failed the check
};

// `pool` and `elementwise` must outlive the engine.
Result<std::unique_ptr<LinearEngine>> NewLinearEngine(const LinearOptions& options,
                                                      const ElementwiseKernel& elementwise, ThreadPool& pool);

}  // namespace kvshare::kernels
