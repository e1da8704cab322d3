// The activations, a few units in the last place from the exact value.
//
// Bounds that hold for all magnitudes of float32 (tests/inference/test_activations.py), in units in
// the last place of the exact value: 3 for what needs no exponential, 4 for the rest, but 7 for GELU
// and 4 + 6|v| for GELU by tanh, v the tanh's argument, whose rounding the exponential multiplies.
// Values below 2^-120 may become zero. ±infinity and NaN give what PyTorch gives.
#pragma once

#include "../vector.h"
#include "step.h"

namespace senet {
namespace {

constexpr int kWidth = kLanes<float>;
using V = Vector<float, kWidth>;
using Bits = Vector<int32_t, kWidth>;

SENET_INLINE void store_columns(float* to, V v, int64_t columns) {
  if (columns >= kWidth)
    std::memcpy(to, &v, sizeof v);
  else if (columns > 0)
    store_lanes(to, v, columns);
}

// What ends a step: the function, its number, and a PReLU's slopes from the first column on.
struct Ending {
  Activation activation;
  float parameter;
  const float* slopes;
};

SENET_INLINE Ending ending_of(const Step& s, int64_t column) {
  return {Activation(s.activation), float(s.parameter), s.slopes ? s.slopes + column : nullptr};
}

// Those that cost an instruction or none, which the convolutions apply in registers; `activate` does
// the others where the outputs lie, in the first-level cache.
SENET_INLINE bool in_registers(const Ending& e) { return e.activation <= Activation::kRelu; }

SENET_INLINE Bits bits_of(V v) { return reinterpret_cast<Bits>(v); }
SENET_INLINE V magnitude(V x) { return reinterpret_cast<V>(bits_of(x) & 0x7fffffff); }
SENET_INLINE V with_sign_of(V positive, V x) {
  return reinterpret_cast<V>(bits_of(positive) | (bits_of(x) & int32_t(0x80000000)));
}
// max(x, 0) in one instruction; a NaN stays one.
SENET_INLINE V rectified(V x) { return larger(V{}, x); }
SENET_INLINE V at_least(V x, float low) { return larger(V{} + low, x); }
SENET_INLINE V at_most(V x, float high) { return smaller(V{} + high, x); }

// e^x = power * (1 + fraction). The power of two becomes 0 below -87.6 and infinity above 88.3.
// Reduction by ln 2 in two parts as in Cephes; a polynomial fitted to (e^r - 1) / r with an error of
// 4e-8 of it where r is small, and of 2e-9 of e^r anywhere.
struct Exponential {
  V power, fraction;
  V value() const { return power * (fraction + 1.0f); }
  V plus_one() const { return power * (fraction + 1.0f) + 1.0f; }
};
struct Reduced {
  V power, rest;
};
SENET_INLINE Reduced reduced(V x) {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 rounds; 127: the exponent's bias
  x = at_most(at_least(x, -88.0f), 89.0f);
  const V shifted = x * 1.44269504088896341f + kRound;
  const V n = shifted - kRound;
  return {reinterpret_cast<V>(bits_of(shifted) << 23), (x - n * 0.693359375f) - n * -2.12194440e-4f};
}
SENET_INLINE Exponential exponential_of(Reduced x) {
  const V r = x.rest;
  V p = r * 0.001384360599f + 0.008374195775f;
  p = p * r + 0.04166800475f;
  p = p * r + 0.166664308f;
  p = p * r + 0.4999999419f;
  p = p * r + 1.0f;
  return {x.power, r * p};
}
SENET_INLINE Exponential exponential_of(V x) { return exponential_of(reduced(x)); }

// Below 0.625 Cephes' polynomial (tanhf).
SENET_INLINE V hyperbolic_tangent(V x) {
  const V a = magnitude(x), z = x * x;
  V p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const V large = 1.0f - 2.0f * reciprocal(exponential_of(a + a).plus_one());
  return a < 0.625f ? x + x * (z * p) : with_sign_of(large, x);
}

// x times the normal distribution's probability below x: relu(x) - |x| * P(below -|x|). That is
// e^(-a²/2) times a polynomial in 1 / (1 + 0.26 a), fitted to erfcx (scipy) with an error of 3e-8 up
// to a = 14.5. The square is exact: a's upper half squared, and the rest of it.
SENET_INLINE V gelu(V x) {
  const V a = at_most(magnitude(x), 14.5f);
  const V upper = reinterpret_cast<V>(bits_of(a) & int32_t(0xfffff000));
  const V u = reciprocal(1.0f + 0.26f * a);
  V p = u * 0.03023058186f - 0.1514957182f;
  p = p * u + 0.2487356784f;
  p = p * u - 0.1477919733f;
  p = p * u + 0.1587604408f;
  p = p * u + 0.05196416242f;
  p = p * u + 0.1027888369f;
  p = p * u + 0.103050954f;
  p = p * u + 0.1037570232f;
  Reduced exponent = reduced(-0.5f * (upper * upper));
  exponent.rest -= 0.5f * ((a - upper) * (a + upper));
  const V below = p * u * exponential_of(exponent).value();
  return x > 14.0f ? x : rectified(x) - magnitude(x) * below;
}

// relu6(x + 3) / 6. A sixth in two parts: the nearest float32 is 3e-8 too large, always, and layer
// after layer multiplies that. Where additions are not fused with products, they round once more.
SENET_INLINE V hard_sigmoid(V x) {
  const V clipped = at_most(at_least(x + 3.0f, 0.0f), 6.0f);
  if constexpr (kWidth == 4) return clipped / 6.0f;
  return clipped * (1.0f / 6) + clipped * -4.967053e-9f;
}

template <Activation kActivation>
SENET_INLINE V activated(V x, float parameter, const float* slopes) {
  using A = Activation;
  if constexpr (kActivation == A::kRelu) return rectified(x);
  if constexpr (kActivation == A::kRelu6) return at_most(at_least(x, 0.0f), 6.0f);
  if constexpr (kActivation == A::kLeakyRelu) return x > 0 ? x : x * parameter;
  if constexpr (kActivation == A::kPrelu) return x > 0 ? x : x * load<kWidth>(slopes);
  if constexpr (kActivation == A::kElu) {
    const Exponential e = exponential_of(x);
    return x > 0 ? x : parameter * (e.power * e.fraction + (e.power - 1.0f));
  }
  if constexpr (kActivation == A::kSilu) return x * reciprocal(exponential_of(-x).plus_one());
  if constexpr (kActivation == A::kHardswish) return x * hard_sigmoid(x);
  if constexpr (kActivation == A::kMish) {  // tanh(ln(1 + w)) is (w² + 2w) / (w² + 2w + 2)
    const V w = exponential_of(at_most(x, 20.0f)).value();
    const V q = w * w + 2.0f * w;
    return x * (q * reciprocal(q + 2.0f));
  }
  if constexpr (kActivation == A::kGelu) return gelu(x);
  if constexpr (kActivation == A::kGeluTanh)  // tanh(v) is 2 sigmoid(2v) - 1
    return x * reciprocal(exponential_of(x * (x * x * -0.0713548162726f - 1.59576912160573f)).plus_one());
  if constexpr (kActivation == A::kSigmoid) return reciprocal(exponential_of(-x).plus_one());
  if constexpr (kActivation == A::kHardsigmoid) return hard_sigmoid(x);
  if constexpr (kActivation == A::kTanh) return hyperbolic_tangent(x);
  if constexpr (kActivation == A::kIdentitySigmoid) return 2.0f * reciprocal(exponential_of(-x).plus_one());
  return x;
}

template <Activation kActivation>
void activate_rows(const Ending& e, float* y, int64_t ld, int64_t rows, int64_t columns) {
  const float parameter = e.parameter;
  for (int64_t r = 0; r < rows; ++r, y += ld)
    for (int64_t c = 0; c < columns; c += kWidth)
      store_columns(y + c, activated<kActivation>(load<kWidth>(y + c), parameter, e.slopes + c),
                    columns - c);
}

// y[rows][columns] in place. One function for all: a switch at each tile, none at each element.
void activate(const Ending& e, float* y, int64_t ld, int64_t rows, int64_t columns) {
  switch (e.activation) {
#define SENET_ACTIVATION(name) \
  case Activation::name:       \
    return activate_rows<Activation::name>(e, y, ld, rows, columns);
    SENET_ACTIVATION(kRelu)
    SENET_ACTIVATION(kRelu6)
    SENET_ACTIVATION(kLeakyRelu)
    SENET_ACTIVATION(kPrelu)
    SENET_ACTIVATION(kElu)
    SENET_ACTIVATION(kSilu)
    SENET_ACTIVATION(kHardswish)
    SENET_ACTIVATION(kMish)
    SENET_ACTIVATION(kGelu)
    SENET_ACTIVATION(kGeluTanh)
    SENET_ACTIVATION(kSigmoid)
    SENET_ACTIVATION(kHardsigmoid)
    SENET_ACTIVATION(kTanh)
    SENET_ACTIVATION(kIdentitySigmoid)
#undef SENET_ACTIVATION
    case Activation::kLinear:
      return;
  }
}

}  // namespace
}  // namespace senet
