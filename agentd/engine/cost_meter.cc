#include "agentd/engine/cost_meter.h"

#include <algorithm>

namespace kvshare::agentd {
namespace {

// A step of fewer prompt rows says little: it reads all weights for them.
constexpr std::int64_t kMinRows = 16;
constexpr double kWeightOfNewest = 0.2;
// A slower one was held up by something else.
constexpr double kMostMovedRow = 4;

}  // namespace

void CostMeter::Measured(std::int64_t prefill_rows, std::int64_t rows, double seconds) {
  if (given_ || prefill_rows < kMinRows) return;
  const double per_token = seconds / static_cast<double>(rows);
  seconds_per_token_ =
      seconds_per_token_ == 0 ? per_token : seconds_per_token_ + kWeightOfNewest * (per_token - seconds_per_token_);
}

void CostMeter::MeasuredMoved(std::int64_t rows, double seconds) {
  if (given_ || seconds_per_token_ == 0 || rows < kMinRows) return;
  const double plain_rows = seconds / seconds_per_token_;
  const double row = std::min(plain_rows / static_cast<double>(rows), kMostMovedRow);
  moved_row_ += kWeightOfNewest * (row - moved_row_);
}

bool CostMeter::ShouldLoad(std::int64_t tokens, double load_seconds) {
  const bool known = seconds_per_token_ > 0 && load_seconds > 0;
  if (!known || load_seconds <= seconds_per_token_ * static_cast<double>(tokens)) {
    declined_ = 0;
    return true;
  }
  if (++declined_ < kTrialPeriod) return false;
  declined_ = 0;
  return true;
}

}  // namespace kvshare::agentd
