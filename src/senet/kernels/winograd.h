// What inference and training share of Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308), by Cook
// and Toom for the points 0, a, -a, b, -b and infinity.
#pragma once

#include "portability.h"

namespace senet {
namespace {

// With a b = 1 the coefficients stay near 1, and rounding errors small: of sums over 64 channels 5 times
// those of the plain sum (root mean square), and 11 times for the better known points 1 and 2.
constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;  // roots of 1/2 and 2
constexpr float kAA = 0.5f, kBB = 2.0f;

// The values at a, -a, b and -b of a polynomial, from its even and odd parts at a and b.
template <class V>
SENET_INLINE void at_points(V even_a, V odd_a, V even_b, V odd_b, V* out, int step = 1) {
  out[0] = even_a + odd_a;
  out[step] = even_a - odd_a;
  out[2 * step] = even_b + odd_b;
  out[3 * step] = even_b - odd_b;
}

// B'd along one axis, `step` between the entries.
template <class V>
SENET_INLINE void to_products(const V* d, V* out, int step = 1) {
  const V d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  out[0] = d[0] - (kAA + kBB) * d2 + d4;
  at_points(d4 - kBB * d2, kA * (d3 - kBB * d1), d4 - kAA * d2, kB * (d3 - kAA * d1), out + step, step);
  out[5 * step] = d1 - (kAA + kBB) * d3 + d[5 * step];
}

}  // namespace
}  // namespace senet
