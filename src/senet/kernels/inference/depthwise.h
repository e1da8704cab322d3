// Depthwise convolutions. A task is some rows of the output of an image and some of its channels; in
// it a strip of channels at a time, so narrow that the input rows of an output row stay in the
// first-level cache for the next one. Neighbouring outputs × a vector of channels are summed in
// registers: an input pixel is read once for all of them that see it.
#pragma once

#include <algorithm>

#include "geometry.h"
#include "passes.h"
#include "product.h"

namespace senet {
namespace {

constexpr int64_t kStripBytes = 24 << 10;  // of input rows in the first-level cache
constexpr int64_t kStrip = 512;            // channels at most

// Where outputs of a task lie: row h of image n from output `left` on, channels [begin, end).
struct Outputs {
  int64_t n, h, left, begin, end;
  float* at(const Step& s) const { return s.y + ((n * s.OH + h) * s.OW + left) * s.y_ld; }
};

template <int kOutputs>
SENET_INLINE void store_outputs(float* y, int64_t ld, int64_t outputs, int64_t columns, bool positive,
                                const V (&sum)[kOutputs]) {
  if (columns >= kWidth && outputs >= kOutputs) {
    SENET_UNROLL(16)
    for (int o = 0; o < kOutputs; ++o) {
      const V value = positive ? rectified(sum[o]) : sum[o];
      std::memcpy(y + o * ld, &value, sizeof value);
    }
  } else {
    for (int o = 0; o < std::min<int64_t>(kOutputs, outputs); ++o)
      store_columns(y + o * ld, positive ? rectified(sum[o]) : sum[o], columns);
  }
}

// A row of outputs of a vector of channels. Rows [top, bottom) of the kernel lie in the map, whose
// pixel 0 of row `top` is at x; weights is where the kernel's first tap is.
struct Row {
  const float *x, *weights;
  float* y;
  int64_t row, ld, weights_ld, y_ld, W, OW, pad, top, bottom, columns;
  bool positive;
};

// Adds row `i` of the kernel: an input pixel goes into all outputs that see it. Pixels outside of
// [first, last) are beyond the map's edges.
template <int kKernel, int kStride, int kOutputs, bool kInside>
SENET_INLINE void add_taps(const float* x, int64_t ld, int64_t first, int64_t last,
                           const V (&w)[kKernel], V (&sum)[kOutputs]) {
  SENET_UNROLL(32)
  for (int p = 0; p < (kOutputs - 1) * kStride + kKernel; ++p, x += ld) {
    if (!kInside && (p < first || p >= last)) continue;
    const V value = load<kWidth>(x);
    SENET_UNROLL(9)
    for (int j = 0; j < kKernel; ++j)
      if (p >= j && (p - j) % kStride == 0 && (p - j) / kStride < kOutputs)
        sum[(p - j) / kStride] += value * w[j];
  }
}

template <int kKernel>
SENET_INLINE void load_taps(const float* weights, int64_t ld, V (&w)[kKernel]) {
  SENET_UNROLL(9)
  for (int j = 0; j < kKernel; ++j) w[j] = load<kWidth>(weights + j * ld);
}

template <int kKernel, int kStride, int kOutputs, bool kInside>
SENET_INLINE void window(const Row& r, int64_t left, V bias) {
  V sum[kOutputs];
  SENET_UNROLL(16)
  for (int o = 0; o < kOutputs; ++o) sum[o] = bias;
  const int64_t w0 = left * kStride - r.pad;
  const float* x = r.x + w0 * r.ld;
  const float* weights = r.weights + r.top * kKernel * r.weights_ld;
  for (int64_t i = r.top; i < r.bottom; ++i) {
    V w[kKernel];
    load_taps(weights, r.weights_ld, w);
    add_taps<kKernel, kStride, kOutputs, kInside>(x, r.ld, -w0, r.W - w0, w, sum);
    x += r.row;
    weights += kKernel * r.weights_ld;
  }
  store_outputs<kOutputs>(r.y + left * r.y_ld, r.y_ld, r.OW - left, r.columns, r.positive, sum);
}

// Widths of windows; maps of 112, 56, 28, 14 and 7 have no remainder. A remainder is computed together
// with outputs before it, once more.
constexpr int kFewOutputs = 4, kSomeOutputs = 7;
constexpr int kManyOutputs = SENET_REGISTERS == 32 ? 14 : 7;  // as there are registers

template <int kKernel, int kStride, int kOutputs>
SENET_INLINE void window_of_width(const Row& r, int64_t o, V bias) {
  constexpr int kPixels = (kOutputs - 1) * kStride + kKernel;
  const int64_t left = std::max<int64_t>(0, std::min(o, r.OW - kOutputs)), w = left * kStride - r.pad;
  w >= 0 && w + kPixels <= r.W ? window<kKernel, kStride, kOutputs, true>(r, left, bias)
                               : window<kKernel, kStride, kOutputs, false>(r, left, bias);
}

template <int kKernel, int kStride>
void depthwise_row(const Step& s, Outputs at) {
  const int64_t h = at.h * kStride - s.pad_h;
  const int64_t top = std::max<int64_t>(0, -h), bottom = std::min<int64_t>(kKernel, s.H - h);
  Row r = {nullptr, nullptr, nullptr, s.W * s.x_ld, s.x_ld, s.weights_ld, s.y_ld, s.W, s.OW, s.pad_w,
           top, bottom, 0, Activation(s.activation) == Activation::kRelu};
  const float* x = s.x + (at.n * s.H + h + top) * r.row;
  for (int64_t c = at.begin; c < at.end; c += kWidth) {
    r.x = x + c;
    r.weights = s.weights + c;
    r.y = at.at(s) + c;
    r.columns = at.end - c;
    const V bias = load<kWidth>(s.bias + c);
    int64_t o = 0;
    if constexpr (kManyOutputs > kSomeOutputs)
      for (; r.OW - o > kSomeOutputs; o += kManyOutputs)
        window_of_width<kKernel, kStride, kManyOutputs>(r, o, bias);
    for (; r.OW - o > kFewOutputs; o += kSomeOutputs)
      window_of_width<kKernel, kStride, kSomeOutputs>(r, o, bias);
    for (; o < r.OW; o += kFewOutputs) window_of_width<kKernel, kStride, kFewOutputs>(r, o, bias);
  }
}

// Any kernel, stride and dilation, an output at a time.
void any_window(const Step& s, const Outputs& at) {
  const int64_t top = at.h * s.stride_h - s.pad_h, left = at.left * s.stride_w - s.pad_w;
  const bool positive = Activation(s.activation) == Activation::kRelu;
  for (int64_t c = at.begin; c < at.end; c += kWidth) {
    V sum[1] = {load<kWidth>(s.bias + c)};
    for (int64_t i = 0; i < s.kernel_h; ++i) {
      const int64_t h = top + i * s.dilation_h;
      if (h < 0 || h >= s.H) continue;
      const float* from = s.x + (at.n * s.H + h) * s.W * s.x_ld + c;
      const float* w = s.weights + i * s.kernel_w * s.weights_ld + c;
      for (int64_t j = 0; j < s.kernel_w; ++j) {
        const int64_t column = left + j * s.dilation_w;
        if (column < 0 || column >= s.W) continue;
        sum[0] += load<kWidth>(from + column * s.x_ld) * load<kWidth>(w + j * s.weights_ld);
      }
    }
    store_outputs<1>(at.at(s) + c, s.y_ld, 1, at.end - c, positive, sum);
  }
}

void any_depthwise_row(const Step& s, Outputs at) {
  for (at.left = 0; at.left < s.OW; ++at.left) any_window(s, at);
}

using DepthwiseRow = void (*)(const Step&, Outputs);

DepthwiseRow depthwise_row_of(const Step& s) {
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w;
  if (!square || s.dilation_h != 1 || s.dilation_w != 1 || s.stride_w > 2) return any_depthwise_row;
  const bool every = s.stride_w == 1;
  switch (s.kernel_w) {
    case 3:
      return every ? depthwise_row<3, 1> : depthwise_row<3, 2>;
    case 5:
      return every ? depthwise_row<5, 1> : depthwise_row<5, 2>;
    case 7:
      return every ? depthwise_row<7, 1> : depthwise_row<7, 2>;
    case 9:
      return every ? depthwise_row<9, 1> : depthwise_row<9, 2>;
    default:
      return any_depthwise_row;
  }
}

SENET_INLINE int64_t row_blocks(const Step& s) { return ceil_div(s.OH, s.rows); }
SENET_INLINE int64_t channel_blocks(const Step& s) { return ceil_div(ceil_div(s.OC, kPanel), s.panels); }

int64_t depthwise_tasks(const Step& s) { return s.N * row_blocks(s) * channel_blocks(s); }

// weights[kernel_h * kernel_w][weights_ld]; sums[N][row_blocks][sums_ld].
void depthwise(const Step& s, int64_t task) {
  const int64_t blocks = row_blocks(s), parts = channel_blocks(s);
  const int64_t part = task % parts, block = task / parts % blocks;
  const int64_t n = task / parts / blocks;
  const int64_t top = s.OH * block / blocks, bottom = s.OH * (block + 1) / blocks;
  const int64_t begin = part * s.panels * kPanel, end = std::min(s.OC, begin + s.panels * kPanel);
  const int64_t fitting = kStripBytes / int64_t(sizeof(float)) / (s.kernel_h * s.W);
  const int64_t strip = std::min(kStrip, std::max<int64_t>(1, fitting / kWidth) * kWidth);
  const DepthwiseRow row = depthwise_row_of(s);
  for (int64_t c = begin; c < end; c += strip) {
    Outputs at = {n, top, 0, c, std::min(c + strip, end)};
    const Ending ending = ending_of(s, c);
    float* sums = s.sums ? s.sums + (n * blocks + block) * s.sums_ld + c : nullptr;
    for (; at.h < bottom; ++at.h) {
      row(s, at);
      finish_rows(ending, at.at(s) + c, s.y_ld, s.OW, at.end - c, sums, at.h > top);
    }
  }
}

}  // namespace
}  // namespace senet
