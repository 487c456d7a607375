// Double-precision oracles of the row-local operations and of linear layers, written from their equations.
#pragma once

#include <span>
#include <vector>

namespace kvshare::reference {

// A value and what a relative error of its summands amounts to: sum |x_i w_i|.
struct Sum {
  double value = 0;
  double magnitude = 0;
};

// <x, w> + bias
Sum Dot(std::span<const float> x, std::span<const float> w, double bias);

// x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)
std::vector<double> RmsNorm(std::span<const float> x, std::span<const float> weight, double eps);

// x / (1 + exp(-x)) (arXiv 1606.08415)
double Silu(double x);

// RoPE (arXiv 2104.09864) in the half-split pairing of transformers: dimension j turns with dimension j + half.
std::vector<double> Rotate(std::span<const double> x, std::span<const float> cos, std::span<const float> sin);

}  // namespace kvshare::reference
