#include "kernels/cuda/gemm_cublaslt.h"

#include <cstdint>
#include <string>

#include "kernels/cuda/cuda_status.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels::cuda {

namespace {

// cuBLAS's advice for Hopper; earlier ones ask for 4 MiB.
constexpr std::size_t kWorkspaceBytes = 32 << 20;
// Rows at which an algorithm is chosen that then multiplies any number of them: a prefill chunk.
constexpr std::int64_t kCanonicalRows = 2048;
// Row offsets into activations are multiples of 8 elements; more alignment must not be assumed.
constexpr std::uint32_t kAlignment = 16;
constexpr std::size_t kMostFastest = 4096;

class Layout {
 public:
  Layout() = default;
  ~Layout() {
    if (layout_ != nullptr) cublasLtMatrixLayoutDestroy(layout_);
  }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  Status Create(cudaDataType_t type, std::int64_t rows, std::int64_t cols, std::int64_t leading) {
    return ToStatus(cublasLtMatrixLayoutCreate(&layout_, type, static_cast<std::uint64_t>(rows),
                                               static_cast<std::uint64_t>(cols), leading),
                    "cublasLtMatrixLayoutCreate");
  }
  cublasLtMatrixLayout_t get() const { return layout_; }

 private:
  cublasLtMatrixLayout_t layout_ = nullptr;
};

}  // namespace

// cuBLAS counts columns first, so our row-major out [rows, n] is its [n, rows] = w^T x with w [k, n] and x [k, rows].
struct GemmLayouts {
  Layout w, x, out;

  Status Create(const GemmArgs& a) {
    const auto [n, k, dtype] = a.shape;
    const cudaDataType_t half = dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
    KVS_RETURN_IF_ERROR(w.Create(half, k, n, k));
    KVS_RETURN_IF_ERROR(x.Create(half, k, a.rows, a.x_stride));
    return out.Create(CUDA_R_32F, n, a.rows, a.out_stride);
  }
};

namespace {

struct PreferenceCloser {
  void operator()(cublasLtMatmulPreferenceOpaque_t* p) const { cublasLtMatmulPreferenceDestroy(p); }
};
using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, PreferenceCloser>;

template <typename T>
Status Set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  return ToStatus(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
                  "cublasLtMatmulPreferenceSetAttribute");
}

Result<Preference> MakePreference(std::uint64_t workspace_bytes) {
  cublasLtMatmulPreference_t raw = nullptr;
  KVS_RETURN_IF_ERROR(ToStatus(cublasLtMatmulPreferenceCreate(&raw), "cublasLtMatmulPreferenceCreate"));
  Preference preference(raw);
  KVS_RETURN_IF_ERROR(Set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    KVS_RETURN_IF_ERROR(Set(preference, attribute, kAlignment));
  }
  return preference;
}

// Whether all of K is summed in one place: no split, nothing to reduce afterwards.
bool SumsInOnePlace(const cublasLtMatmulAlgo_t& algorithm) {
  std::int32_t splits = 0;
  std::uint32_t reduction = ~0u;
  std::size_t written = 0;
  if (cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, sizeof splits,
                                           &written) != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction,
                                           sizeof reduction, &written) != CUBLAS_STATUS_SUCCESS) {
    return false;
  }
  return splits <= 1 && reduction == CUBLASLT_REDUCTION_SCHEME_NONE;
}

}  // namespace

Result<std::unique_ptr<Gemm>> Gemm::Create(cudaStream_t stream) {
  std::unique_ptr<Gemm> gemm(new Gemm(stream));
  KVS_RETURN_IF_ERROR(ToStatus(cublasLtCreate(&gemm->handle_), "cublasLtCreate"));
  KVS_RETURN_IF_ERROR(ToStatus(cublasLtMatmulDescCreate(&gemm->operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                               "cublasLtMatmulDescCreate"));
  const cublasOperation_t transpose = CUBLAS_OP_T;
  KVS_RETURN_IF_ERROR(ToStatus(
      cublasLtMatmulDescSetAttribute(gemm->operation_, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose),
      "cublasLtMatmulDescSetAttribute"));
  KVS_RETURN_IF_ERROR(ToStatus(cudaMalloc(&gemm->workspace_, kWorkspaceBytes), "cudaMalloc"));
  return gemm;
}

Gemm::~Gemm() {
  if (workspace_ != nullptr) cudaFree(workspace_);
  if (operation_ != nullptr) cublasLtMatmulDescDestroy(operation_);
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

std::string Gemm::Version() { return "cublaslt-" + std::to_string(cublasLtGetVersion()); }

Result<int> Gemm::Candidates(const GemmShape& shape) {
  std::vector<cublasLtMatmulAlgo_t>& kept = pinned_[shape];
  if (!kept.empty()) return static_cast<int>(kept.size());
  GemmLayouts layouts;
  KVS_RETURN_IF_ERROR(
      layouts.Create({.x_stride = shape.k, .out_stride = shape.n, .rows = kCanonicalRows, .shape = shape}));
  KVS_ASSIGN_OR_RETURN(const Preference preference, MakePreference(0));
  const std::uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
  KVS_RETURN_IF_ERROR(Set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, no_reduction));
  cublasLtMatmulHeuristicResult_t found[4 * kMaxGemmCandidates] = {};
  int count = 0;
  KVS_RETURN_IF_ERROR(ToStatus(
      cublasLtMatmulAlgoGetHeuristic(handle_, operation_, layouts.w.get(), layouts.x.get(), layouts.out.get(),
                                     layouts.out.get(), preference.get(), 4 * kMaxGemmCandidates, found, &count),
      "cublasLtMatmulAlgoGetHeuristic"));
  for (int i = 0; i < count && kept.size() < std::size_t{kMaxGemmCandidates}; ++i) {
    if (found[i].state == CUBLAS_STATUS_SUCCESS && SumsInOnePlace(found[i].algo)) kept.push_back(found[i].algo);
  }
  return static_cast<int>(kept.size());
}

const cublasLtMatmulAlgo_t& Gemm::Pinned(const GemmShape& shape, int algorithm) const {
  const auto it = pinned_.find(shape);
  KVS_CHECK(it != pinned_.end() && algorithm >= 0 && static_cast<std::size_t>(algorithm) < it->second.size());
  return it->second[static_cast<std::size_t>(algorithm)];
}

// FNV-1a of the algorithm's own bytes: tile, stages, cluster and all else that it is made of. cuBLAS says of them that
// they may be kept and used again with the same version of it.
std::uint64_t Gemm::Identity(const GemmShape& shape, int algorithm) const {
  const cublasLtMatmulAlgo_t& algo = Pinned(shape, algorithm);
  std::uint64_t digest = 14695981039346656037u;
  for (const std::uint64_t word : algo.data) digest = (digest ^ word) * 1099511628211u;
  return digest;
}

Result<cublasLtMatmulAlgo_t> Gemm::Fastest(const GemmArgs& a, const GemmLayouts& layouts) {
  const std::pair key{a.shape, a.rows};
  if (const auto it = fastest_.find(key); it != fastest_.end()) return it->second;
  KVS_ASSIGN_OR_RETURN(const Preference preference, MakePreference(kWorkspaceBytes));
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  KVS_RETURN_IF_ERROR(
      ToStatus(cublasLtMatmulAlgoGetHeuristic(handle_, operation_, layouts.w.get(), layouts.x.get(), layouts.out.get(),
                                              layouts.out.get(), preference.get(), 1, &found, &count),
               "cublasLtMatmulAlgoGetHeuristic"));
  if (count == 0) return Unimplemented("cuBLASLt has no algorithm for this matrix product");
  if (fastest_.size() >= kMostFastest) fastest_.clear();
  fastest_[key] = found.algo;
  return found.algo;
}

Status Gemm::Run(const GemmArgs& a, int algorithm) {
  GemmLayouts layouts;
  KVS_RETURN_IF_ERROR(layouts.Create(a));
  cublasLtMatmulAlgo_t algo{};
  if (algorithm == kFastGemm) {
    KVS_ASSIGN_OR_RETURN(algo, Fastest(a, layouts));
  } else {
    algo = Pinned(a.shape, algorithm);
  }
  const float one = 1.0f, zero = 0.0f;
  return ToStatus(cublasLtMatmul(handle_, operation_, &one, a.w, layouts.w.get(), a.x, layouts.x.get(),
                                 a.accumulate ? &one : &zero, a.out, layouts.out.get(), a.out, layouts.out.get(), &algo,
                                 algorithm == kFastGemm ? workspace_ : nullptr,
                                 algorithm == kFastGemm ? kWorkspaceBytes : 0, stream_),
                  "cublasLtMatmul");
}

}  // namespace kvshare::kernels::cuda
