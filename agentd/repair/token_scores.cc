#include "agentd/repair/token_scores.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "anchors/selection.h"
#include "kernels/attention_mass.h"
#include "kernels/device_kv.h"
#include "kernels/kv_rows.h"
#include "libkvshare/core/check.h"
#include "libkvshare/core/status_macros.h"

namespace kvshare::agentd {
namespace {

using kernels::AttentionParams;
using kernels::Buffer;
using kernels::KvPages;
using kernels::KvSlot;
using kernels::MatrixView;
using kernels::RowDeviation;

std::size_t Index(std::int64_t i) { return static_cast<std::size_t>(i); }

class HostScores final : public TokenScores {
 public:
  HostScores(std::int64_t tokens, RankBy rank) : rank_(rank), mass_(Index(tokens)), deviations_(Index(tokens)) {}

  void AddMass(const AttentionParams& p, std::span<const std::int64_t> rows,
               std::span<const std::int64_t> first_token) override {
    std::vector<std::span<float>> mass(first_token.size());
    for (std::size_t s = 0; s < mass.size(); ++s) {
      if (first_token[s] < 0) continue;
      mass[s] = std::span(mass_).subspan(Index(first_token[s]), Index(p.segments[s].length));
    }
    kernels::AttentionMass(p, rows, mass);
  }

  void Measure(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
               std::int64_t first_token) override {
    kernels::ValueDeviation(fresh, pages, layer, stored,
                            std::span(deviations_).subspan(Index(first_token), stored.size()));
  }

  Result<std::vector<std::int64_t>> Choose(std::int64_t count) override {
    if (rank_ == RankBy::kMass) return anchors::LargestScores(mass_, count);
    std::vector<float> scores;
    for (std::size_t i = 0; i < mass_.size(); ++i) {
      const float squares = deviations_[i].squares;
      scores.push_back(rank_ == RankBy::kDeviation ? squares : std::sqrt(squares) * mass_[i]);
    }
    return anchors::LargestScores(scores, count);
  }

 private:
  const RankBy rank_;
  std::vector<float> mass_;
  std::vector<RowDeviation> deviations_;
};

class DeviceScores final : public TokenScores {
 public:
  DeviceScores(kernels::DeviceKv& kv, std::int64_t tokens, RankBy rank) : kv_(kv), tokens_(tokens), rank_(rank) {}

  Status Allocate(kernels::Backend& backend) {
    if (rank_ != RankBy::kDeviation) {
      KVS_ASSIGN_OR_RETURN(mass_, backend.Allocate(Index(tokens_) * sizeof(float)));
    }
    if (rank_ != RankBy::kMass) {
      KVS_ASSIGN_OR_RETURN(deviations_, backend.Allocate(Index(tokens_) * sizeof(RowDeviation)));
    }
    return OkStatus();
  }

  void AddMass(const AttentionParams& p, std::span<const std::int64_t> rows,
               std::span<const std::int64_t> first_token) override {
    std::vector<float*> mass(first_token.size());
    for (std::size_t s = 0; s < mass.size(); ++s) {
      if (first_token[s] < 0) continue;
      KVS_CHECK(first_token[s] + p.segments[s].length <= tokens_);
      mass[s] = this->mass() + first_token[s];
    }
    kv_.AttentionMass(p, rows, mass);
  }

  void Measure(const MatrixView& fresh, const KvPages& pages, int layer, std::span<const KvSlot> stored,
               std::int64_t first_token) override {
    KVS_CHECK(0 <= first_token && first_token + static_cast<std::int64_t>(stored.size()) <= tokens_);
    kv_.ValueDeviation(fresh, pages, layer, stored, deviations() + first_token);
  }

  Result<std::vector<std::int64_t>> Choose(std::int64_t count) override {
    std::vector<std::int32_t> chosen(Index(std::min(count, tokens_)));
    KVS_RETURN_IF_ERROR(
        rank_ == RankBy::kDeviation
            ? kv_.ChooseRows(deviations(), tokens_, chosen)
            : kv_.ChooseRowsByMass(mass(), rank_ == RankBy::kMass ? nullptr : deviations(), tokens_, chosen));
    return std::vector<std::int64_t>(chosen.begin(), chosen.end());
  }

 private:
  float* mass() const { return reinterpret_cast<float*>(mass_->data()); }
  RowDeviation* deviations() const { return reinterpret_cast<RowDeviation*>(deviations_->data()); }

  kernels::DeviceKv& kv_;
  const std::int64_t tokens_;
  const RankBy rank_;
  std::unique_ptr<Buffer> mass_;        // [tokens] floats, where they are ranked by it
  std::unique_ptr<Buffer> deviations_;  // [tokens]
};

}  // namespace

Result<std::unique_ptr<TokenScores>> NewTokenScores(kernels::Backend& backend, std::int64_t tokens, RankBy rank) {
  if (backend.capabilities().host_memory) {
    return std::unique_ptr<TokenScores>(std::make_unique<HostScores>(tokens, rank));
  }
  KVS_CHECK(backend.device_kv() != nullptr);
  auto scores = std::make_unique<DeviceScores>(*backend.device_kv(), tokens, rank);
  KVS_RETURN_IF_ERROR(scores->Allocate(backend));
  return std::unique_ptr<TokenScores>(std::move(scores));
}

}  // namespace kvshare::agentd
