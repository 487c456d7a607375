// The row-local operations over whatever `Simd` the including file provides. Tails go through a padded copy of the same
// vector code, so that an element's bits do not depend on where in the row it lies.
#pragma once

#include "kernels/cpu/elementwise.h"

namespace kvshare::kernels {
namespace {

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;

// exp(x), at most 2 ulp off for x in [-87, 88]; below exp(-87), and infinite from 88.4 on, a little before fp32 ends.
// Cody-Waite reduction, then the Taylor-like minimax polynomial of Cephes' expf (degree 5 on [-ln2/2, ln2/2]).
inline F Exp(F x) {
  x = Simd::Min(Simd::Max(x, Simd::Set(-87.0f)), Simd::Set(89.0f));
  const F n = Simd::Round(Simd::Mul(x, Simd::Set(1.44269504088896341f)));
  F r = Simd::Fma(n, Simd::Set(-0.693359375f), x);
  r = Simd::Fma(n, Simd::Set(2.12194440e-4f), r);
  F p = Simd::Set(1.9875691500e-4f);
  p = Simd::Fma(p, r, Simd::Set(1.3981999507e-3f));
  p = Simd::Fma(p, r, Simd::Set(8.3334519073e-3f));
  p = Simd::Fma(p, r, Simd::Set(4.1665795894e-2f));
  p = Simd::Fma(p, r, Simd::Set(1.6666665459e-1f));
  p = Simd::Fma(p, r, Simd::Set(5.0000001201e-1f));
  p = Simd::Add(Simd::Fma(p, Simd::Mul(r, r), r), Simd::Set(1.0f));
  return Simd::Mul(p, Simd::Pow2(n));
}

inline void StoreAs(DType dtype, void* out, std::int64_t i, F x) {
  if (dtype == DType::kF32) {
    Simd::Store(static_cast<float*>(out) + i, x);
  } else {
    Simd::StoreBf16(static_cast<std::uint16_t*>(out) + i, x);
  }
}

// Stores the first `count` lanes.
inline void StoreTail(DType dtype, void* out, std::int64_t i, F x, std::int64_t count) {
  if (dtype == DType::kF32) {
    float lanes[kLanes];
    Simd::Store(lanes, x);
    for (std::int64_t j = 0; j < count; ++j) static_cast<float*>(out)[i + j] = lanes[j];
  } else {
    std::uint16_t lanes[kLanes];
    Simd::StoreBf16(lanes, x);
    for (std::int64_t j = 0; j < count; ++j) static_cast<std::uint16_t*>(out)[i + j] = lanes[j];
  }
}

// The first `count` lanes of p, zeros behind them.
inline F LoadTail(const float* p, std::int64_t count) {
  float lanes[kLanes] = {};
  for (std::int64_t j = 0; j < count; ++j) lanes[j] = p[j];
  return Simd::Load(lanes);
}

inline float ReduceAdd(F x) {
  float lanes[kLanes];
  Simd::Store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

void RmsNormRow(const float* x, const float* weight, float eps, std::int64_t n, DType dtype, void* out) {
  const std::int64_t whole = n - n % kLanes;
  F sum = Simd::Zero();
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const F v = Simd::Load(x + i);
    sum = Simd::Fma(v, v, sum);
  }
  if (whole < n) {
    const F v = LoadTail(x + whole, n - whole);
    sum = Simd::Fma(v, v, sum);
  }
  const float mean = ReduceAdd(sum) / static_cast<float>(n);
  const F scale = Simd::Set(1.0f / __builtin_sqrtf(mean + eps));
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    StoreAs(dtype, out, i, Simd::Mul(Simd::Mul(Simd::Load(x + i), scale), Simd::Load(weight + i)));
  }
  if (whole < n) {
    const F v = Simd::Mul(Simd::Mul(LoadTail(x + whole, n - whole), scale), LoadTail(weight + whole, n - whole));
    StoreTail(dtype, out, whole, v, n - whole);
  }
}

void WidenRow(const void* x, DType dtype, std::int64_t n, float* out) {
  if (dtype == DType::kF32) {
    __builtin_memcpy(out, x, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  const auto* in = static_cast<const std::uint16_t*>(x);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Simd::Store(out + i, Simd::LoadBf16(in + i));
  for (; i < n; ++i) {
    const std::uint32_t bits = std::uint32_t{in[i]} << 16;
    __builtin_memcpy(out + i, &bits, sizeof bits);
  }
}

void NarrowRow(const float* x, std::int64_t n, DType dtype, void* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreAs(dtype, out, i, Simd::Load(x + i));
  if (i < n) StoreTail(dtype, out, i, LoadTail(x + i, n - i), n - i);
}

void AddRow(const float* y, std::int64_t n, float* x) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Simd::Store(x + i, Simd::Add(Simd::Load(x + i), Simd::Load(y + i)));
  for (; i < n; ++i) x[i] += y[i];
}

inline F SiluMul(F gate, F up) {
  const F denominator = Simd::Add(Simd::Set(1.0f), Exp(Simd::Sub(Simd::Zero(), gate)));
  return Simd::Mul(Simd::Div(gate, denominator), up);
}

void SiluMulRow(const float* gate, const float* up, std::int64_t n, DType dtype, void* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreAs(dtype, out, i, SiluMul(Simd::Load(gate + i), Simd::Load(up + i)));
  if (i < n) StoreTail(dtype, out, i, SiluMul(LoadTail(gate + i, n - i), LoadTail(up + i, n - i)), n - i);
}

inline void RotatePair(F& low, F& high, F cos, F sin) {
  const F rotated_low = Simd::Sub(Simd::Mul(low, cos), Simd::Mul(high, sin));
  const F rotated_high = Simd::Add(Simd::Mul(high, cos), Simd::Mul(low, sin));
  low = rotated_low;
  high = rotated_high;
}

void RotateHead(float* x, const float* cos, const float* sin, int half) {
  int j = 0;
  for (; j + kLanes <= half; j += kLanes) {
    F low = Simd::Load(x + j), high = Simd::Load(x + half + j);
    RotatePair(low, high, Simd::Load(cos + j), Simd::Load(sin + j));
    Simd::Store(x + j, low);
    Simd::Store(x + half + j, high);
  }
  if (j < half) {
    const int rest = half - j;
    F low = LoadTail(x + j, rest), high = LoadTail(x + half + j, rest);
    RotatePair(low, high, LoadTail(cos + j, rest), LoadTail(sin + j, rest));
    StoreTail(DType::kF32, x, j, low, rest);
    StoreTail(DType::kF32, x, half + j, high, rest);
  }
}

constexpr ElementwiseKernel kElementwise = {RmsNormRow, WidenRow, NarrowRow, AddRow, SiluMulRow, RotateHead};

}  // namespace
}  // namespace kvshare::kernels
