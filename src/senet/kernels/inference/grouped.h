// 3×3 convolutions whose groups are narrower than a vector (ResNeXt's have 4 to 32 channels): a
// vector of outputs holds whole groups, and input j of each group is spread over its lanes, so that
// no lane multiplies by the zeros between groups.
#pragma once

#include <algorithm>
#include <utility>

#include "geometry.h"
#include "passes.h"
#include "product.h"

namespace senet {
namespace {

constexpr int kGroupedTile = 7;  // outputs side by side: maps of 56, 28, 14 and 7 have no remainder

// In every run of g lanes, lane j.
template <int g, int j, int... L>
SENET_INLINE V spread(V x, std::integer_sequence<int, L...>) {
  return shuffle<(L / g * g + j)...>(x, x);
}

// Input j of each group, one row of the kernel: weights[3][g][ld] → sums of kGroupedTile outputs.
template <int kStride, int g, int j>
SENET_INLINE void add_grouped(const float* const* pixels, int64_t c, const float* weights, int64_t ld,
                              V* sum) {
  constexpr int kPixels = (kGroupedTile - 1) * kStride + 3;
  V w[3];
  SENET_UNROLL(3)
  for (int k = 0; k < 3; ++k) w[k] = load<kWidth>(weights + (k * g + j) * ld);
  SENET_UNROLL(16)
  for (int p = 0; p < kPixels; ++p) {
    const V x = spread<g, j>(load<kWidth>(pixels[p] + c), std::make_integer_sequence<int, kWidth>{});
    SENET_UNROLL(3)
    for (int k = 0; k < 3; ++k)
      if (p >= k && (p - k) % kStride == 0 && (p - k) / kStride < kGroupedTile)
        sum[(p - k) / kStride] += x * w[k];
  }
}

template <int kStride, int g, int... j>
SENET_INLINE void add_grouped_row(const float* const* pixels, int64_t c, const float* weights,
                                  int64_t ld, V* sum, std::integer_sequence<int, j...>) {
  (add_grouped<kStride, g, j>(pixels, c, weights, ld, sum), ...);
}

// A task is one row of the output; weights [3][3][g][weights_ld], sums[N][OH][sums_ld].
template <int kStride, int g>
void grouped_row(const Step& s, int64_t task) {
  constexpr int kPixels = (kGroupedTile - 1) * kStride + 3;
  const int64_t n = task / s.OH, top = task % s.OH * kStride - s.pad_h;
  const bool positive = Activation(s.activation) == Activation::kRelu;
  for (int64_t left = 0; left < s.OW; left += kGroupedTile) {
    const float* pixels[3][kPixels];
    for (int i = 0; i < 3; ++i)
      for (int p = 0; p < kPixels; ++p) {
        const int64_t h = top + i, w = left * kStride - s.pad_w + p;
        const bool inside = h >= 0 && h < s.H && w >= 0 && w < s.W;
        pixels[i][p] = inside ? s.x + ((n * s.H + h) * s.W + w) * s.x_ld : kZeros;
      }
    const int64_t outputs = std::min<int64_t>(kGroupedTile, s.OW - left);
    for (int64_t c = 0; c < s.C; c += kWidth) {
      V sum[kGroupedTile];
      const V bias = load<kWidth>(s.bias + c);
      SENET_UNROLL(7)
      for (int t = 0; t < kGroupedTile; ++t) sum[t] = bias;
      for (int i = 0; i < 3; ++i)
        add_grouped_row<kStride, g>(pixels[i], c, s.weights + i * 3 * g * s.weights_ld + c,
                                    s.weights_ld, sum, std::make_integer_sequence<int, g>{});
      for (int64_t t = 0; t < outputs; ++t) {
        const V value = positive ? rectified(sum[t]) : sum[t];
        store_columns(s.y + (task * s.OW + left + t) * s.y_ld + c, value, s.C - c);
      }
    }
  }
  float* sums = s.sums ? s.sums + task * s.sums_ld : nullptr;
  finish_rows(ending_of(s, 0), s.y + task * s.OW * s.y_ld, s.y_ld, s.OW, s.C, sums, false);
}

template <int g>
SENET_INLINE void grouped_of_width(const Step& s, int64_t task) {
  s.stride_w == 1 ? grouped_row<1, g>(s, task) : grouped_row<2, g>(s, task);
}

void grouped(const Step& s, int64_t task) {
  switch (s.C / s.groups) {
    case 2:
      return grouped_of_width<2>(s, task);
    case 4:
      return grouped_of_width<4>(s, task);
    default:
      return grouped_of_width<std::min(8, kWidth)>(s, task);
  }
}

}  // namespace
}  // namespace senet
