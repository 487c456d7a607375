// A random batch for attention, in host memory: rows over segments of every form that KvSegment has, on shuffled pages.
// What nobody may read is NaN. Pages are in what the backend computes in.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace kvshare::kernels::cuda {

struct AttentionShape {
  int num_heads = 8;
  int num_kv_heads = 2;
  int head_dim = 64;
  int half = 32;
};

// A segment before it lies on pages.
struct KeyRun {
  std::int64_t start = 0;
  std::int64_t length = 0;
  std::int64_t shift = 0;
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  int first = 0;
  std::vector<std::int64_t> positions;  // or empty
  std::vector<bool> skipped;            // or empty
  std::vector<float> k, v;              // [token][kv heads * head_dim]; made by AttentionCase::Add
};

class AttentionCase {
 public:
  static constexpr std::int64_t kPositions = 8192;
  AttentionCase(const AttentionShape& shape, std::vector<std::int64_t> positions, std::uint64_t seed);

  KeyRun& Add(KeyRun run);
  std::vector<KeyRun>& runs() { return runs_; }
  std::int64_t Uniform(std::int64_t low, std::int64_t high);
  std::mt19937_64& random() { return random_; }
  std::int64_t rows() const { return static_cast<std::int64_t>(positions_.size()); }
  const AttentionShape& shape() const { return shape_; }
  void set_window(std::int64_t window) { window_ = window; }

  // Some rows with their queries, over the same runs, which they see as before. Ascending.
  AttentionCase Rows(const std::vector<std::int64_t>& rows) const;

  // Lays the runs on pages chosen by `seed`, runs the backend, and returns its fp32 output rows.
  std::vector<float> Run(Backend& backend, std::uint64_t seed = 1);
  // The same rows, written in the dtype of the pages.
  std::vector<std::uint16_t> RunNarrow(Backend& backend, std::uint64_t seed = 1);
  // The same for DeviceKv::AttentionMass of `rows`: what each segment has, where 0.25 was before. Nobody asks about
  // segment `idle`.
  std::vector<std::vector<float>> Mass(Backend& backend, const std::vector<std::int64_t>& rows, std::uint64_t seed = 1,
                                       std::size_t idle = ~std::size_t{0});
  // As laid out by the last Run; in host memory.
  const AttentionParams& params() const { return p_; }
  const std::vector<double>& inv_freq() const { return inv_freq_; }

 private:
  void Lay(DType dtype, std::uint64_t seed);
  // The last layout in the backend's memory.
  struct OnDevice {
    AttentionParams p;
    std::vector<std::unique_ptr<Buffer>> buffers;
  };
  OnDevice Upload(Backend& backend) const;
  // `out`: poisoned rows of `dtype`.
  template <typename T>
  void RunInto(Backend& backend, std::uint64_t seed, DType dtype, std::vector<T>* out);

  AttentionShape shape_;
  std::vector<std::int64_t> positions_;
  std::mt19937_64 random_;
  std::int64_t window_ = 0;
  std::vector<double> inv_freq_;
  std::shared_ptr<const std::vector<float>> cos_, sin_;
  std::vector<float> q_;
  std::vector<KeyRun> runs_;
  std::vector<KvSegment> segments_;
  std::vector<std::vector<PageIndex>> tables_;
  std::vector<std::vector<std::uint64_t>> skips_;
  std::vector<std::byte> bytes_;
  AttentionParams p_;
};

// Compares with the oracle within the bound that docs/design/attention.md derives for operands of 16 bits.
void ExpectNearOracle(const AttentionCase& batch, const std::vector<float>& got);

// Several moved runs, some skipped in part, some at positions of their own, some beginning within a page; not every row
// sees every run.
AttentionCase RandomCase(const AttentionShape& shape, std::uint64_t seed);

}  // namespace kvshare::kernels::cuda
