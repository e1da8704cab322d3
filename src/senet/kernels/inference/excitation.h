// The products of the excitation: a few vectors times packed weights, summed in float64. A gate's
// input is a difference of large numbers where features are large, and its rounding is multiplied
// into every pixel of a channel; the products are small, so the care costs nothing measurable.
#pragma once

#include <algorithm>

#include "geometry.h"
#include "product.h"

namespace senet {
namespace {

constexpr int kHalf = kWidth / 2;
using D = Vector<double, kHalf>;

SENET_INLINE D widen(const float* from) {
  return converted<D>(load<kHalf>(from));
}

// Rows [0, kRows) of x times the first kParts parts of a panel, plus the bias. Several sums of each
// output hide the latency of an addition.
template <int kRows, int kParts>
void excitation_rows(const Step& s, const float* x, const float* weights, const float* bias, float* y,
                     int64_t columns) {
  constexpr int kSums = std::max(1, 4 / (kRows * kParts));
  D sum[kSums][kRows][kParts] = {};
  const auto add = [&](int64_t k, D(&to)[kRows][kParts]) {
    D w[kParts];
    for (int v = 0; v < kParts; ++v) w[v] = widen(weights + k * kPanel + v * kHalf);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kParts; ++v) to[r][v] += double(x[r * s.x_ld + k]) * w[v];
  };
  int64_t k = 0;
  for (; k + kSums <= s.C; k += kSums)
    for (int u = 0; u < kSums; ++u) add(k + u, sum[u]);
  for (; k < s.C; ++k) add(k, sum[0]);
  for (int r = 0; r < kRows; ++r) {
    float row[kParts * kHalf];
    for (int v = 0; v < kParts; ++v) {
      D total = widen(bias + v * kHalf);
      for (int u = 0; u < kSums; ++u) total += sum[u][r][v];
      store(row + v * kHalf, converted<Vector<float, kHalf>>(total));
    }
    copy(y + r * s.y_ld, row, columns);
  }
}

template <int kRows>
SENET_INLINE void excitation_panel(const Step& s, const float* x, const float* weights,
                                   const float* bias, float* y, int64_t columns) {
  const auto rows = columns <= kHalf       ? excitation_rows<kRows, 1>
                    : columns <= 2 * kHalf ? excitation_rows<kRows, 2>
                                           : excitation_rows<kRows, 4>;
  rows(s, x, weights, bias, y, columns);
}

int64_t excitation_tasks(const Step& s) { return ceil_div(s.N, s.images) * ceil_div(s.OC, kPanel); }

// y = activation(x * weights + bias) for vectors; a task is one panel for `images` images.
void excitation(const Step& s, int64_t task) {
  constexpr int kRows = kWidth >= 16 ? 4 : 2;  // as many sums as there are registers
  const int64_t panels = ceil_div(s.OC, kPanel), panel = task % panels;
  const int64_t columns = std::min<int64_t>(kPanel, s.OC - panel * kPanel);
  const float *weights = s.weights + panel * s.C * kPanel, *bias = s.bias + panel * kPanel;
  const int64_t begin = task / panels * s.images, end = std::min(s.N, begin + s.images);
  for (int64_t n = begin; n < end;) {
    const int64_t here = end - n >= kRows ? kRows : 1;
    float* y = s.y + n * s.y_ld + panel * kPanel;
    const auto run = here == kRows ? excitation_panel<kRows> : excitation_panel<1>;
    run(s, s.x + n * s.x_ld, weights, bias, y, columns);
    activate(ending_of(s, panel * kPanel), y, s.y_ld, here, columns);
    n += here;
  }
}

}  // namespace
}  // namespace senet
