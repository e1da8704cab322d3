// The excitation: two small matrix products and the gate, forward and backward (eq. 3 of the paper).
// Each function computes the part [begin, end) of one axis, so that the threads of the surrounding
// parallel region share the work without a reduction.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "operator/arguments.h"
#include "vector.h"

namespace senet {
namespace {

// Sums of neighbouring groups of kRun lanes of the vectors a and b: those of a's groups and of b's in
// turn.
template <int kRun, class A, int W, int... J>
SENET_INLINE Vector<A, W> add_neighbours(Vector<A, W> a, Vector<A, W> b,
                                         std::integer_sequence<int, J...>) {
  constexpr auto lane = [](int j) { return j / kRun % 2 * W + j / (2 * kRun) * 2 * kRun + j % kRun; };
  return shuffle<lane(J)...>(a, b) + shuffle<(lane(J) + kRun)...>(a, b);
}

// Lane i of the result is horizontal_sum(v[i]), to the bit: a vector's worth of sums at once.
template <class A, int W, int kRun = 1>
SENET_INLINE Vector<A, W> horizontal_sums(Vector<A, W>* v) {
  if constexpr (kRun < W) {
    for (int i = 0; i < W / (2 * kRun); ++i)
      v[i] = add_neighbours<kRun, A, W>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>{});
    return horizontal_sums<A, W, 2 * kRun>(v);
  }
  return v[0];
}

// out[n][j] = sum_k x[n][k] * w[j][k] + b[j] for j in [begin, end); rows of x and out are N.
template <int RN, int RJ, class A>
SENET_INLINE void dot_tile(const A* x, const A* w, const A* b, A* out, int64_t n, int64_t j, int64_t J,
                           int64_t K) {
  constexpr int W = kLanes<A>;
  Vector<A, W> sum[RN * RJ] = {};
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    Vector<A, W> wk[RJ];
    for (int q = 0; q < RJ; ++q) wk[q] = load<W>(w + (j + q) * K + k);
    for (int p = 0; p < RN; ++p) {
      const Vector<A, W> xk = load<W>(x + (n + p) * K + k);
      for (int q = 0; q < RJ; ++q) sum[p * RJ + q] += xk * wk[q];
    }
  }
  A total[RN * RJ];
  if constexpr (RN * RJ == W) {
    store(total, horizontal_sums<A, W>(sum));
  } else {
    for (int i = 0; i < RN * RJ; ++i) total[i] = horizontal_sum<A, W>(sum[i]);
  }
  for (; k < K; ++k)
    for (int p = 0; p < RN; ++p)
      for (int q = 0; q < RJ; ++q) total[p * RJ + q] += x[(n + p) * K + k] * w[(j + q) * K + k];
  for (int p = 0; p < RN; ++p)
    for (int q = 0; q < RJ; ++q) out[(n + p) * J + j + q] = total[p * RJ + q] + (b ? b[j + q] : A(0));
}

template <class A>
void linear(const A* x, const A* w, const A* b, A* out, int64_t N, int64_t J, int64_t K, int64_t begin,
            int64_t end) {
  constexpr int RN = std::min(4, kLanes<A>), RJ = kLanes<A> / RN;  // a vector of sums a tile
  int64_t n = 0;
  for (; n + RN <= N; n += RN) {
    int64_t j = begin;
    for (; j + RJ <= end; j += RJ) dot_tile<RN, RJ>(x, w, b, out, n, j, J, K);
    for (; j < end; ++j) dot_tile<RN, 1>(x, w, b, out, n, j, J, K);
  }
  for (; n < N; ++n) {
    int64_t j = begin;
    for (; j + 4 <= end; j += 4) dot_tile<1, 4>(x, w, b, out, n, j, J, K);
    for (; j < end; ++j) dot_tile<1, 1>(x, w, b, out, n, j, J, K);
  }
}

// out[i][k] = sum_r a(i, r) * b[r][k] for k in [begin, end), a(i, r) = a[i * step_i + r * step_r];
// rows of b and out have `width` entries.
template <int RI, int RV, int W, class A>
SENET_INLINE void outer_tile(const A* a, int64_t step_i, int64_t step_r, const A* b, A* out, int64_t i,
                             int64_t R, int64_t k, int64_t width) {
  Vector<A, W> sum[RI][RV] = {};
  for (int64_t r = 0; r < R; ++r) {
    Vector<A, W> row[RV];
    for (int v = 0; v < RV; ++v) row[v] = load<W>(b + r * width + k + v * W);
    for (int p = 0; p < RI; ++p) {
      const A factor = a[p * step_i + r * step_r];
      for (int v = 0; v < RV; ++v) sum[p][v] += row[v] * factor;
    }
  }
  for (int p = 0; p < RI; ++p)
    for (int v = 0; v < RV; ++v) {
      A* to = out + (i + p) * width + k + v * W;
      store(to, sum[p][v]);
    }
}

template <int RI, class A>
SENET_INLINE void outer_rows(const A* a, int64_t step_i, int64_t step_r, const A* b, A* out, int64_t i,
                             int64_t R, int64_t width, int64_t begin, int64_t end) {
  constexpr int W = kLanes<A>;
  // Read once for each k below: a column of a whose entries lie a row apart is copied together first.
  constexpr int64_t kPacked = 128;
  A packed[kPacked * RI];
  a += i * step_i;
  if (step_i == 1 && R <= kPacked) {
    for (int64_t r = 0; r < R; ++r)
      for (int p = 0; p < RI; ++p) packed[r * RI + p] = a[p + r * step_r];
    a = packed;
    step_r = RI;
  }
  int64_t k = begin;
  for (; k + 2 * W <= end; k += 2 * W)
    outer_tile<RI, 2, W>(a, step_i, step_r, b, out, i, R, k, width);
  for (; k + W <= end; k += W)
    outer_tile<RI, 1, W>(a, step_i, step_r, b, out, i, R, k, width);
  for (; k < end; ++k)
    outer_tile<RI, 1, 1>(a, step_i, step_r, b, out, i, R, k, width);
}

template <class A>
void combine(const A* a, int64_t step_i, int64_t step_r, const A* b, A* out, int64_t I, int64_t R,
             int64_t width, int64_t begin, int64_t end) {
  int64_t i = 0;
  for (; i + 4 <= I; i += 4)
    outer_rows<4>(a, step_i, step_r, b, out, i, R, width, begin, end);
  for (; i < I; ++i)
    outer_rows<1>(a, step_i, step_r, b, out, i, R, width, begin, end);
}

template <int W, class A>
SENET_INLINE void sigmoid_lanes(A* t) {
  if constexpr (std::is_same_v<A, float>) {
    const auto v = load<W>(t);
    store(t, 1.0f / (1.0f + exponential<W>(-v)));
  } else {
    for (int i = 0; i < W; ++i) t[i] = 1 / (1 + std::exp(-t[i]));
  }
}

// s = gate(t) in place.
template <class A>
void gate_forward(A* t, int64_t count, int gate) {
  constexpr int W = kLanes<A>;
  if (gate == kSigmoid || gate == kIdentitySigmoid) {
    int64_t i = 0;
    for (; i + W <= count; i += W) sigmoid_lanes<W>(t + i);
    for (; i < count; ++i) sigmoid_lanes<1>(t + i);
    if (gate == kIdentitySigmoid)
      for (i = 0; i < count; ++i) t[i] *= 2;
  } else if (gate == kTanh) {
    for (int64_t i = 0; i < count; ++i) t[i] = std::tanh(t[i]);
  } else if (gate == kRelu) {
    for (int64_t i = 0; i < count; ++i) t[i] = t[i] <= 0 ? A(0) : t[i];
  } else {  // hard sigmoid, min(max(t + 3, 0), 6) / 6; the order of the comparisons keeps a NaN
    for (int64_t i = 0; i < count; ++i) {
      A u = t[i] + 3;
      u = u < 0 ? A(0) : u;
      t[i] = (u > 6 ? A(6) : u) / 6;
    }
  }
}

// d gate / d t, written with the gate's value s.
template <int kGate, class A>
SENET_INLINE A gate_slope(A s) {
  if constexpr (kGate == kSigmoid) return s * (1 - s);
  if constexpr (kGate == kIdentitySigmoid) return s * (1 - s / 2);
  if constexpr (kGate == kTanh) return 1 - s * s;
  if constexpr (kGate == kRelu) return s <= 0 ? A(0) : A(1);
  return s > 0 && s < 1 ? A(1) / 6 : A(0);
}

template <int kGate, class A>
void scale_by_slope_of(A* ds, const A* s, int64_t count) {
  for (int64_t i = 0; i < count; ++i) ds[i] *= gate_slope<kGate>(s[i]);
}

// ds[i] *= d gate / d t at the gates s.
template <class A>
void scale_by_slope(A* ds, const A* s, int64_t count, int gate) {
  if (gate == kSigmoid) return scale_by_slope_of<kSigmoid>(ds, s, count);
  if (gate == kIdentitySigmoid) return scale_by_slope_of<kIdentitySigmoid>(ds, s, count);
  if (gate == kTanh) return scale_by_slope_of<kTanh>(ds, s, count);
  if (gate == kRelu) return scale_by_slope_of<kRelu>(ds, s, count);
  return scale_by_slope_of<kHardSigmoid>(ds, s, count);
}

}  // namespace
}  // namespace senet
