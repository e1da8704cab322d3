// Grouped convolutions whose groups fill a vector and a half, or one alone: two groups side by side. In
// the copy of their rows, over which the product slides, the inputs of the two alternate, so that one
// broadcast of 64 bits is an input of the first group in the even lanes and of the second in the odd
// ones. 24 channels of two groups are three vectors without an idle lane, and one broadcast is used
// for two vectors where a group of 16 would need it for one.
#pragma once

#include <algorithm>
#include <utility>

#include "sliding.h"

namespace senet {
namespace {

using Doubles = Vector<double, kWidth / 2>;

// The two inputs at p in alternating lanes.
SENET_INLINE V alternating(const float* p) {
  double both;
  std::memcpy(&both, p, sizeof both);
  return reinterpret_cast<V>(both - Doubles{});  // folds to a broadcast
}

// Every second lane of a and b behind each other, from lane `first` on.
template <int first, int... I>
SENET_INLINE V every_second(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(2 * I + first)...>(a, b);
}

// Half of a and half of b from lane `first` on, in turns.
template <int first, int... I>
SENET_INLINE V in_turns(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(first + I / 2 + I % 2 * kWidth)...>(a, b);
}

// A tile of outputs of two groups; the second one's lie `apart` behind the first one's. lda: floats
// from a row to the next, 2 from an input to the next.
struct Pair {
  const float *a, *weights, *bias;
  float* y;
  int64_t lda, y_ld, apart, columns;  // columns: of each group
  Depth depth;
  bool positive;
};

template <int kRows, int kVectors>
void pair_tile(const Pair& t) {
  V sum[kRows][kVectors];
  SENET_UNROLL(2)
  for (int v = 0; v < kVectors; ++v) {
    const V bias = load<kWidth>(t.bias + v * kWidth);
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r) sum[r][v] = bias;
  }
  const float* w = t.weights;
  for (int64_t i = 0; i < t.depth.slices; ++i) {
    const float* base[(kRows + 2) / 3];
    SENET_UNROLL(6)
    for (int r = 0; r < (kRows + 2) / 3; ++r) base[r] = t.a + i * t.depth.step + 3 * r * t.lda;
    const int64_t lda2 = 2 * t.lda;
    for (int64_t k = 0; k < t.depth.depth; ++k, w += kPanel) {
      V taps[kVectors];
      SENET_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) taps[v] = load<kWidth>(w + v * kWidth);
      SENET_UNROLL(16)
      for (int r = 0; r < kRows; ++r) {
        const V x = alternating(base[r / 3] + (r % 3 == 0 ? 0 : r % 3 == 1 ? t.lda : lda2) + 2 * k);
        SENET_UNROLL(2)
        for (int v = 0; v < kVectors; ++v) add_to(sum[r][v], x, taps[v]);
      }
    }
  }
  constexpr auto kAll = std::make_integer_sequence<int, kWidth>{};
  SENET_UNROLL(16)
  for (int r = 0; r < kRows; ++r) {
    if (t.positive)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = rectified(sum[r][v]);
    const V last = sum[r][kVectors - 1];
    const V first = every_second<0>(sum[r][0], last, kAll);
    const V second = every_second<1>(sum[r][0], last, kAll);
    store_columns(t.y + r * t.y_ld, first, t.columns);
    store_columns(t.y + r * t.y_ld + t.apart, second, t.columns);
  }
}

template <int kVectors, int... kRows>
void run_pair_tile(int64_t rows, const Pair& t, std::integer_sequence<int, kRows...>) {
  static constexpr void (*tiles[])(const Pair&) = {pair_tile<kRows + 1, kVectors>...};
  tiles[rows - 1](t);
}

// Rows of outputs in tiles of nearly equal height.
SENET_INLINE void pair_product(Pair t, int64_t rows) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t here = rows * (i + 1) / tiles - rows * i / tiles;
    2 * t.columns > kWidth ? run_pair_tile<2>(here, t, Rows{}) : run_pair_tile<1>(here, t, Rows{});
    t.a += here * t.lda;
    t.y += here * t.y_ld;
  }
}

// As copy_rows of the channels [c, c + 2 * channels), those of the two halves in turns.
SENET_INLINE void copy_pairs(const Step& s, int64_t n, int64_t top, int64_t rows, int64_t c,
                             int64_t channels, float* to) {
  constexpr int kHalf = kWidth / 2;
  constexpr auto kAll = std::make_integer_sequence<int, kWidth>{};
  const int64_t width = sliding_width(s), before = std::min(s.pad_w, width), pixel = 2 * channels;
  const int64_t inside = std::min(s.W, width - before);
  for (int64_t h = top; h < top + rows; ++h, to += width * pixel) {
    if (h < 0 || h >= s.H) {
      clear_over(to, width * pixel);
      continue;
    }
    clear_over(to, before * pixel);
    const float* from = s.x + (n * s.H + h) * s.W * s.x_ld + c;
    for (int64_t w = 0; w < inside; ++w, from += s.x_ld)
      for (int64_t k = 0; k < channels; k += kWidth) {
        const V a = load<kWidth>(from + k), b = load<kWidth>(from + channels + k);
        float* here = to + (before + w) * pixel + 2 * k;
        store(here, in_turns<0>(a, b, kAll));
        store(here + kWidth, in_turns<kHalf>(a, b, kAll));
      }
    clear_over(to + (before + inside) * pixel, (width - before - inside) * pixel);
  }
}

SENET_INLINE int64_t group_pairs(const Step& s) { return ceil_div(s.groups, 2); }
SENET_INLINE int64_t pair_parts(const Step& s) { return ceil_div(group_pairs(s), s.panels); }

int64_t paired_tasks(const Step& s) { return s.N * ceil_div(s.OH, s.rows) * pair_parts(s); }

// The last group of an odd number, as a convolution of its own whose weights are behind the pairs'.
SENET_INLINE void run_last_group(Step s, int64_t rows_task, const float* weights, const float* bias,
                                 float* scratch) {
  const int64_t channels = s.C / s.groups, outputs = s.OC / s.groups, out = s.OC - outputs;
  s.x += s.C - channels;
  s.y += out;
  s.weights = weights;
  s.bias = bias;
  if (s.slopes) s.slopes += out;
  if (s.sums) s.sums += out;
  s.C = channels;
  s.OC = outputs;
  s.groups = 1;
  s.panels = group_panels(s);
  sliding(s, rows_task, scratch);
}

// A task is `rows` rows of the output of an image and `panels` pairs of groups. Weights: the panels of
// each pair, its outputs in turns, and those of a last group that has no other.
void paired(const Step& s, int64_t task, float* scratch) {
  const int64_t parts = pair_parts(s), blocks = ceil_div(s.OH, s.rows);
  const int64_t part = task % parts, block = task / parts % blocks, n = task / parts / blocks;
  const int64_t top = s.OH * block / blocks, lines = s.OH * (block + 1) / blocks - top;
  const int64_t channels = s.C / s.groups, outputs = s.OC / s.groups;
  const int64_t row = 2 * sliding_width(s) * channels, panels = ceil_div(2 * outputs, kPanel);
  const int64_t rows = (lines - 1) * s.stride_h + s.kernel_h, pixel = (n * s.OH + top) * s.OW;
  const Depth depth = {s.kernel_w * channels, s.kernel_h, row};
  const int64_t last = std::min((part + 1) * s.panels, group_pairs(s));
  const bool positive = Activation(s.activation) == Activation::kRelu;
  for (int64_t pair = part * s.panels; pair < last; ++pair) {
    const float* weights = s.weights + pair * panels * depth.depth * depth.slices * kPanel;
    const float* bias = s.bias + pair * panels * kPanel;
    if (2 * pair + 1 == s.groups) {
      run_last_group(s, n * blocks + block, weights, bias, scratch);
      break;
    }
    copy_pairs(s, n, top * s.stride_h - s.pad_h, rows, 2 * pair * channels, channels, scratch);
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t column = i * kWidth, columns = std::min<int64_t>(kWidth, outputs - column);
      Pair t = {scratch, weights + i * depth.depth * depth.slices * kPanel, bias + i * kPanel, nullptr,
                s.stride_w * 2 * channels, s.y_ld, outputs, columns, depth, positive};
      for (int64_t line = 0; line < lines; ++line) {
        t.a = scratch + line * s.stride_h * row;
        t.y = s.y + (pixel + line * s.OW) * s.y_ld + 2 * pair * outputs + column;
        pair_product(t, s.OW);
      }
    }
    const int64_t out = 2 * pair * outputs;
    float* sums = s.sums ? s.sums + (n * blocks + block) * s.sums_ld + out : nullptr;
    finish_rows(ending_of(s, out), s.y + pixel * s.y_ld + out, s.y_ld, lines * s.OW, 2 * outputs, sums,
                false);
  }
}

}  // namespace
}  // namespace senet
