// Storage types, and vectors of the widest kind that the instruction set of this translation unit has.
#pragma once

#include <type_traits>

#include "portability.h"

namespace senet {
namespace {

struct bfloat16 {
  uint16_t bits;
};

// What a sum of elements of T is kept in; also the type of all parameters.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<bfloat16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

SENET_INLINE float widen(float v) { return v; }
SENET_INLINE double widen(double v) { return v; }
SENET_INLINE float widen(bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <class A, int W>
using Vector = typename VectorOf<A, W>::type;

// Lanes of a full vector of accumulation type A. Storage narrower than A (bfloat16) has as many.
template <class A>
constexpr int kLanes = SENET_VECTOR_BYTES / int(sizeof(A));

template <class A, int W>
SENET_INLINE Vector<A, W> splat(A value) {
  return Vector<A, W>{} + value;
}

template <int W>
SENET_INLINE Vector<float, W> load(const float* from) {
  Vector<float, W> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <int W>
SENET_INLINE Vector<double, W> load(const double* from) {
  Vector<double, W> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <int W>
SENET_INLINE Vector<float, W> load(const bfloat16* from) {
  Vector<uint16_t, W> half;
  std::memcpy(&half, from, sizeof half);
  const auto bits = converted<Vector<uint32_t, W>>(half) << 16;
  Vector<float, W> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Rounds to nearest even; a NaN stays one (its payload may lie in the bits that are cut off).
template <int W>
SENET_INLINE Vector<uint16_t, W> narrow(Vector<float, W> v) {
  Vector<uint32_t, W> bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Vector<uint32_t, W> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vector<uint32_t, W> quiet_nan = Vector<uint32_t, W>{} + 0x7fc0u;
  return converted<Vector<uint16_t, W>>(v == v ? rounded : quiet_nan);
}

template <class T, class V>
SENET_INLINE void store(T* to, const V& v, bool streams = false) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto half = narrow<int(sizeof(V) / sizeof(float))>(v);
    streams ? stream(to, half) : void(std::memcpy(to, &half, sizeof half));
  } else {
    streams ? stream(to, v) : void(std::memcpy(to, &v, sizeof v));
  }
}

template <class A, int W>
SENET_INLINE A horizontal_sum(Vector<A, W> v) {
  A lane[W];
  std::memcpy(lane, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[2 * i] + lane[2 * i + 1];
  return lane[0];
}

// max(v, 0) as PyTorch defines it: NaN passes through.
template <class V>
SENET_INLINE V relu(V v) {
  return v <= 0 ? V{} : v;
}

// The gradient that passes a relu with output y: that of threshold_backward, NaN passes.
template <class V>
SENET_INLINE V relu_gradient(V gradient, V y) {
  return y <= 0 ? V{} : gradient;
}

// exp with a relative error below 2e-7 in float32: 2^n * p(r), r in [-ln2/2, ln2/2] (Cephes' split of
// ln 2 and a Taylor polynomial of degree 7). Arguments are clamped so that 2^n stays normal: the
// gates use exp only in 1 / (1 + exp(-t)), whose float32 value is then correct to rounding.
template <int W>
SENET_INLINE Vector<float, W> exponential(Vector<float, W> x) {
  using V = Vector<float, W>;
  using I = Vector<int32_t, W>;
  const V low = splat<float, W>(-87.0f), high = splat<float, W>(88.0f);
  V clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  clamped = x == x ? clamped : V{};
  const V shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to nearest
  const V n = shifted - 12582912.0f;
  const V r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I exponent = (converted<I>(n) + 127) << 23;
  V power;
  std::memcpy(&power, &exponent, sizeof power);
  return x == x ? p * power : x;
}

}  // namespace
}  // namespace senet
