// For tests of the selective forward: tiny models of every RoPE kind, runs of KV computed at any position, and batches
// put together by hand.
#pragma once

#include <nlohmann/json.hpp>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "runtime/model.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace kvshare::runtime {

struct KindOfModel {
  std::string name;
  testing::TinyModelOptions options;
  nlohmann::json rope;  // config.json's rope_scaling; null: the default kind
};

inline void PrintTo(const KindOfModel& kind, std::ostream* out) { *out << kind.name; }

// Every static RoPE kind, with and without QK-norm and biases, and a sliding window.
std::vector<KindOfModel> KindsOfModels();

struct TinyModel {
  testing::TempDir dir;
  std::unique_ptr<Model> model;

  TinyModel(const KindOfModel& kind, kernels::DType dtype);
};

// Logits [ids, vocab] in double precision.
std::vector<double> OracleLogits(const KindOfModel& kind, const ModelConfig& config, std::span<const TokenId> ids);

// What rounding may do to logits, relative to the largest (derived in forward_test.cc).
double LogitsTolerance(const ModelConfig& config, kernels::DType dtype);

std::vector<TokenId> RandomTokens(std::uint64_t seed, std::size_t count);

bool SameBits(std::span<const float> a, std::span<const float> b);

// max |got - want| / max |want|, where `want` is rows [row, row + rows) of the oracle's.
double RelativeError(std::span<const float> got, std::span<const double> want);

// Tokens side by side on pages: token t is page row first + t.
struct KvRun {
  std::vector<kernels::PageIndex> pages;
  std::int64_t start = 0;  // position at which token 0 was computed
  std::int64_t length = 0;
  int first = 0;

  kernels::KvSlot slot(std::int64_t t) const {
    return {pages[static_cast<std::size_t>((first + t) / kernels::kPageTokens)],
            static_cast<int>((first + t) % kernels::kPageTokens)};
  }
  // The run as an operand of rows [0, rows), standing at `placed`.
  kernels::KvSegment At(std::int64_t placed, std::int64_t rows) const {
    return {.pages = pages,
            .start = placed,
            .length = length,
            .shift = placed - start,
            .row_begin = 0,
            .row_end = rows,
            .first = first};
  }
};

class SelectiveHarness {
 public:
  // Pages hold huge numbers until they are written.
  SelectiveHarness(Model* model, kernels::PageIndex num_pages);

  // Fresh pages for `length` tokens from page row `first` on; never given twice.
  KvRun Take(std::int64_t start, std::int64_t length, int first = 0);

  // `ids` computed alone from position `start` on, at most `piece` rows at a time.
  KvRun Compute(std::span<const TokenId> ids, std::int64_t start, int first = 0, std::int64_t piece = 1024);

  // All logits of `ids` as a prompt of its own from position `start` on.
  std::vector<float> Plain(std::span<const TokenId> ids, std::int64_t start = 0);

  // Forward with as many logits as the batch asks for.
  std::vector<float> Forward(const ForwardBatch& batch);

  const kernels::KvPages& pages() const { return pages_; }

 private:
  std::vector<float> Run(std::span<const TokenId> ids, const KvRun& run, std::int64_t piece, bool logits);

  Model* model_;
  std::unique_ptr<kernels::Buffer> memory_;
  kernels::KvPages pages_;
  kernels::PageIndex taken_ = 0;
};

}  // namespace kvshare::runtime
