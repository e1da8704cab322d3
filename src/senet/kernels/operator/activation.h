// The activations of a tail, a join and a gate's hidden layer: value and derivative of a vector.
#pragma once

#include <cmath>

#include "../vector.h"
#include "arguments.h"

namespace senet {
namespace {

// Where v(u) = v'(u) u, the sums of a gradient times v' and v' u give those of a gradient times v.
constexpr bool homogeneous(int activation) {
  return activation == kActLinear || activation == kActRelu || activation == kActLeakyRelu;
}

template <int W>
SENET_INLINE Vector<float, W> exponential_of(Vector<float, W> u) {
  return exponential<W>(u);
}
template <int W>
SENET_INLINE Vector<double, W> exponential_of(Vector<double, W> u) {
  for (int i = 0; i < W; ++i) u[i] = std::exp(u[i]);
  return u;
}

template <int W, class V>
SENET_INLINE V logistic(V u) {
  return 1 / (1 + exponential_of<W>(-u));
}

// The normal distribution function; `bell` is exp(-u^2 / 2). In float32 formula 7.1.26 of Abramowitz
// and Stegun for erfc, off by less than 1e-7.
template <int W>
SENET_INLINE Vector<float, W> normal(Vector<float, W> u, Vector<float, W> bell) {
  const Vector<float, W> x = (u < 0 ? -u : u) * 0.70710678f, t = 1 / (1 + 0.3275911f * x);
  Vector<float, W> p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vector<float, W> tail = 0.5f * (p * t) * bell;
  return u < 0 ? tail : 1 - tail;
}
template <int W>
SENET_INLINE Vector<double, W> normal(Vector<double, W> u, Vector<double, W>) {
  for (int i = 0; i < W; ++i) u[i] = std::erfc(-u[i] * 0.70710678118654752440) / 2;
  return u;
}

// The activation of u. A NaN stays one, as in PyTorch.
template <int kActivation, int W, class A>
SENET_INLINE Vector<A, W> activate(Vector<A, W> u, A negative_slope) {
  using V = Vector<A, W>;
  if constexpr (kActivation == kActRelu) return relu<V>(u);
  if constexpr (kActivation == kActRelu6) {
    const V v = relu<V>(u);
    return v > 6 ? splat<A, W>(6) : v;
  }
  if constexpr (kActivation == kActLeakyRelu) return u > 0 ? u : u * negative_slope;
  if constexpr (kActivation == kActSilu) return u * logistic<W>(u);
  if constexpr (kActivation == kActHardswish) {
    V gate = relu<V>(u + 3);
    gate = gate > 6 ? splat<A, W>(6) : gate;
    return u * gate * (A(1) / 6);
  }
  if constexpr (kActivation == kActGelu) return u * normal<W>(u, exponential_of<W>(u * u * A(-0.5)));
  return u;
}

// The activation's derivative at u; its value goes to v where `v` is wanted.
template <int kActivation, int W, class A>
SENET_INLINE Vector<A, W> derivative(Vector<A, W> u, A negative_slope, Vector<A, W>& v) {
  using V = Vector<A, W>;
  const V zero{}, one = splat<A, W>(1);
  if constexpr (kActivation == kActSilu) {
    const V s = logistic<W>(u);
    v = u * s;
    return s + v * (1 - s);
  } else if constexpr (kActivation == kActGelu) {
    const V bell = exponential_of<W>(u * u * A(-0.5)), p = normal<W>(u, bell);
    v = u * p;
    return p + u * (bell * A(0.39894228040143267794));
  } else {
    v = activate<kActivation, W>(u, negative_slope);
    if constexpr (kActivation == kActRelu) return u <= 0 ? zero : one;
    if constexpr (kActivation == kActRelu6) return u <= 0 ? zero : u >= 6 ? zero : one;
    if constexpr (kActivation == kActLeakyRelu) return u > 0 ? one : splat<A, W>(negative_slope);
    if constexpr (kActivation == kActHardswish) {
      const V inner = u * (A(1) / 3) + A(0.5);
      return u <= -3 ? zero : u >= 3 ? one : inner;
    }
    return one;
  }
}

// A gradient times the derivative; where that is zero by definition, whatever the gradient is.
template <int kActivation, class V>
SENET_INLINE V through(V gradient, V derivative) {
  if constexpr (kActivation == kActLinear) return gradient;
  if constexpr (kActivation == kActRelu || kActivation == kActRelu6)
    return derivative == 0 ? V{} : gradient;
  return gradient * derivative;
}

// Calls f with the activation as a compile-time constant.
template <class F>
SENET_INLINE void with_activation(int64_t activation, const F& f) {
  switch (activation) {
    case kActRelu: return f(std::integral_constant<int, kActRelu>{});
    case kActRelu6: return f(std::integral_constant<int, kActRelu6>{});
    case kActSilu: return f(std::integral_constant<int, kActSilu>{});
    case kActHardswish: return f(std::integral_constant<int, kActHardswish>{});
    case kActGelu: return f(std::integral_constant<int, kActGelu>{});
    case kActLeakyRelu: return f(std::integral_constant<int, kActLeakyRelu>{});
    default: return f(std::integral_constant<int, kActLinear>{});
  }
}

// The activation of u, where it is known when the kernel runs.
template <int W, class A>
SENET_INLINE Vector<A, W> activated(Vector<A, W> u, int64_t activation, A negative_slope) {
  with_activation(activation, [&](auto kind) {
    u = activate<decltype(kind)::value, W>(u, negative_slope);
  });
  return u;
}

// The gradient of u from that of its activation, likewise.
template <int W, class A>
SENET_INLINE Vector<A, W> gradient_through(Vector<A, W> gradient, Vector<A, W> u, int64_t activation,
                                           A negative_slope) {
  with_activation(activation, [&](auto kind) {
    constexpr int k = decltype(kind)::value;
    Vector<A, W> value;
    gradient = through<k>(gradient, derivative<k, W>(u, negative_slope, value));
  });
  return gradient;
}

}  // namespace
}  // namespace senet
