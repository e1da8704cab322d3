// 3×3 convolutions of stride 1 by Winograd's minimal filtering F(m×m, 3×3) (Lavin and Gray, arXiv
// 1509.09308): patches of (m+2)² inputs and the weights are transformed, multiplied as (m+2)² matrix
// products over the channels, and transformed back to m² outputs: 2.25 (m = 2) or 4 (m = 4) times
// fewer multiplications. The transforms follow Cook and Toom, for m = 4 with the points of
// ../winograd.h (m = 2: 0, ±1, infinity).
#pragma once

#include <algorithm>

#include "../winograd.h"
#include "geometry.h"
#include "product.h"

namespace senet {
namespace {

// out = Bᵀ in, one axis; `step` between the entries.
template <int m>
SENET_INLINE void to_patch_domain(const V* in, V* out, int step) {
  if constexpr (m == 2) {
    out[0] = in[0] - in[2 * step];
    out[step] = in[step] + in[2 * step];
    out[2 * step] = in[2 * step] - in[step];
    out[3 * step] = in[step] - in[3 * step];
  } else {
    to_products(in, out, step);
  }
}

// out = Aᵀ in, one axis: m + 2 entries `step` apart to m entries `step` apart.
template <int m>
SENET_INLINE void to_outputs(const V* in, V* out, int step) {
  if constexpr (m == 2) {
    out[0] = in[0] + in[step] + in[2 * step];
    out[step] = in[step] - in[2 * step] - in[3 * step];
  } else {
    const V sum_a = in[step] + in[2 * step], difference_a = kA * (in[step] - in[2 * step]);
    const V sum_b = in[3 * step] + in[4 * step], difference_b = kB * (in[3 * step] - in[4 * step]);
    out[0] = in[0] + sum_a + sum_b;
    out[step] = difference_a + difference_b;
    out[2 * step] = kAA * sum_a + kBB * sum_b;
    out[3 * step] = kAA * difference_a + kBB * difference_b + in[5 * step];
  }
}

SENET_INLINE int64_t tiles_h(const Step& s) { return ceil_div(s.OH, s.tile); }
SENET_INLINE int64_t tiles_w(const Step& s) { return ceil_div(s.OW, s.tile); }
SENET_INLINE int64_t winograd_tiles(const Step& s) { return s.N * tiles_h(s) * tiles_w(s); }

// Transforms `count` patches from tile `first` on into patches[(m+2)²][stride][ld].
template <int m>
void transform_patches(const Step& s, int64_t first, int64_t count, float* patches, int64_t stride,
                       int64_t ld) {
  constexpr int n = m + 2;
  Pixel p = pixel_at(first, tiles_h(s), tiles_w(s));
  for (int64_t t = 0; t < count; ++t, advance(p, tiles_h(s), tiles_w(s))) {
    const float* from[n * n];
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j) {
        const int64_t h = p.h * m - s.pad_h + i, w = p.w * m - s.pad_w + j;
        const bool inside = h >= 0 && h < s.H && w >= 0 && w < s.W;
        from[i * n + j] = inside ? s.x + ((p.n * s.H + h) * s.W + w) * s.x_ld : kZeros;
      }
    for (int64_t c = 0; c < s.C; c += kWidth) {
      V columns[n * n], patch[n * n];
      SENET_UNROLL(6)
      for (int j = 0; j < n; ++j) {
        V in[n], out[n];
        SENET_UNROLL(6)
        for (int i = 0; i < n; ++i) in[i] = load<kWidth>(from[i * n + j] + c);
        to_patch_domain<m>(in, out, 1);
        SENET_UNROLL(6)
        for (int i = 0; i < n; ++i) columns[i * n + j] = out[i];
      }
      SENET_UNROLL(6)
      for (int i = 0; i < n; ++i) to_patch_domain<m>(columns + i * n, patch + i * n, 1);
      SENET_UNROLL(36)
      for (int i = 0; i < n * n; ++i)
        std::memcpy(patches + (i * stride + t) * ld + c, &patch[i], sizeof(V));
    }
  }
}

// products[(m+2)²][count][kPanel] of one panel → outputs of `count` tiles from `first` on. The sum of a
// tile is a row of s.sums.
template <int m>
void transform_outputs(const Step& s, int64_t first, int64_t count, int64_t panel,
                       const float* products) {
  constexpr int n = m + 2;
  Pixel p = pixel_at(first, tiles_h(s), tiles_w(s));
  for (int64_t t = 0; t < count; ++t, advance(p, tiles_h(s), tiles_w(s))) {
    const int64_t height = std::min<int64_t>(m, s.OH - p.h * m);
    const int64_t width = std::min<int64_t>(m, s.OW - p.w * m);
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t c = panel * kPanel + v * kWidth, columns = s.OC - c;
      if (columns <= 0) break;
      V in[n * n], half[m * n], out[m * m];
      SENET_UNROLL(36)
      for (int i = 0; i < n * n; ++i)
        in[i] = load<kWidth>(products + (i * count + t) * kPanel + v * kWidth);
      SENET_UNROLL(6)
      for (int j = 0; j < n; ++j) to_outputs<m>(in + j, half + j, n);
      SENET_UNROLL(4)
      for (int i = 0; i < m; ++i) to_outputs<m>(half + i * n, out + i * m, 1);
      // Copies in registers: for all the compiler knows, a store to y may change what s holds.
      const V bias = load<kWidth>(s.bias + c);
      const Ending ending = ending_of(s, c);
      const bool positive = ending.activation == Activation::kRelu, activates = !in_registers(ending);
      const bool gated = s.gates, summed = s.sums;
      const V gate = gated ? load<kWidth>(s.gates + p.n * s.gates_ld + c) : V{};
      const int64_t pixel = (p.n * s.OH + p.h * m) * s.OW + p.w * m, y_ld = s.y_ld, OW = s.OW;
      const int64_t shortcut_ld = s.shortcut_ld;
      const float* shortcut = s.shortcut ? s.shortcut + pixel * shortcut_ld + c : nullptr;
      float* y = s.y + pixel * y_ld + c;
      V sum = {};
      const auto finish_pixel = [&](int64_t i, int64_t j) {
        V value = out[i * m + j] + bias;
        if (gated) value *= gate;
        if (shortcut) value += load<kWidth>(shortcut + (i * OW + j) * shortcut_ld);
        return positive ? rectified(value) : value;
      };
      const auto store_pixel = [&](int64_t i, int64_t j, V value, int64_t stored) {
        store_columns(y + (i * OW + j) * y_ld, value, stored);
        if (summed) sum += value;
      };
      if (height == m && width == m && columns >= kWidth && !activates) {
        SENET_UNROLL(4)
        for (int i = 0; i < m; ++i)
          SENET_UNROLL(4)
          for (int j = 0; j < m; ++j) store_pixel(i, j, finish_pixel(i, j), kWidth);
      } else {
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) out[i * m + j] = finish_pixel(i, j);
        if (activates)
          activate(ending, reinterpret_cast<float*>(out), kWidth, m * m, kWidth);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) store_pixel(i, j, out[i * m + j], columns);
      }
      if (summed) store_columns(s.sums + (first + t) * s.sums_ld + c, sum, columns);
    }
  }
}

// Products and outputs of `count` tiles from `first` on for panels [begin, end).
template <int m>
void multiply_patches(const Step& s, int64_t first, int64_t count, const float* patches,
                      int64_t stride, int64_t ld, int64_t begin, int64_t end, float* products) {
  constexpr int n = m + 2;
  for (int64_t panel = begin; panel < end; ++panel) {
    Epilogue e;
    e.bias = kZeros;
    e.gates = e.shortcut = nullptr;
    e.y_ld = kPanel;
    e.columns = std::min<int64_t>(kPanel, s.OC - panel * kPanel) > kWidth ? kPanel : kWidth;
    e.ending = {Activation::kLinear, 0, nullptr};
    for (int i = 0; i < n * n; ++i) {
      e.y = products + i * count * kPanel;
      panel_product(patches + i * stride * ld, ld, count,
                    s.weights + (panel * n * n + i) * s.C * kPanel, {s.C}, e);
    }
    transform_outputs<m>(s, first, count, panel, products);
  }
}

int64_t winograd_tasks(const Step& s) { return ceil_div(winograd_tiles(s), s.tiles); }

// A block of tiles from input to output; its patches and products stay in the cache.
template <int m>
void winograd(const Step& s, int64_t task, float* scratch) {
  const int64_t tasks = winograd_tasks(s), tiles = winograd_tiles(s);
  const int64_t first = tiles * task / tasks, count = tiles * (task + 1) / tasks - first;
  const int64_t ld = row_stride(s.C);
  float* products = scratch + (m + 2) * (m + 2) * count * ld;
  transform_patches<m>(s, first, count, scratch, count, ld);
  multiply_patches<m>(s, first, count, scratch, count, ld, 0, ceil_div(s.OC, kPanel), products);
}

// For few tiles and many weights: all patches first, then each thread reads its own panels only.
template <int m>
void winograd_input(const Step& s, int64_t task) {
  const int64_t tasks = winograd_tasks(s), tiles = winograd_tiles(s), ld = row_stride(s.C);
  const int64_t first = tiles * task / tasks, count = tiles * (task + 1) / tasks - first;
  transform_patches<m>(s, first, count, s.patches + first * ld, tiles, ld);
}

int64_t winograd_product_tasks(const Step& s) {
  return ceil_div(ceil_div(s.OC, kPanel), s.panels);
}

template <int m>
void winograd_product(const Step& s, int64_t task, float* scratch) {
  const int64_t tiles = winograd_tiles(s);
  const int64_t end = std::min((task + 1) * s.panels, ceil_div(s.OC, kPanel));
  multiply_patches<m>(s, 0, tiles, s.patches, tiles, row_stride(s.C), task * s.panels, end, scratch);
}

}  // namespace
}  // namespace senet
