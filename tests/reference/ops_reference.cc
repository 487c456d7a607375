#include "tests/reference/ops_reference.h"

#include <cmath>
#include <cstddef>

namespace kvshare::reference {

Sum Dot(std::span<const float> x, std::span<const float> w, double bias) {
  Sum sum{bias, std::abs(bias)};
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double product = double{x[i]} * double{w[i]};
    sum.value += product;
    sum.magnitude += std::abs(product);
  }
  return sum;
}

std::vector<double> RmsNorm(std::span<const float> x, std::span<const float> weight, double eps) {
  double squares = 0;
  for (const float v : x) squares += double{v} * double{v};
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
  std::vector<double> out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = double{x[i]} * scale * double{weight[i]};
  return out;
}

double Silu(double x) { return x / (1.0 + std::exp(-x)); }

std::vector<double> Rotate(std::span<const double> x, std::span<const float> cos, std::span<const float> sin) {
  std::vector<double> out(x.begin(), x.end());
  const std::size_t half = cos.size();
  for (std::size_t j = 0; j < half; ++j) {
    out[j] = x[j] * double{cos[j]} - x[j + half] * double{sin[j]};
    out[j + half] = x[j + half] * double{cos[j]} + x[j] * double{sin[j]};
  }
  return out;
}

}  // namespace kvshare::reference
