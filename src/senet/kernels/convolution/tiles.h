// Register tiles: the two products that the convolutions are made of.
#pragma once

#include <utility>

#include "../vector.h"

namespace senet {
namespace {

constexpr int kWidth = kLanes<float>;
using V = Vector<float, kWidth>;

SENET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SENET_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Exchanges the blocks of kStep x kStep numbers off the diagonals of two rows kStep apart.
template <int kStep, int... I>
SENET_INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  const V first = shuffle<(I & kStep ? I - kStep + kWidth : I)...>(a, b);
  b = shuffle<(I & kStep ? I + kWidth : I + kStep)...>(a, b);
  a = first;
}

// Rows become columns.
template <int kStep = kWidth / 2>
SENET_INLINE void transpose(V (&rows)[kWidth]) {
  SENET_UNROLL(16)
  for (int i = 0; i < kWidth; ++i)
    if (!(i & kStep))
      exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kWidth>{});
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

// Adds the product of number i of each row with row i of w. A pointer for three rows, and two
// strides, address all rows without spilling.
template <int kRows, int kVectors>
SENET_INLINE void add_product(const float* const (&base)[(kRows + 2) / 3], int i, int64_t x_step,
                              const float* w, V (&sum)[kRows][kVectors]) {
  V g[kVectors];
  SENET_UNROLL(4)
  for (int v = 0; v < kVectors; ++v) g[v] = load<kWidth>(w + (i * kVectors + v) * kWidth);
  SENET_UNROLL(16)
  for (int r = 0; r < kRows; ++r) {
    const float* p = base[r / 3] + (r % 3 == 0 ? 0 : r % 3 == 1 ? x_step : 2 * x_step);
    const V value = p[i] - V{};  // folds to a broadcast, unlike a sum with zero
    SENET_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) sum[r][v] += value * g[v];
  }
}

// y[r][k] (+)= sum over i < depth of x[r * x_step + i] * w[i][k] for kRows rows and kVectors vectors;
// `first`: nothing is there to add to. depth is a multiple of 4.
template <int kRows, int kVectors>
void multiply(const float* x, int64_t x_step, int64_t depth, const float* w, float* y, int64_t y_step,
              bool first) {
  V sum[kRows][kVectors];
  SENET_UNROLL(16)
  for (int r = 0; r < kRows; ++r)
    SENET_UNROLL(4)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = first ? V{} : load<kWidth>(y + r * y_step + v * kWidth);
  const float* base[(kRows + 2) / 3];
  for (int b = 0; b < (kRows + 2) / 3; ++b) base[b] = x + 3 * b * x_step;
  for (int64_t i = 0; i < depth; i += 4) {
    add_product<kRows, kVectors>(base, 0, x_step, w, sum);
    add_product<kRows, kVectors>(base, 1, x_step, w, sum);
    add_product<kRows, kVectors>(base, 2, x_step, w, sum);
    add_product<kRows, kVectors>(base, 3, x_step, w, sum);
    for (int b = 0; b < (kRows + 2) / 3; ++b) base[b] += 4;
    w += 4 * kVectors * kWidth;
  }
  SENET_UNROLL(16)
  for (int r = 0; r < kRows; ++r)
    SENET_UNROLL(4)
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(y + r * y_step + v * kWidth, &sum[r][v], sizeof(V));
}

// sums[r][k] (+)= sum over positions of x[position][r] * y[position][k] for kRows rows and kVectors
// vectors; `first`: nothing is there to add to. Positions are x_step apart in x.
template <int kRows, int kVectors>
void add_outer_products(const float* x, int64_t x_step, int64_t positions, const float* y, float* sums,
                        int64_t sums_ld, bool first) {
  V sum[kRows][kVectors];
  SENET_UNROLL(16)
  for (int r = 0; r < kRows; ++r)
    SENET_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V{};
  for (int64_t position = 0; position < positions; ++position) {
    V g[kVectors];
    SENET_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) g[v] = load<kWidth>(y + v * kWidth);
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r) {
      const V value = x[r] - V{};
      SENET_UNROLL(4)
      for (int v = 0; v < kVectors; ++v) sum[r][v] += value * g[v];
    }
    x += x_step;
    y += kVectors * kWidth;
  }
  SENET_UNROLL(16)
  for (int r = 0; r < kRows; ++r)
    SENET_UNROLL(4)
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + r * sums_ld + v * kWidth;
      if (!first) sum[r][v] += load<kWidth>(to);
      std::memcpy(to, &sum[r][v], sizeof(V));
    }
}

using Multiply = void (*)(const float*, int64_t, int64_t, const float*, float*, int64_t, bool);
using AddOuterProducts = void (*)(const float*, int64_t, int64_t, const float*, float*, int64_t, bool);

template <int kVectors, int... kRows>
Multiply multiply_of(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr Multiply of[] = {multiply<kRows + 1, kVectors>...};
  return of[rows - 1];
}
template <int kVectors, int... kRows>
AddOuterProducts outer_products_of(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr AddOuterProducts of[] = {add_outer_products<kRows + 1, kVectors>...};
  return of[rows - 1];
}

// For 1 to kRows rows.
template <int kRows, int kVectors>
Multiply multiply_of(int64_t rows) {
  return multiply_of<kVectors>(rows, std::make_integer_sequence<int, kRows>{});
}
template <int kRows, int kVectors>
AddOuterProducts outer_products_of(int64_t rows) {
  return outer_products_of<kVectors>(rows, std::make_integer_sequence<int, kRows>{});
}

// Calls f with the rows and vectors of a register tile for `outputs` columns, as two constants.
template <class F>
auto with_tile(int64_t outputs, const F& f) {
  using std::integral_constant;
#if SENET_REGISTERS == 32
  if (outputs <= kWidth) return f(integral_constant<int, 12>{}, integral_constant<int, 1>{});
  if (outputs <= 2 * kWidth) return f(integral_constant<int, 12>{}, integral_constant<int, 2>{});
  return f(integral_constant<int, 6>{}, integral_constant<int, 4>{});
#else
  (void)outputs;
  return f(integral_constant<int, 6>{}, integral_constant<int, 2>{});
#endif
}

}  // namespace
}  // namespace senet
