// CostMeter: what computing a prompt's tokens costs, as measured, and whether loading or moving them is cheaper.
#pragma once

#include <cstdint>
#include <optional>

namespace kvshare::agentd {

// One thread.
class CostMeter {
 public:
  // `seconds_per_token`: as it is said to be, whatever is measured; unset: not known yet.
  explicit CostMeter(std::optional<double> seconds_per_token = std::nullopt)
      : given_(seconds_per_token.has_value()), seconds_per_token_(seconds_per_token.value_or(0)) {}

  // A step of `rows` rows, `prefill_rows` of them of prompts, took this long.
  void Measured(std::int64_t prefill_rows, std::int64_t rows, double seconds);

  // `rows` rows of a prompt that is computed over moved chunks took this long. Says nothing until plain ones have been
  // measured.
  void MeasuredMoved(std::int64_t rows, double seconds);

  // Whether to load KV of `tokens` tokens that loading would bring in `load_seconds` (0: not known). Loads until both
  // costs are known; and every kTrialPeriod-th time that computing seems cheaper, so that an estimate from a bad moment
  // does not last.
  bool ShouldLoad(std::int64_t tokens, double load_seconds);

  double seconds_per_token() const { return seconds_per_token_; }  // 0: not known yet
  // How many rows of a plain prompt take as long as one over moved chunks, whose passes are shorter and whose attention
  // goes over many short runs. 1 until measured, and where seconds_per_token is given.
  double moved_row() const { return moved_row_; }

  static constexpr int kTrialPeriod = 64;

 private:
  const bool given_;
  double seconds_per_token_;  // moving average
  double moved_row_ = 1;      // likewise
  int declined_ = 0;          // in a row
};

}  // namespace kvshare::agentd
