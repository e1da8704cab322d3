// Passes over maps that are no convolution: input, pooling, the sums of the squeeze, what remains of
// elementwise work.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "geometry.h"
#include "product.h"

namespace senet {
namespace {

// Vector `v` of three channels side by side: lane i has pixel (v * kWidth + i) / 3 of channel
// (v * kWidth + i) % 3.
template <int v, int... I>
SENET_INLINE V interleaved(V red, V green, V blue, std::integer_sequence<int, I...>) {
  const V two = shuffle<((v * kWidth + I) / 3 + (v * kWidth + I) % 3 % 2 * kWidth)...>(red, green);
  return shuffle<((v * kWidth + I) % 3 == 2 ? (v * kWidth + I) / 3 + kWidth : I)...>(two, blue);
}

// Whole vectors of a row of pixels of three channels, each a row of numbers; how many pixels.
SENET_INLINE int64_t interleave(const float* from, int64_t channel, int64_t pixels, float* to) {
  constexpr auto kAll = std::make_integer_sequence<int, kWidth>{};
  int64_t w = 0;
  for (; w + kWidth <= pixels; w += kWidth, from += kWidth, to += 3 * kWidth) {
    const V red = load<kWidth>(from), green = load<kWidth>(from + channel);
    const V blue = load<kWidth>(from + 2 * channel);
    store(to, interleaved<0>(red, green, blue, kAll));
    store(to + kWidth, interleaved<1>(red, green, blue, kAll));
    store(to + 2 * kWidth, interleaved<2>(red, green, blue, kAll));
  }
  return w;
}

// The network's input with any strides to channels_last; a task is one row of the image.
void read_input(const Step& s, int64_t task) {
  const int64_t n = task / s.H, h = task % s.H;
  const float* from = s.x + n * s.strides[0] + h * s.strides[2];
  float* to = s.y + task * s.W * s.y_ld;
  if (s.strides[1] == 1 && s.strides[3] == s.C && s.y_ld == s.C) return copy(to, from, s.W * s.C);
  int64_t done = 0;
  if (s.C == 3 && s.y_ld == 3 && s.strides[3] == 1) done = interleave(from, s.strides[1], s.W, to);
  for (int64_t c = 0; c < s.C; ++c)
    for (int64_t w = done; w < s.W; ++w)
      to[w * s.y_ld + c] = from[c * s.strides[1] + w * s.strides[3]];
}

// A task is one row of the output.
template <bool kMax>
void pool(const Step& s, int64_t task) {
  const int64_t n = task / s.OH, top = task % s.OH * s.stride_h - s.pad_h;
  const int64_t bottom = std::min(top + s.kernel_h, s.H + s.pad_h);
  for (int64_t ow = 0; ow < s.OW; ++ow) {
    const int64_t left = ow * s.stride_w - s.pad_w;
    const int64_t right = std::min(left + s.kernel_w, s.W + s.pad_w);
    const int64_t h0 = std::max<int64_t>(top, 0), h1 = std::min(bottom, s.H);
    const int64_t w0 = std::max<int64_t>(left, 0), w1 = std::min(right, s.W);
    const int64_t count = s.counts_padding ? (bottom - top) * (right - left) : (h1 - h0) * (w1 - w0);
    float* to = s.y + (task * s.OW + ow) * s.y_ld;
    for (int64_t c = 0; c < s.C; c += kWidth) {
      V value = splat<float, kWidth>(kMax ? -INFINITY : 0.0f);
      for (int64_t h = h0; h < h1; ++h) {
        const float* row = s.x + (n * s.H + h) * s.W * s.x_ld + c;
        for (int64_t w = w0; w < w1; ++w) {
          const V x = load<kWidth>(row + w * s.x_ld);
          if constexpr (kMax)
            value = ((x <= value) | (value != value)) ? value : x;  // a NaN wins and stays
          else
            value += x;
        }
      }
      if constexpr (!kMax) value /= splat<float, kWidth>(float(count));
      store_columns(to + c, value, s.C - c);
    }
  }
}

// Sums over parts of an image: x → sums[N][blocks][sums_ld], a task is one part of one image.
SENET_INLINE int64_t sum_blocks(const Step& s) { return ceil_div(s.H * s.W, s.rows); }

// Rows are added in runs, and the runs to each other: fewer additions one behind the other round less.
template <int kVectors>
SENET_INLINE void sum_columns(const float* x, int64_t ld, int64_t rows, float* to, int64_t columns) {
  constexpr int kSums = 8 / kVectors;  // of each column: they hide the latency of an addition
  constexpr int64_t kRun = 64;
  V total[kVectors] = {};
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    const int64_t end = std::min(rows, begin + kRun);
    V sum[kSums][kVectors] = {};
    int64_t r = begin;
    for (; r + kSums <= end; r += kSums)
      for (int u = 0; u < kSums; ++u)
        for (int v = 0; v < kVectors; ++v)
          sum[u][v] += load<kWidth>(x + (r + u) * ld + v * kWidth);
    for (; r < end; ++r)
      for (int v = 0; v < kVectors; ++v) sum[0][v] += load<kWidth>(x + r * ld + v * kWidth);
    for (int half = kSums / 2; half > 0; half /= 2)
      for (int u = 0; u < half; ++u)
        for (int v = 0; v < kVectors; ++v) sum[u][v] += sum[u + half][v];
    for (int v = 0; v < kVectors; ++v) total[v] += sum[0][v];
  }
  for (int v = 0; v < kVectors; ++v) store_columns(to + v * kWidth, total[v], columns - v * kWidth);
}

void sum_rows(const float* x, int64_t ld, int64_t rows, float* to, int64_t columns) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= columns; c += 4 * kWidth)
    sum_columns<4>(x + c, ld, rows, to + c, columns - c);
  for (; c + 2 * kWidth <= columns; c += 2 * kWidth)
    sum_columns<2>(x + c, ld, rows, to + c, columns - c);
  for (; c < columns; c += kWidth) sum_columns<1>(x + c, ld, rows, to + c, columns - c);
}

void sums(const Step& s, int64_t task) {
  const int64_t blocks = sum_blocks(s), pixels = s.H * s.W, n = task / blocks, block = task % blocks;
  const int64_t begin = pixels * block / blocks, end = pixels * (block + 1) / blocks;
  sum_rows(s.x + (n * pixels + begin) * s.x_ld, s.x_ld, end - begin, s.sums + task * s.sums_ld, s.C);
}

// Which lines of the input, of `size` along one axis, tap `i` of a convolution of stride 1 does see.
struct Seen {
  int64_t begin, end;
};
SENET_INLINE Seen seen(int64_t i, int64_t size, int64_t outputs, int64_t dilation, int64_t padding) {
  const int64_t first = i * dilation - padding;
  const int64_t begin = std::min(size, std::max<int64_t>(0, first));
  return {begin, std::max(begin, std::min(size, outputs + first))};
}

// Calls `line` for each line that a tap does not see.
template <class F>
SENET_INLINE void each_unseen(const Seen& part, int64_t size, const F& line) {
  for (int64_t i = 0; i < part.begin; ++i) line(i);
  for (int64_t i = part.end; i < size; ++i) line(i);
}

// Means per tap, y[N][kernel_h * kernel_w * C], from the map x and its sums.
// A tap's sum is that of all pixels, less the rows and less the columns that it does not see, plus
// the pixels that were taken off twice.
void means(const Step& s, int64_t n, float* scratch) {
  const int64_t blocks = s.sum_blocks, C = s.C, taps = s.kernel_h * s.kernel_w;
  double* sums = reinterpret_cast<double*>(scratch);  // [kernel_h][kernel_w][C]
  float* line = scratch + 2 * taps * C;
  const auto tap = [&](int64_t i, int64_t j) { return sums + (i * s.kernel_w + j) * C; };
  const auto add = [C](double* to, const float* from, double factor) {
    for (int64_t c = 0; c < C; ++c) to[c] += factor * from[c];
  };
  const auto pixel = [&](int64_t h, int64_t w) { return s.x + ((n * s.H + h) * s.W + w) * s.x_ld; };
  const auto rows = [&](int64_t i) { return seen(i, s.H, s.OH, s.dilation_h, s.pad_h); };
  const auto columns = [&](int64_t j) { return seen(j, s.W, s.OW, s.dilation_w, s.pad_w); };
  std::fill_n(sums, C, 0.0);
  for (int64_t b = 0; b < blocks; ++b) add(sums, s.sums + (n * blocks + b) * s.sums_ld, 1);
  for (int64_t t = 1; t < taps; ++t) std::copy_n(sums, C, sums + t * C);
  for (int64_t i = 0; i < s.kernel_h; ++i)
    each_unseen(rows(i), s.H, [&](int64_t h) {
      sum_rows(pixel(h, 0), s.x_ld, s.W, line, C);
      for (int64_t j = 0; j < s.kernel_w; ++j) add(tap(i, j), line, -1);
    });
  for (int64_t j = 0; j < s.kernel_w; ++j)
    each_unseen(columns(j), s.W, [&](int64_t w) {
      sum_rows(pixel(0, w), s.W * s.x_ld, s.H, line, C);
      for (int64_t i = 0; i < s.kernel_h; ++i) {
        add(tap(i, j), line, -1);
        each_unseen(rows(i), s.H, [&](int64_t h) { add(tap(i, j), pixel(h, w), 1); });
      }
    });
  const double share = 1.0 / double(s.OH * s.OW);
  float* to = s.y + n * s.y_ld;
  for (int64_t c = 0; c < taps * C; ++c) to[c] = float(sums[c] * share);
}

// What remains for rows of finished outputs: the activations that are not applied in registers, and
// the sums, written or (`adds`) added to.
SENET_INLINE void finish_rows(const Ending& ending, float* y, int64_t ld, int64_t rows, int64_t columns,
                              float* to, bool adds) {
  if (!in_registers(ending)) activate(ending, y, ld, rows, columns);
  if (!to) return;
  if (!adds) return sum_rows(y, ld, rows, to, columns);
  constexpr int64_t kColumns = 64;
  float line[kColumns];
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t here = std::min(kColumns, columns - c);
    sum_rows(y + c, ld, rows, line, here);
    for (int64_t i = 0; i < here; ++i) to[c + i] += line[i];
  }
}

// y = activation(gates * (x * weights + bias) + shortcut), each part optional; a task is `rows` rows
// of one image.
void pointwise(const Step& s, int64_t task) {
  constexpr int64_t kFloats = 2048;  // that are activated at once, in the first-level cache
  const int64_t pixels = s.H * s.W, blocks = ceil_div(pixels, s.rows);
  const int64_t n = task / blocks, block = task % blocks;
  const int64_t first = n * pixels + pixels * block / blocks;
  const int64_t end = n * pixels + pixels * (block + 1) / blocks;
  const int64_t group = std::max<int64_t>(1, kFloats / s.C);
  const Ending ending = ending_of(s, 0);
  const bool positive = ending.activation == Activation::kRelu;
  for (int64_t begin = first; begin < end; begin += group) {
    const int64_t rows = std::min(group, end - begin);
    for (int64_t row = begin; row < begin + rows; ++row)
      for (int64_t c = 0; c < s.C; c += kWidth) {
        V value = load<kWidth>(s.x + row * s.x_ld + c);
        if (s.weights) value *= load<kWidth>(s.weights + c);
        if (s.bias) value += load<kWidth>(s.bias + c);
        if (s.gates) value *= load<kWidth>(s.gates + n * s.gates_ld + c);
        if (s.shortcut) value += load<kWidth>(s.shortcut + row * s.shortcut_ld + c);
        if (positive) value = rectified(value);
        store_columns(s.y + row * s.y_ld + c, value, s.C - c);
      }
    if (!in_registers(ending)) activate(ending, s.y + begin * s.y_ld, s.y_ld, rows, s.C);
  }
}

}  // namespace
}  // namespace senet
