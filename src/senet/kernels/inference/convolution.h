// Convolutions as matrix products: rows are output pixels, the depth is kernel × input channels. A
// dense 1×1 convolution reads its input where it lies; any other one gathers the patches of a block
// of pixels into scratch memory first, which stays in the cache for all panels of weights.
#pragma once

#include <algorithm>

#include "geometry.h"
#include "passes.h"
#include "product.h"

namespace senet {
namespace {

// Whole vectors: up to kWidth - 1 floats more than `count` are read and written.
SENET_INLINE void copy_over(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const V v = load<kWidth>(from + i);
    std::memcpy(to + i, &v, sizeof v);
  }
}

SENET_INLINE void clear_over(float* to, int64_t count) {
  const V zero = {};
  for (int64_t i = 0; i < count; i += kWidth) std::memcpy(to + i, &zero, sizeof zero);
}

// The patch of one output pixel, [kernel_h][kernel_w][channels] from channel c of x; zeros outside.
// Written from front to back, so that what a copy writes too far is written over by the next one;
// `to` has room for whole vectors.
SENET_INLINE void gather_patch(const Step& s, const Pixel& p, int64_t c, int64_t channels, float* to) {
  const int64_t top = p.h * s.stride_h - s.pad_h, left = p.w * s.stride_w - s.pad_w;
  const bool contiguous = s.dilation_w == 1 && channels == s.x_ld;
  for (int64_t i = 0; i < s.kernel_h; ++i) {
    const int64_t h = top + i * s.dilation_h;
    if (h < 0 || h >= s.H) {
      clear_over(to, s.kernel_w * channels);
      to += s.kernel_w * channels;
      continue;
    }
    const float* row = s.x + (p.n * s.H + h) * s.W * s.x_ld + c;
    if (contiguous) {
      const int64_t before = std::min(std::max<int64_t>(0, -left), s.kernel_w);
      const int64_t end = std::max(before, std::min(s.kernel_w, s.W - left));
      clear_over(to, before * channels);
      copy_over(to + before * channels, row + (left + before) * channels, (end - before) * channels);
      clear_over(to + end * channels, (s.kernel_w - end) * channels);
      to += s.kernel_w * channels;
      continue;
    }
    for (int64_t j = 0; j < s.kernel_w; ++j, to += channels) {
      const int64_t w = left + j * s.dilation_w;
      if (w < 0 || w >= s.W)
        clear_over(to, channels);
      else
        copy_over(to, row + w * s.x_ld, channels);
    }
  }
}

SENET_INLINE bool reads_in_place(const Step& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 &&
         s.pad_w == 0;
}

// With gates or sums the rows of a task lie in one image.
SENET_INLINE int64_t row_images(const Step& s) {
  return s.gates || s.input_gates || s.sums ? s.N : 1;
}
SENET_INLINE int64_t image_rows(const Step& s) { return s.N / row_images(s) * s.OH * s.OW; }
SENET_INLINE int64_t group_panels(const Step& s) { return ceil_div(s.OC / s.groups, kPanel); }

// A panel of weights times the gates of its inputs: cheaper than to scale the inputs, as the rows of a
// task are more than a panel's columns.
SENET_INLINE void scale_panel(const float* panel, const float* gates, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; ++k)
    for (int v = 0; v < 2; ++v) {
      const V scaled = load<kWidth>(panel + k * kPanel + v * kWidth) * gates[k];
      std::memcpy(to + k * kPanel + v * kWidth, &scaled, sizeof scaled);
    }
}

int64_t convolution_tasks(const Step& s) {
  return row_images(s) * ceil_div(image_rows(s), s.rows) *
         ceil_div(s.groups * group_panels(s), s.panels);
}

void convolution(const Step& s, int64_t task, float* scratch) {
  const int64_t panel_blocks = ceil_div(s.groups * group_panels(s), s.panels);
  const int64_t row_blocks = ceil_div(image_rows(s), s.rows);
  const int64_t row_block = task % row_blocks, panel_block = task / row_blocks % panel_blocks;
  const int64_t image = task / row_blocks / panel_blocks;
  const int64_t begin = image * image_rows(s) + image_rows(s) * row_block / row_blocks;
  const int64_t rows = image * image_rows(s) + image_rows(s) * (row_block + 1) / row_blocks - begin;

  const int64_t channels = s.C / s.groups, outputs = s.OC / s.groups;
  const int64_t depth = s.kernel_h * s.kernel_w * channels;
  const int64_t last_panel = std::min((panel_block + 1) * s.panels, s.groups * group_panels(s));
  const bool in_place = reads_in_place(s);
  const int64_t lda = in_place ? s.x_ld : row_stride(depth);
  int64_t gathered = -1;
  for (int64_t panel = panel_block * s.panels; panel < last_panel; ++panel) {
    const int64_t group = panel / group_panels(s), column = panel % group_panels(s) * kPanel;
    if (!in_place && gathered != group) {
      Pixel p = pixel_at(begin, s.OH, s.OW);
      for (int64_t r = 0; r < rows; ++r, advance(p, s.OH, s.OW))
        gather_patch(s, p, group * channels, channels, scratch + r * lda);
      gathered = group;
    }
    const float* a = in_place ? s.x + begin * s.x_ld + group * channels : scratch;
    const int64_t out = group * outputs + column;
    Epilogue e;
    e.bias = s.bias + panel * kPanel;
    e.gates = s.gates ? s.gates + image * s.gates_ld + out : nullptr;
    e.shortcut = s.shortcut ? s.shortcut + begin * s.shortcut_ld + out : nullptr;
    e.shortcut_ld = s.shortcut_ld;
    e.y = s.y + begin * s.y_ld + out;
    e.y_ld = s.y_ld;
    e.columns = std::min<int64_t>(kPanel, outputs - column);
    e.ending = ending_of(s, out);
    const float* weights = s.weights + panel * depth * kPanel;
    if (s.input_gates) {  // reads in place, so all of the scratch is free
      scale_panel(weights, s.input_gates + image * s.input_gates_ld, depth, scratch);
      weights = scratch;
    }
    panel_product(a, lda, rows, weights, {depth}, e);
    if (s.sums) {
      float* to = s.sums + (image * row_blocks + row_block) * s.sums_ld + out;
      sum_rows(e.y, s.y_ld, rows, to, e.columns);
    }
  }
}

}  // namespace
}  // namespace senet
