// Mean and percentiles of a sample.
#pragma once

#include <vector>

namespace kvshare::trace {

struct Summary {
  double mean = 0;
  double p50 = 0;
  double p95 = 0;
  double p99 = 0;
};

// The value below which a fraction `q` (0..1) of `sorted` lies, linear between neighbours (numpy's default). 0 when
// empty.
double Percentile(const std::vector<double>& sorted, double q);

Summary Summarise(std::vector<double> values);

}  // namespace kvshare::trace
