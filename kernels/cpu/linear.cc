#include "kernels/cpu/linear.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <deque>
#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

#include "kernels/cpu/few_rows.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/weight_memory.h"
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
constexpr std::int64_t kColMultiple = 64;  // what oneDNN packs together: it would pad other widths

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
  // What the row-invariance check has left of the ways to multiply.
  std::int64_t few_rows_chunk = 0;  // up to kFewRows rows by our kernel, in chunks of K whose sums have oneDNN's bits
  bool fixed_rows = false;          // always kRowBlock rows, but for those few
};

struct Panel {
  const PanelShape* shape = nullptr;
  dnnl::memory data;                      // in the engine's arena
  const std::uint16_t* packed = nullptr;  // the same bytes
  std::int64_t first_col = 0;             // in the output; for gated layers, of the combined output
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

// Everything a thread multiplies with; all of it exists before the first multiplication that needs it.
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

// Makes a buffer at least `wanted` bytes large, zeroed: padding rows are multiplied too, so let them be numbers.
bool Grow(AlignedBytes& buffer, std::size_t& size, std::size_t wanted) {
  if (wanted <= size) return true;
  AlignedBytes larger = AllocateAligned(wanted);
  if (larger == nullptr) return false;
  std::memset(larger.get(), 0, wanted);
  buffer = std::move(larger);
  size = wanted;
  return true;
}

FewRowsKernel FewRowsFor(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAmxBf16) return AmxBf16FewRows;
  if (isa == CpuIsa::kAvx512Bf16) return Avx512Bf16FewRows;
#else
  static_cast<void>(isa);
#endif
  return nullptr;
}

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
  OneDnnEngine(const LinearOptions& options, const ElementwiseKernel& elementwise, ThreadPool& pool)
      : engine_(dnnl::engine::kind::cpu, 0),
        compute_(options.compute),
        fixed_rows_(options.fixed_rows),
        weights_dtype_(compute_ == DType::kBf16 && MultipliesBf16(options.isa) ? DType::kBf16 : DType::kF32),
        elementwise_(elementwise),
        pool_(pool),
        few_rows_(FewRowsFor(options.isa)) {
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
           (weights_dtype_ == DType::kBf16 ? " bf16" : " f32") + FixedShapes();
  }

 private:
  dnnl::memory::data_type dnnl_dtype() const {
    return weights_dtype_ == DType::kBf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
  }
  // Names the shapes that failed the check: they multiply differently, so their results' bits differ too.
  std::string FixedShapes() const {
    std::string names;
    for (const PanelShape& shape : shapes_) {
      if (shape.fixed_rows) names += " fixed-rows" + std::to_string(shape.k) + "x" + std::to_string(shape.cols);
    }
    return names;
  }
  // Finds or makes the shape; a new one is checked before it is used, and never changes afterwards.
  Result<const PanelShape*> ShapeFor(std::int64_t k, std::int64_t cols);
  Result<PanelShape> MakeShape(std::int64_t k, std::int64_t cols);
  Status PrepareThreads(const PanelShape& shape);
  bool CanMultiplyFewRows(const PanelShape& shape) const;
  void FindFewRowsChunk(PanelShape& shape);
  Status CheckRowInvariance(const PanelShape& shape);
  // Packs a plain [cols, K] fp32 matrix. Runs on any thread, so it must not throw.
  dnnl_status_t Reorder(std::int64_t k, std::int64_t cols, float* plain, dnnl::memory to) const;
  dnnl_status_t PackPanel(const LinearSpec& spec, const PackedWeights& weights, const Panel& panel, float* plain);
  // Multiplies rows [first, first + rows) of x by a panel into the thread's scratch; returns it, [rows, panel cols].
  const float* Multiply(const MatrixView& x, std::int64_t first, std::int64_t rows, const Panel& panel, int worker);
  template <typename Epilogue>
  void ForEachBlock(const MatrixView& x, const PackedWeights& weights, Epilogue&& epilogue);

  dnnl::engine engine_;
  const DType compute_;
  const bool fixed_rows_;  // for every shape
  const DType weights_dtype_;
  const ElementwiseKernel& elementwise_;
  ThreadPool& pool_;
  const FewRowsKernel few_rows_;  // null: none
  WeightArena arena_;
  std::deque<PanelShape> shapes_;
  std::vector<ThreadState> threads_;
};

Result<const PanelShape*> OneDnnEngine::ShapeFor(std::int64_t k, std::int64_t cols) {
  for (const PanelShape& shape : shapes_) {
    if (shape.k == k && shape.cols == cols) return &shape;
  }
  KVS_ASSIGN_OR_RETURN(PanelShape shape, MakeShape(k, cols));
  KVS_RETURN_IF_ERROR(PrepareThreads(shape));
  shape.fixed_rows = fixed_rows_;
  if (!fixed_rows_) FindFewRowsChunk(shape);
  if (!CheckRowInvariance(shape).ok()) {
    shape.fixed_rows = true;  // one number of rows for all: a row's result cannot depend on how many there are
    if (!fixed_rows_) FindFewRowsChunk(shape);
    KVS_RETURN_IF_ERROR(CheckRowInvariance(shape));
  }
  shapes_.push_back(std::move(shape));
  return &shapes_.back();
}

Result<PanelShape> OneDnnEngine::MakeShape(std::int64_t k, std::int64_t cols) {
  PanelShape shape;
  shape.index = shapes_.size();
  shape.k = k;
  shape.cols = cols;
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
  return shape;
}

bool OneDnnEngine::CanMultiplyFewRows(const PanelShape& shape) const {
  if (few_rows_ == nullptr || weights_dtype_ != DType::kBf16 || shape.k % 32 != 0) return false;
  try {
    return shape.packed ==
           dnnl::memory::desc({shape.k, shape.cols}, dnnl_dtype(), dnnl::memory::format_tag::BA16a64b2a);
  } catch (const dnnl::error&) {
    return false;  // the library does not know this layout, so it has not chosen it
  }
}

// oneDNN does not say how it cuts K: a length that gives its bits is its length.
void OneDnnEngine::FindFewRowsChunk(PanelShape& shape) {
  if (!CanMultiplyFewRows(shape)) return;
  for (const std::int64_t chunk : {shape.k, std::int64_t{1024}, std::int64_t{512}, std::int64_t{256}}) {
    if (chunk > shape.k) continue;
    shape.few_rows_chunk = chunk;
    if (CheckRowInvariance(shape).ok()) return;
  }
  shape.few_rows_chunk = 0;
}

// Handles and buffers for every thread, so that nothing is made, and nothing can fail, between jobs.
Status OneDnnEngine::PrepareThreads(const PanelShape& shape) {
  std::size_t scratchpad_bytes = 0;
  for (const Primitive& primitive : shape.primitives) {
    scratchpad_bytes = std::max(scratchpad_bytes, primitive.scratchpad.get_size());
  }
  const auto row_bytes = static_cast<std::size_t>(shape.k) * DTypeBytes(weights_dtype_);
  for (ThreadState& state : threads_) {
    if (!Grow(state.rows, state.rows_bytes, static_cast<std::size_t>(kRowBlock) * row_bytes) ||
        !Grow(state.result, state.result_bytes, static_cast<std::size_t>(kRowBlock * shape.cols) * sizeof(float)) ||
        !Grow(state.scratchpad, state.scratchpad_bytes, scratchpad_bytes)) {
      return ResourceExhausted("the machine has no memory left for the threads' scratch");
    }
    state.handles.resize(shape.index + 1);
    try {
      for (std::size_t i = 0; i < kRowSizes; ++i) {
        const Primitive& primitive = shape.primitives[i];
        state.handles[shape.index][i] = {dnnl::memory(primitive.src, engine_, nullptr),
                                         dnnl::memory(primitive.dst, engine_, nullptr),
                                         dnnl::memory(primitive.scratchpad, engine_, nullptr)};
      }
    } catch (const dnnl::error& e) {
      return Internal(std::string("oneDNN cannot describe memory: ") + e.what());
    }
  }
  return OkStatus();
}

// W is [cols, K] as stored: column-major seen as [K, cols].
dnnl_status_t OneDnnEngine::Reorder(std::int64_t k, std::int64_t cols, float* plain, dnnl::memory to) const {
  KeepOpenMpSingle();
  try {
    dnnl::memory from({{k, cols}, dnnl::memory::data_type::f32, dnnl::memory::format_tag::ba}, engine_, plain);
    dnnl::stream stream(engine_);
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
    return dnnl_success;
  } catch (const dnnl::error& e) {
    return e.status;
  }
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

// `plain` has room for the panel, [cols, K] fp32.
dnnl_status_t OneDnnEngine::PackPanel(const LinearSpec& spec, const PackedWeights& weights, const Panel& panel,
                                      float* plain) {
  const std::int64_t k = weights.k;
  const std::int64_t total_cols = panel.shape->cols;
  const std::int64_t cols = weights.gated ? total_cols / 2 : total_cols;
  GatherRows(spec, panel.first_col, cols, k, plain);
  if (weights.gated) GatherRows(spec, weights.n / 2 + panel.first_col, cols, k, plain + cols * k);
  return Reorder(panel.shape->k, total_cols, plain, panel.data);
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
  std::int64_t widest_panel = 0;
  try {
    for (std::int64_t first = 0; first < out_cols; first += width) {
      const std::int64_t cols = std::min(width, out_cols - first);
      KVS_ASSIGN_OR_RETURN(const PanelShape* shape, ShapeFor(weights->k, spec.gated ? 2 * cols : cols));
      const std::size_t bytes = shape->packed.get_size();
      std::byte* data = arena_.Allocate(bytes);
      if (data == nullptr) return ResourceExhausted("the machine has no memory left for packed weights");
      widest_panel = std::max(widest_panel, shape->cols);
      weights->panels.push_back(
          {shape, dnnl::memory(shape->packed, engine_, data), reinterpret_cast<const std::uint16_t*>(data), first});
      weights->total_bytes += bytes;
      if (spec.bias.empty()) continue;
      for (std::int64_t begin : {first, weights->n / 2 + first}) {
        weights->bias.insert(weights->bias.end(), spec.bias.begin() + begin, spec.bias.begin() + begin + cols);
        if (!spec.gated) break;
      }
    }
  } catch (const dnnl::error& e) {
    return Internal(std::string("oneDNN cannot describe weights: ") + e.what());
  }
  std::vector<AlignedBytes> plain(threads_.size());
  for (AlignedBytes& buffer : plain) {
    buffer = AllocateAligned(static_cast<std::size_t>(widest_panel * weights->k) * sizeof(float));
    if (buffer == nullptr) return ResourceExhausted("the machine has no memory left to pack weights");
  }
  std::atomic<dnnl_status_t> failure{dnnl_success};
  pool_.ParallelFor(static_cast<std::int64_t>(weights->panels.size()), [&](std::int64_t i, int worker) {
    const dnnl_status_t status = PackPanel(spec, *weights, weights->panels[static_cast<std::size_t>(i)],
                                           reinterpret_cast<float*>(plain[static_cast<std::size_t>(worker)].get()));
    if (status != dnnl_success) failure.store(status);
  });
  if (failure.load() != dnnl_success) {
    return Internal("oneDNN cannot pack weights (status " + std::to_string(failure.load()) + ")");
  }
  return std::unique_ptr<LinearWeights>(std::move(weights));
}

const float* OneDnnEngine::Multiply(const MatrixView& x, std::int64_t first, std::int64_t rows, const Panel& panel,
                                    int worker) {
  ThreadState& state = threads_[static_cast<std::size_t>(worker)];
  const PanelShape& shape = *panel.shape;
  if (shape.few_rows_chunk > 0 && rows <= kFewRows) {
    auto* const product = reinterpret_cast<float*>(state.result.get());
    few_rows_(x.row<std::uint16_t>(first), x.stride, rows, {panel.packed, shape.k, shape.few_rows_chunk, shape.cols},
              product);
    return product;
  }
  KeepOpenMpSingle();
  const int size_index = shape.fixed_rows ? kRowSizes - 1 : RowSizeIndex(rows);
  const std::int64_t padded = std::int64_t{1} << size_index;
  const Primitive& primitive = shape.primitives[static_cast<std::size_t>(size_index)];

  void* src = x.row<std::byte>(0) + static_cast<std::size_t>(first * x.stride) * DTypeBytes(x.dtype);
  if (padded != rows || x.stride != shape.k || x.dtype != weights_dtype_) {
    const std::size_t row_bytes = static_cast<std::size_t>(shape.k) * DTypeBytes(weights_dtype_);
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

  Handles& handles = state.handles[shape.index][static_cast<std::size_t>(size_index)];
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

// Calls epilogue(first row, rows, panel, its bias or null, product) for every block and panel. A worker multiplies all
// its blocks by a panel before it goes on to the next one: a panel stays in its cache, all of them would not. Where
// there are many blocks each worker has its share of them and all panels; with few, its share of the panels and all
// blocks, so that weights are read once.
template <typename Epilogue>
void OneDnnEngine::ForEachBlock(const MatrixView& x, const PackedWeights& weights, Epilogue&& epilogue) {
  const std::int64_t blocks = (x.rows + kRowBlock - 1) / kRowBlock;
  const auto panels = static_cast<std::int64_t>(weights.panels.size());
  const std::int64_t shares = blocks >= 2 * pool_.size() ? pool_.size() : 1;
  pool_.ParallelForAtHome(blocks * panels, [&](std::int64_t task, int worker) {
    // The share that block task / panels is of: blocks * share / shares and following.
    const std::int64_t share = ((task / panels + 1) * shares - 1) / blocks;
    const std::int64_t begin = blocks * share / shares, count = blocks * (share + 1) / shares - begin;
    const std::int64_t at = task - begin * panels;
    const std::int64_t first = (begin + at % count) * kRowBlock;
    const std::int64_t rows = std::min(kRowBlock, x.rows - first);
    const Panel& panel = weights.panels[static_cast<std::size_t>(at / count)];
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

// Rows alone, in blocks of every size and at every place must have the bits they have among 63 others.
Status OneDnnEngine::CheckRowInvariance(const PanelShape& shape) {
  const std::int64_t k = shape.k, cols = shape.cols;
  std::uint32_t random = 12345;
  const auto fill = [&random](float* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      random = random * 1664525u + 1013904223u;
      values[i] = static_cast<float>(static_cast<std::int32_t>(random)) * 0x1p-31f;
    }
  };
  const auto floats = [](std::int64_t count) {
    return AllocateAligned(static_cast<std::size_t>(count) * sizeof(float));
  };
  const AlignedBytes plain = floats(std::max(cols, kRowBlock) * k), packed = AllocateAligned(shape.packed.get_size());
  const AlignedBytes x = floats(kRowBlock * k), whole = floats(kRowBlock * cols);
  if (plain == nullptr || packed == nullptr || x == nullptr || whole == nullptr) {
    return ResourceExhausted("the machine has no memory left to check a linear layer");
  }
  auto* const values = reinterpret_cast<float*>(plain.get());
  fill(values, cols * k);
  Panel panel;
  panel.shape = &shape;
  panel.packed = reinterpret_cast<const std::uint16_t*>(packed.get());
  try {
    panel.data = dnnl::memory(shape.packed, engine_, packed.get());
  } catch (const dnnl::error& e) {
    return Internal(std::string("oneDNN cannot describe weights: ") + e.what());
  }
  if (Reorder(k, cols, values, panel.data) != dnnl_success) return Internal("oneDNN cannot pack weights");
  fill(values, kRowBlock * k);
  elementwise_.narrow(values, kRowBlock * k, compute_, x.get());
  const MatrixView view{x.get(), compute_, kRowBlock, k, k};
  const std::size_t row_bytes = static_cast<std::size_t>(cols) * sizeof(float);
  std::memcpy(whole.get(), Multiply(view, 0, kRowBlock, panel, 0), static_cast<std::size_t>(kRowBlock) * row_bytes);
  for (const std::int64_t size : {1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33, 63}) {
    // Three places suffice for each number of rows: what a row's place could change is its offset in a register tile.
    for (const std::int64_t first : {std::int64_t{0}, (kRowBlock - size) / 3, kRowBlock - size}) {
      if (std::memcmp(Multiply(view, first, size, panel, 0), whole.get() + static_cast<std::size_t>(first) * row_bytes,
                      static_cast<std::size_t>(size) * row_bytes) != 0) {
        return Internal("a linear layer's rows depend on their companions (" + std::to_string(size) + " rows, K=" +
                        std::to_string(k) + ", columns=" + std::to_string(cols) + ", " + description() + ")");
      }
    }
  }
  return OkStatus();
}

Status OneDnnEngine::SelfTest() {
  if (shapes_
          .empty()) {  // no layer yet: shapes of a small model stand in; each layer's own are checked when it is made
    for (const auto& [k, cols] : {std::pair<std::int64_t, std::int64_t>{576, 480}, {1536, 288}, {192, 272}}) {
      KVS_RETURN_IF_ERROR(ShapeFor(k, cols).status());
    }
    return OkStatus();
  }
  for (const PanelShape& shape : shapes_) KVS_RETURN_IF_ERROR(CheckRowInvariance(shape));
  return OkStatus();
}

}  // namespace

Result<std::unique_ptr<LinearEngine>> NewLinearEngine(const LinearOptions& options,
                                                      const ElementwiseKernel& elementwise, ThreadPool& pool) {
  try {
    return std::unique_ptr<LinearEngine>(std::make_unique<OneDnnEngine>(options, elementwise, pool));
  } catch (const dnnl::error& e) {
    return Unavailable(std::string("oneDNN cannot start on this processor: ") + e.what());
  }
}

}  // namespace kvshare::kernels
