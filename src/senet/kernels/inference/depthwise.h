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

// Sums of kOutputs outputs side by side, from their bias on; `pixel(i, p)` is where pixel p of row i of
// their window lies, and rows [top, bottom) of the kernel lie in the map.
template <int kKernel, int kStride, int kOutputs, class Pixel>
SENET_INLINE void add_window(const Step& s, int64_t c, int64_t top, int64_t bottom, const Pixel& pixel,
                             V (&sum)[kOutputs]) {
  constexpr int kPixels = (kOutputs - 1) * kStride + kKernel;
  const V bias = load<kWidth>(s.bias + c);
  SENET_UNROLL(8)
  for (int o = 0; o < kOutputs; ++o) sum[o] = bias;
  const float* weights = s.weights + c;
  const int64_t ld = s.weights_ld;
  for (int64_t i = top; i < bottom; ++i) {
    V w[kKernel];
    SENET_UNROLL(8)
    for (int j = 0; j < kKernel; ++j) w[j] = load<kWidth>(weights + (i * kKernel + j) * ld);
    SENET_UNROLL(32)
    for (int p = 0; p < kPixels; ++p) {
      const V x = load<kWidth>(pixel(i, p) + c);
      SENET_UNROLL(8)
      for (int j = 0; j < kKernel; ++j)
        if (p >= j && (p - j) % kStride == 0 && (p - j) / kStride < kOutputs)
          sum[(p - j) / kStride] += x * w[j];
    }
  }
}

// Where the outputs of a task lie: row h of image n from output `left` on, channels [begin, end).
struct Outputs {
  int64_t n, h, left, begin, end;
  float* at(const Step& s) const { return s.y + ((n * s.OH + h) * s.OW + left) * s.y_ld; }
};

template <int kOutputs>
SENET_INLINE void store_outputs(const Step& s, const Outputs& at, int64_t c, bool positive,
                                const V (&sum)[kOutputs]) {
  float* y = at.at(s) + c;
  const int64_t ld = s.y_ld, columns = at.end - c, outputs = s.OW - at.left;
  if (columns >= kWidth && outputs >= kOutputs) {
    SENET_UNROLL(8)
    for (int o = 0; o < kOutputs; ++o) {
      const V value = positive ? relu(sum[o]) : sum[o];
      std::memcpy(y + o * ld, &value, sizeof value);
    }
  } else {
    for (int o = 0; o < std::min<int64_t>(kOutputs, outputs); ++o)
      store_columns(y + o * ld, positive ? relu(sum[o]) : sum[o], columns);
  }
}

template <int kKernel, int kStride, int kOutputs>
void window(const Step& s, const Outputs& at) {
  constexpr int kPixels = (kOutputs - 1) * kStride + kKernel;
  const int64_t h = at.h * kStride - s.pad_h, w = at.left * kStride - s.pad_w;
  const int64_t top = std::max<int64_t>(0, -h), bottom = std::min<int64_t>(kKernel, s.H - h);
  const float* first = s.x + ((at.n * s.H + h) * s.W + w) * s.x_ld;
  const int64_t ld = s.x_ld, row = s.W * s.x_ld;
  const bool positive = Activation(s.activation) == Activation::kRelu;
  V sum[kOutputs];
  if (w >= 0 && w + kPixels <= s.W) {
    for (int64_t c = at.begin; c < at.end; c += kWidth) {
      const auto pixel = [&](int64_t i, int p) { return first + i * row + p * ld; };
      add_window<kKernel, kStride, kOutputs>(s, c, top, bottom, pixel, sum);
      store_outputs<kOutputs>(s, at, c, positive, sum);
    }
    return;
  }
  const float* pixels[kKernel][kPixels];
  for (int64_t i = top; i < bottom; ++i)
    for (int p = 0; p < kPixels; ++p)
      pixels[i][p] = w + p >= 0 && w + p < s.W ? first + i * row + p * ld : kZeros;
  for (int64_t c = at.begin; c < at.end; c += kWidth) {
    const auto pixel = [&](int64_t i, int p) { return pixels[i][p]; };
    add_window<kKernel, kStride, kOutputs>(s, c, top, bottom, pixel, sum);
    store_outputs<kOutputs>(s, at, c, positive, sum);
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
    store_outputs<1>(s, at, c, positive, sum);
  }
}

constexpr int kManyOutputs = 7;  // maps of 112, 56, 28, 14 and 7 have no remainder
constexpr int kFewOutputs = 4;

// A row of outputs. A remainder is computed together with outputs before it, once more.
template <int kKernel, int kStride>
void depthwise_row(const Step& s, Outputs at) {
  for (int64_t o = 0; o < s.OW;) {
    const int64_t rest = s.OW - o, width = rest > kFewOutputs ? kManyOutputs : kFewOutputs;
    at.left = std::max<int64_t>(0, std::min(o, s.OW - width));
    width == kManyOutputs ? window<kKernel, kStride, kManyOutputs>(s, at)
                          : window<kKernel, kStride, kFewOutputs>(s, at);
    o += width;
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
