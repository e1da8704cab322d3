// Convolutions with few outputs a group, for which gathering patches would cost as much as their
// product: the rows of a group are copied once, with zeros around them. There the taps of a kernel's
// row are one piece, so that the product slides over the copy.
#pragma once

#include <algorithm>

#include "convolution.h"
#include "passes.h"

namespace senet {
namespace {

SENET_INLINE int64_t sliding_width(const Step& s) { return (s.OW - 1) * s.stride_w + s.kernel_w; }
SENET_INLINE int64_t sliding_panels(const Step& s) {
  return ceil_div(s.groups * group_panels(s), s.panels);
}

int64_t sliding_tasks(const Step& s) { return s.N * ceil_div(s.OH, s.rows) * sliding_panels(s); }

// Rows [top, top + rows) of image n, channels [c, c + channels), with zeros outside of the map.
SENET_INLINE void copy_rows(const Step& s, int64_t n, int64_t top, int64_t rows, int64_t c,
                            int64_t channels, float* to) {
  const int64_t width = sliding_width(s), before = std::min(s.pad_w, width);
  const int64_t inside = std::min(s.W, width - before);
  for (int64_t h = top; h < top + rows; ++h, to += width * channels) {
    if (h < 0 || h >= s.H) {
      clear_over(to, width * channels);
      continue;
    }
    clear_over(to, before * channels);
    const float* from = s.x + (n * s.H + h) * s.W * s.x_ld + c;
    float* pixel = to + before * channels;
    if (channels == s.x_ld)
      copy_over(pixel, from, inside * channels);
    else
      for (int64_t w = 0; w < inside; ++w)
        copy_over(pixel + w * channels, from + w * s.x_ld, channels);
    clear_over(pixel + inside * channels, (width - before - inside) * channels);
  }
}

// A task is `rows` rows of the output of an image and `panels` panels of weights.
void sliding(const Step& s, int64_t task, float* scratch) {
  const int64_t parts = sliding_panels(s), blocks = ceil_div(s.OH, s.rows);
  const int64_t part = task % parts, block = task / parts % blocks, n = task / parts / blocks;
  const int64_t top = s.OH * block / blocks, lines = s.OH * (block + 1) / blocks - top;
  const int64_t channels = s.C / s.groups, outputs = s.OC / s.groups;
  const int64_t row = sliding_width(s) * channels;
  const Depth depth = {s.kernel_w * channels, s.kernel_h, row};
  const int64_t last_panel = std::min((part + 1) * s.panels, s.groups * group_panels(s));
  int64_t copied = -1;
  for (int64_t panel = part * s.panels; panel < last_panel; ++panel) {
    const int64_t group = panel / group_panels(s), column = panel % group_panels(s) * kPanel;
    if (copied != group) {
      const int64_t rows = (lines - 1) * s.stride_h + s.kernel_h;
      copy_rows(s, n, top * s.stride_h - s.pad_h, rows, group * channels, channels, scratch);
      copied = group;
    }
    const int64_t out = group * outputs + column, pixel = (n * s.OH + top) * s.OW;
    const float* weights = s.weights + panel * depth.depth * depth.slices * kPanel;
    Epilogue e;
    e.bias = s.bias + panel * kPanel;
    e.gates = s.gates ? s.gates + n * s.gates_ld + out : nullptr;
    e.shortcut_ld = s.shortcut_ld;
    e.y_ld = s.y_ld;
    e.columns = std::min<int64_t>(kPanel, outputs - column);
    e.ending = ending_of(s, out);
    for (int64_t i = 0; i < lines; ++i) {
      e.shortcut = s.shortcut ? s.shortcut + (pixel + i * s.OW) * s.shortcut_ld + out : nullptr;
      e.y = s.y + (pixel + i * s.OW) * s.y_ld + out;
      panel_product(scratch + i * s.stride_h * row, s.stride_w * channels, s.OW, weights, depth, e);
    }
    if (s.sums)
      sum_rows(s.y + pixel * s.y_ld + out, s.y_ld, lines * s.OW,
               s.sums + (n * blocks + block) * s.sums_ld + out, e.columns);
  }
}

}  // namespace
}  // namespace senet
