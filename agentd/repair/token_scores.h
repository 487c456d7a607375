// TokenScores: what the tokens of moved chunks are ranked by, gathered and compared where the model computes. Of a
// device whose memory the host does not read nothing crosses but the tokens that were chosen.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/paged_kv.h"
#include "kvshare/status.h"

namespace kvshare::agentd {

enum class RankBy {
  kDeviation,           // of V, as computed, from V as stored
  kMass,                // attention mass
  kDeviationTimesMass,  // its root, times the mass
};

// The tokens are numbered over all chunks, one chunk behind the other. At the start all scores are zero.
class TokenScores {
 public:
  virtual ~TokenScores() = default;

  // Adds the attention mass that `rows` (ascending) give in p.layer (kernels/attention_mass.h). Segment s of p.segments
  // holds the tokens from first_token[s] on; none of them where that is < 0.
  virtual void AddMass(const kernels::AttentionParams& p, std::span<const std::int64_t> rows,
                       std::span<const std::int64_t> first_token) = 0;

  // How far the tokens from first_token on are off: their V as computed, row for row, from V stored at stored[i].
  virtual void Measure(const kernels::MatrixView& fresh, const kernels::KvPages& pages, int layer,
                       std::span<const kernels::KvSlot> stored, std::int64_t first_token) = 0;

  // The `count` tokens of the greatest rank, ascending; of equals the lower. A NaN is the least on the host and the
  // greatest on a device (kernels/device_kv.h). Returns the backend's failure, if it has any.
  virtual Result<std::vector<std::int64_t>> Choose(std::int64_t count) = 0;
};

// Where the host does not read the backend's memory, requires its device_kv(). The backend must outlive the scores.
Result<std::unique_ptr<TokenScores>> NewTokenScores(kernels::Backend& backend, std::int64_t tokens, RankBy rank);

}  // namespace kvshare::agentd
