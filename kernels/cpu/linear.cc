#include "kernels/cpu/linear.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <new>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::kernels {

namespace {

// 64 rows of activations (74 KB at hidden 576), a panel's scratch (128 KB) and its weights (590 KB) share 1 MB of L2.
constexpr std::int64_t kRowBlock = 64;
// Row counts for which primitives exist: a tail is padded up to the next one.
constexpr int kRowSizes = 7;  // 1, 2, 4, ..., 64
// Columns of a panel. Wide layers (the language-model head) see few rows and many panels: fewer, wider ones there.
constexpr std::int64_t kPanelCols = 512;
constexpr std::int64_t kWidePanelCols = 2048;
constexpr std::int64_t kWideLayer = 8192;
constexpr std::int64_t kColMultiple = 16;

struct FreeAligned {
  void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
};
using AlignedBytes = std::unique_ptr<std::byte, FreeAligned>;

AlignedBytes AllocateAligned(std::size_t bytes) {
  auto* p = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64}, std::nothrow));
  return AlignedBytes(p);
}

// Packed weights, laid out one after another on huge pages: they are read whole for every token, and with 4 KiB pages
// two cores reading at once lose a third of the memory's bandwidth to address translation
// (bench/kernels/linear_bench.cc).
class WeightArena {
 public:
  ~WeightArena() {
    for (const Chunk& chunk : chunks_) munmap(chunk.data, chunk.size);
  }

  // 64-byte aligned; nullptr when the machine has no more memory. Given back with the arena.
  std::byte* Allocate(std::size_t bytes) {
    bytes = (bytes + 63) & ~std::size_t{63};
    if (chunks_.empty() || chunks_.back().size - chunks_.back().used < bytes) {
      const std::size_t size = (std::max(bytes, kChunkBytes) + kHugePage - 1) & ~(kHugePage - 1);
      void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data == MAP_FAILED) return nullptr;
      madvise(data, size, MADV_HUGEPAGE);
      chunks_.push_back({static_cast<std::byte*>(data), size, 0});
    }
    Chunk& chunk = chunks_.back();
    chunk.used += bytes;
    return chunk.data + chunk.used - bytes;
  }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  static constexpr std::size_t kChunkBytes = std::size_t{32} << 20;
  struct Chunk {
    std::byte* data;
    std::size_t size;
    std::size_t used;
  };
  std::vector<Chunk> chunks_;
};

dnnl::memory::desc RowMajor(std::int64_t rows, std::int64_t cols, dnnl::memory::data_type type) {
  return {{rows, cols}, type, dnnl::memory::format_tag::ab};
}

// oneDNN 3 dropped the operation descriptors of oneDNN 2; this is the one place that knows.
dnnl::matmul::primitive_desc MatmulDesc(const dnnl::engine& engine, const dnnl::memory::desc& src,
                                        const dnnl::memory::desc& weights, const dnnl::memory::desc& dst) {
  dnnl::primitive_attr attr;
  // The library's own scratchpad is not safe when two threads run one primitive.
  attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3
  return {engine, src, weights, dst, attr};
#else
  return {dnnl::matmul::desc(src, weights, dst), attr, engine};
#endif
}

// The multiplication of r rows by a [K, cols] panel, for one r.
struct Primitive {
  dnnl::matmul matmul;
  dnnl::memory::desc src, dst, scratchpad;
};

// One (K, cols): its packed layout and its primitives, shared by all layers of that shape.
struct PanelShape {
  std::size_t index = 0;  // among the engine's shapes
  std::int64_t k = 0;
  std::int64_t cols = 0;
  dnnl::memory::desc packed;
  std::array<Primitive, kRowSizes> primitives;  // [i] multiplies 2^i rows
};

struct Panel {
  const PanelShape* shape = nullptr;
  dnnl::memory data;           // in the engine's arena
  std::int64_t first_col = 0;  // in the output; for gated layers, of the combined output
};

class PackedWeights : public LinearWeights {
 public:
  std::int64_t in_features() const override { return k; }
  std::int64_t out_features() const override { return n; }
  std::size_t bytes() const override { return total_bytes; }

  std::int64_t k = 0;
  std::int64_t n = 0;
  bool gated = false;
  std::vector<Panel> panels;
  std::vector<float> bias;  // in panel order; empty = none
  std::size_t total_bytes = 0;
};

int RowSizeIndex(std::int64_t rows) { return static_cast<int>(std::bit_width(static_cast<std::uint64_t>(rows - 1))); }

// oneDNN's handles for one thread, one shape and one number of rows. Made once: making them costs more than the
// smallest multiplications, and so do the maps of oneDNN's C++ interface, which is why the C one executes.
struct Handles {
  dnnl::memory src, dst, scratchpad;
};

struct ThreadState {
  dnnl::stream stream;
  std::vector<std::array<Handles, kRowSizes>> handles;  // by shape
  AlignedBytes rows;                                    // a padded or converted block of activations
  std::size_t rows_bytes = 0;
  AlignedBytes result;  // a block times a panel
  std::size_t result_bytes = 0;
  AlignedBytes scratchpad;
  std::size_t scratchpad_bytes = 0;
};

// Debian's oneDNN is built with OpenMP; each of our threads is to stay one thread.
void KeepOpenMpSingle() {
  thread_local const bool once = [] {
    omp_set_num_threads(1);
    return true;
  }();
  static_cast<void>(once);
}

class OneDnnEngine : public LinearEngine {
 public:
  OneDnnEngine(CpuIsa isa, DType compute, const ElementwiseKernel& elementwise, ThreadPool& pool)
      : engine_(dnnl::engine::kind::cpu, 0),
        compute_(compute),
        weights_dtype_(compute == DType::kBf16 && isa == CpuIsa::kAvx512Bf16 ? DType::kBf16 : DType::kF32),
        elementwise_(elementwise),
        pool_(pool) {
    threads_.resize(static_cast<std::size_t>(pool.size()));
    for (ThreadState& state : threads_) state.stream = dnnl::stream(engine_);
  }

  Result<std::unique_ptr<LinearWeights>> Pack(const LinearSpec& spec) override;
  void Run(const LinearParams& p) override;
  void RunGated(const GatedLinearParams& p) override;
  Status SelfTest() override;

  std::string description() const override {
    const dnnl_version_t* v = dnnl_version();
    return "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch) +
           " isa" + std::to_string(static_cast<int>(dnnl::get_effective_cpu_isa())) +
           (weights_dtype_ == DType::kBf16 ? " bf16" : " f32") + (fixed_rows_ ? " fixed-rows" : "");
  }

 private:
  dnnl::memory::data_type dnnl_dtype() const {
    return weights_dtype_ == DType::kBf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
  }
  Result<const PanelShape*> ShapeFor(std::int64_t k, std::int64_t cols);
  void PackPanel(const LinearSpec& spec, const PackedWeights& weights, const Panel& panel, std::vector<float>& plain);
  // Multiplies rows [first, first + rows) of x by a panel into the thread's scratch; returns it, [rows, panel cols].
  const float* Multiply(const MatrixView& x, std::int64_t first, std::int64_t rows, const Panel& panel, int worker);
  template <typename Epilogue>
  void ForEachBlock(const MatrixView& x, const PackedWeights& weights, Epilogue&& epilogue);
  Status CheckRowInvariance();

  dnnl::engine engine_;
  const DType compute_;
  const DType weights_dtype_;
  const ElementwiseKernel& elementwise_;
  ThreadPool& pool_;
  bool fixed_rows_ = false;  // the self-test failed: every multiplication has kRowBlock rows
  WeightArena arena_;
  std::deque<PanelShape> shapes_;
  std::vector<ThreadState> threads_;
};

void Grow(AlignedBytes& buffer, std::size_t& size, std::size_t wanted) {
  if (wanted <= size) return;
  buffer = AllocateAligned(wanted);
  KVS_CHECK(buffer != nullptr);
  std::memset(buffer.get(), 0, wanted);  // padding rows are multiplied too: let them be numbers
  size = wanted;
}

Result<const PanelShape*> OneDnnEngine::ShapeFor(std::int64_t k, std::int64_t cols) {
  for (const PanelShape& shape : shapes_) {
    if (shape.k == k && shape.cols == cols) return &shape;
  }
  PanelShape shape{.index = shapes_.size(), .k = k, .cols = cols, .packed = {}, .primitives = {}};
  try {
    const dnnl::memory::desc any({k, cols}, dnnl_dtype(), dnnl::memory::format_tag::any);
    const auto f32 = dnnl::memory::data_type::f32;
    for (int i = kRowSizes - 1; i >= 0; --i) {
      const std::int64_t rows = std::int64_t{1} << i;
      const bool largest = i == kRowSizes - 1;
      auto desc =
          MatmulDesc(engine_, RowMajor(rows, k, dnnl_dtype()), largest ? any : shape.packed, RowMajor(rows, cols, f32));
      if (largest) shape.packed = desc.weights_desc();
      shape.primitives[static_cast<std::size_t>(i)] = {dnnl::matmul(desc), desc.src_desc(), desc.dst_desc(),
                                                       desc.scratchpad_desc()};
    }
  } catch (const dnnl::error& e) {
    return Internal("oneDNN cannot multiply [rows, " + std::to_string(k) + "] by [" + std::to_string(k) + ", " +
                    std::to_string(cols) + "]: " + e.what());
  }
  shapes_.push_back(std::move(shape));
  return &shapes_.back();
}

// The rows of W behind output columns [first, first + cols), over the concatenated parts.
void GatherRows(const LinearSpec& spec, std::int64_t first, std::int64_t cols, std::int64_t k, float* out) {
  std::int64_t part_first = 0;
  for (const HostMatrix& part : spec.parts) {
    const std::int64_t begin = std::max(first, part_first);
    const std::int64_t end = std::min(first + cols, part_first + part.rows);
    if (begin < end) {
      std::memcpy(out + (begin - first) * k, part.data + (begin - part_first) * k,
                  static_cast<std::size_t>((end - begin) * k) * sizeof(float));
    }
    part_first += part.rows;
  }
}

void OneDnnEngine::PackPanel(const LinearSpec& spec, const PackedWeights& weights, const Panel& panel,
                             std::vector<float>& plain) {
  KeepOpenMpSingle();
  const std::int64_t k = weights.k;
  const std::int64_t total_cols = panel.shape->cols;
  const std::int64_t cols = weights.gated ? total_cols / 2 : total_cols;
  plain.resize(static_cast<std::size_t>(total_cols * k));
  GatherRows(spec, panel.first_col, cols, k, plain.data());
  if (weights.gated) GatherRows(spec, weights.n / 2 + panel.first_col, cols, k, plain.data() + cols * k);
  // W is [cols, K] as stored: column-major seen as [K, cols].
  dnnl::memory from({{k, total_cols}, dnnl::memory::data_type::f32, dnnl::memory::format_tag::ba}, engine_,
                    plain.data());
  dnnl::memory to = panel.data;
  dnnl::stream stream(engine_);
  dnnl::reorder(from, to).execute(stream, from, to);
  stream.wait();
}

Result<std::unique_ptr<LinearWeights>> OneDnnEngine::Pack(const LinearSpec& spec) {
  auto weights = std::make_unique<PackedWeights>();
  for (const HostMatrix& part : spec.parts) {
    KVS_CHECK(weights->k == 0 || weights->k == part.cols);
    weights->k = part.cols;
    weights->n += part.rows;
  }
  KVS_CHECK(weights->k > 0 && weights->n > 0);
  KVS_CHECK(spec.bias.empty() || static_cast<std::int64_t>(spec.bias.size()) == weights->n);
  weights->gated = spec.gated;
  if (spec.gated) KVS_CHECK(spec.parts.size() == 2 && spec.parts[0].rows == spec.parts[1].rows);

  // Panels of near-equal width, so that no thread waits for a large last one.
  const std::int64_t out_cols = spec.gated ? weights->n / 2 : weights->n;
  const std::int64_t widest = (weights->n > kWideLayer ? kWidePanelCols : kPanelCols) / (spec.gated ? 2 : 1);
  const std::int64_t count = (out_cols + widest - 1) / widest;
  const std::int64_t width = ((out_cols + count - 1) / count + kColMultiple - 1) / kColMultiple * kColMultiple;
  try {
    for (std::int64_t first = 0; first < out_cols; first += width) {
      const std::int64_t cols = std::min(width, out_cols - first);
      KVS_ASSIGN_OR_RETURN(const PanelShape* shape, ShapeFor(weights->k, spec.gated ? 2 * cols : cols));
      const std::size_t bytes = shape->packed.get_size();
      std::byte* data = arena_.Allocate(bytes);
      if (data == nullptr) return ResourceExhausted("the machine has no memory left for packed weights");
      weights->panels.push_back({shape, dnnl::memory(shape->packed, engine_, data), first});
      weights->total_bytes += bytes;
      if (spec.bias.empty()) continue;
      for (std::int64_t begin : {first, weights->n / 2 + first}) {
        weights->bias.insert(weights->bias.end(), spec.bias.begin() + begin, spec.bias.begin() + begin + cols);
        if (!spec.gated) break;
      }
    }
    std::vector<std::vector<float>> plain(threads_.size());
    pool_.ParallelFor(static_cast<std::int64_t>(weights->panels.size()), [&](std::int64_t i, int worker) {
      PackPanel(spec, *weights, weights->panels[static_cast<std::size_t>(i)], plain[static_cast<std::size_t>(worker)]);
    });
  } catch (const dnnl::error& e) {
    return Internal(std::string("oneDNN cannot pack weights: ") + e.what());
  }
  return std::unique_ptr<LinearWeights>(std::move(weights));
}

const float* OneDnnEngine::Multiply(const MatrixView& x, std::int64_t first, std::int64_t rows, const Panel& panel,
                                    int worker) {
  ThreadState& state = threads_[static_cast<std::size_t>(worker)];
  KeepOpenMpSingle();
  const PanelShape& shape = *panel.shape;
  const int size_index = fixed_rows_ ? kRowSizes - 1 : RowSizeIndex(rows);
  const std::int64_t padded = std::int64_t{1} << size_index;
  const Primitive& primitive = shape.primitives[static_cast<std::size_t>(size_index)];

  void* src = x.row<std::byte>(0) + static_cast<std::size_t>(first * x.stride) * DTypeBytes(x.dtype);
  if (padded != rows || x.stride != shape.k || x.dtype != weights_dtype_) {
    const std::size_t row_bytes = static_cast<std::size_t>(shape.k) * DTypeBytes(weights_dtype_);
    Grow(state.rows, state.rows_bytes, static_cast<std::size_t>(kRowBlock) * row_bytes);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::byte* from =
          static_cast<std::byte*>(src) + static_cast<std::size_t>(r * x.stride) * DTypeBytes(x.dtype);
      std::byte* to = state.rows.get() + static_cast<std::size_t>(r) * row_bytes;
      if (x.dtype == weights_dtype_) {
        std::memcpy(to, from, row_bytes);
      } else {
        elementwise_.widen(from, x.dtype, shape.k, reinterpret_cast<float*>(to));
      }
    }
    src = state.rows.get();
  }
  Grow(state.result, state.result_bytes, static_cast<std::size_t>(kRowBlock * shape.cols) * sizeof(float));
  Grow(state.scratchpad, state.scratchpad_bytes, primitive.scratchpad.get_size());

  if (state.handles.size() <= shape.index) state.handles.resize(shape.index + 1);
  Handles& handles = state.handles[shape.index][static_cast<std::size_t>(size_index)];
  if (!handles.src) {
    handles = {dnnl::memory(primitive.src, engine_, nullptr), dnnl::memory(primitive.dst, engine_, nullptr),
               dnnl::memory(primitive.scratchpad, engine_, nullptr)};
  }
  handles.src.set_data_handle(src);
  handles.dst.set_data_handle(state.result.get());
  handles.scratchpad.set_data_handle(state.scratchpad.get());
  const dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, handles.src.get()},
                                  {DNNL_ARG_WEIGHTS, panel.data.get()},
                                  {DNNL_ARG_DST, handles.dst.get()},
                                  {DNNL_ARG_SCRATCHPAD, handles.scratchpad.get()}};
  KVS_CHECK(dnnl_primitive_execute(primitive.matmul.get(), state.stream.get(), std::size(args), args) == dnnl_success);
  return reinterpret_cast<const float*>(state.result.get());
}

// Calls epilogue(first row, rows, panel, its bias or null, product) for every block and panel.
template <typename Epilogue>
void OneDnnEngine::ForEachBlock(const MatrixView& x, const PackedWeights& weights, Epilogue&& epilogue) {
  const std::int64_t blocks = (x.rows + kRowBlock - 1) / kRowBlock;
  const auto panels = static_cast<std::int64_t>(weights.panels.size());
  pool_.ParallelFor(blocks * panels, [&](std::int64_t task, int worker) {
    const std::int64_t first = task / panels * kRowBlock;
    const std::int64_t rows = std::min(kRowBlock, x.rows - first);
    const Panel& panel = weights.panels[static_cast<std::size_t>(task % panels)];
    const float* bias =
        weights.bias.empty() ? nullptr : weights.bias.data() + panel.first_col * (weights.gated ? 2 : 1);
    epilogue(first, rows, panel, bias, Multiply(x, first, rows, panel, worker));
  });
}

void OneDnnEngine::Run(const LinearParams& p) {
  const auto& weights = static_cast<const PackedWeights&>(*p.weights);
  KVS_CHECK(!weights.gated && p.x.cols == weights.k && p.x.dtype == compute_);
  KVS_CHECK(p.out.rows == p.x.rows && p.out.cols == weights.n && p.out.dtype == DType::kF32);
  ForEachBlock(p.x, weights,
               [&](std::int64_t first, std::int64_t rows, const Panel& panel, const float* bias, const float* product) {
                 const std::int64_t cols = panel.shape->cols;
                 for (std::int64_t r = 0; r < rows; ++r) {
                   float* out = p.out.row<float>(first + r) + panel.first_col;
                   const float* row = product + r * cols;
                   if (p.accumulate) {
                     elementwise_.add(row, cols, out);
                   } else {
                     std::memcpy(out, row, static_cast<std::size_t>(cols) * sizeof(float));
                   }
                   if (bias != nullptr) elementwise_.add(bias, cols, out);
                 }
               });
}

void OneDnnEngine::RunGated(const GatedLinearParams& p) {
  const auto& weights = static_cast<const PackedWeights&>(*p.weights);
  KVS_CHECK(weights.gated && p.x.cols == weights.k && p.x.dtype == compute_);
  KVS_CHECK(p.out.rows == p.x.rows && p.out.cols == weights.n / 2 && p.out.dtype == compute_);
  ForEachBlock(p.x, weights,
               [&](std::int64_t first, std::int64_t rows, const Panel& panel, const float* bias, const float* product) {
                 const std::int64_t cols = panel.shape->cols / 2;
                 for (std::int64_t r = 0; r < rows; ++r) {
                   float* row = const_cast<float*>(product) + r * 2 * cols;  // the thread's own scratch
                   if (bias != nullptr) elementwise_.add(bias, 2 * cols, row);
                   std::byte* out =
                       p.out.row<std::byte>(0) +
                       static_cast<std::size_t>((first + r) * p.out.stride + panel.first_col) * DTypeBytes(compute_);
                   elementwise_.silu_mul(row, row + cols, cols, compute_, out);
                 }
               });
}

// Rows alone, in blocks of every size and at every offset must have the bits they have among 64 others.
Status OneDnnEngine::CheckRowInvariance() {
  constexpr std::int64_t kRows = 3 * kRowBlock + 37;
  std::uint32_t random = 12345;
  const auto next = [&random] {
    random = random * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<std::int32_t>(random)) * 0x1p-31f;
  };
  struct Case {
    std::int64_t n, k;
  };
  for (const Case& shape : {Case{960, 576}, Case{576, 1536}, Case{272, 192}}) {
    const std::int64_t n = shape.n, k = shape.k;
    std::vector<float> w(static_cast<std::size_t>(n * k)), wide(static_cast<std::size_t>(kRows * k));
    for (float& v : w) v = next();
    for (float& v : wide) v = next();
    const HostMatrix part{w.data(), n, k};
    KVS_ASSIGN_OR_RETURN(std::unique_ptr<LinearWeights> weights,
                         Pack({.parts = {&part, 1}, .bias = {}, .gated = false}));
    std::vector<std::byte> x(wide.size() * DTypeBytes(compute_));
    elementwise_.narrow(wide.data(), static_cast<std::int64_t>(wide.size()), compute_, x.data());
    std::vector<float> whole(static_cast<std::size_t>(kRows * n)), part_out(whole.size());
    const auto run = [&](std::int64_t first, std::int64_t rows, float* out) {
      Run({.x = {x.data() + static_cast<std::size_t>(first * k) * DTypeBytes(compute_), compute_, rows, k, k},
           .weights = weights.get(),
           .out = {out, DType::kF32, rows, n, n},
           .accumulate = false});
    };
    run(0, kRows, whole.data());
    for (std::int64_t size : {1, 2, 3, 5, 8, 17, 33, 64}) {
      for (std::int64_t first = 0; first + size <= kRows; first += 41) {
        run(first, size, part_out.data());
        if (std::memcmp(part_out.data(), whole.data() + first * n,
                        static_cast<std::size_t>(size * n) * sizeof(float)) != 0) {
          return Internal("a linear layer's rows depend on their companions (" + std::to_string(size) +
                          " rows, K=" + std::to_string(k) + ", N=" + std::to_string(n) + ", " + description() + ")");
        }
      }
    }
  }
  return OkStatus();
}

Status OneDnnEngine::SelfTest() {
  if (CheckRowInvariance().ok()) return OkStatus();
  fixed_rows_ = true;
  return CheckRowInvariance();
}

}  // namespace

Result<std::unique_ptr<LinearEngine>> NewLinearEngine(CpuIsa isa, DType compute, const ElementwiseKernel& elementwise,
                                                      ThreadPool& pool) {
  try {
    return std::unique_ptr<LinearEngine>(std::make_unique<OneDnnEngine>(isa, compute, elementwise, pool));
  } catch (const dnnl::error& e) {
    return Unavailable(std::string("oneDNN cannot start on this processor: ") + e.what());
  }
}

}  // namespace kvshare::kernels
