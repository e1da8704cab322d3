// The matrix product under every convolution: rows of maps times a panel of packed weights, with
// what follows the convolution applied to the accumulators.
//
// A panel is [depth][kPanel]: for each input the weights of kPanel outputs. A register tile has
// kTileRows rows and one panel of columns; a row is a broadcast, so maps are read where they lie.
#pragma once

#include <algorithm>
#include <utility>

#include "activation.h"
#include "geometry.h"

namespace senet {
namespace {

constexpr int kPanel = 2 * kWidth;
// As many sums as there are registers beside those of a panel and a broadcast.
constexpr int kTileRows = SENET_REGISTERS == 32 ? 14 : SENET_VECTOR_BYTES == 32 ? 6 : 5;
// Products that are added one behind the other; the sums of as many are added to each other then. A
// single sum rounds with its length where its products have one sign.
constexpr int64_t kRun = 256;
// Sums of each output in a tile of few: they hide the latency of an addition. 1, 2 or 4.
constexpr int sums_of(int outputs) { return outputs <= 2 ? 4 : outputs <= 4 ? 2 : 1; }

// What happens to an accumulator: y = activation(gates * (sum + bias) + shortcut). Pointers are those
// of the tile's first row and the panel's first column; bias and gates may be read for a whole panel.
struct Epilogue {
  const float *bias, *gates, *shortcut;
  const float* before = nullptr;  // what the sum begins with, [rows][kPanel]
  float* y;
  int64_t shortcut_ld, y_ld, columns;  // columns: of the panel that exist
  Ending ending;
};

template <int kSums, int kRows, int kVectors>
SENET_INLINE void add_product(const float* a, int64_t lda, const float* b, int64_t depth,
                              V (&sum)[kSums][kRows][kVectors]) {
  // Five pointers and two strides address all rows without spilling.
  const float* base[(kRows + 2) / 3];
  SENET_UNROLL(6)
  for (int i = 0; i < (kRows + 2) / 3; ++i) base[i] = a + 3 * i * lda;
  const int64_t lda2 = 2 * lda;
  int64_t k = 0;
#define SENET_STEP(u)                                                              \
  {                                                                                \
    V w[kVectors];                                                                 \
    SENET_UNROLL(2) for (int v = 0; v < kVectors; ++v) w[v] =              \
        load<kWidth>(b + (u) * kPanel + v * kWidth);                               \
    SENET_UNROLL(16) for (int r = 0; r < kRows; ++r) {                     \
      const float* p = base[r / 3] + (r % 3 == 0 ? 0 : r % 3 == 1 ? lda : lda2);   \
      const V x = p[u] - V{}; /* folds to a broadcast, unlike a sum with zero */   \
      SENET_UNROLL(2)                                                              \
      for (int v = 0; v < kVectors; ++v) add_to(sum[(u) % kSums][r][v], x, w[v]);  \
    }                                                                              \
  }
  for (; k + 4 <= depth; k += 4) {
    SENET_STEP(0)
    SENET_STEP(1)
    SENET_STEP(2)
    SENET_STEP(3)
    b += 4 * kPanel;
    SENET_UNROLL(6)
    for (int i = 0; i < (kRows + 2) / 3; ++i) base[i] = held(base[i] + 4);
  }
  for (; k < depth; ++k) {
    SENET_STEP(0)
    b += kPanel;
    SENET_UNROLL(6)
    for (int i = 0; i < (kRows + 2) / 3; ++i) base[i] = held(base[i] + 1);
  }
#undef SENET_STEP
}

template <int kRows, int kVectors>
SENET_INLINE void finish(const Epilogue& e, V (&sum)[kRows][kVectors]) {
  if (e.before) {
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r)
      SENET_UNROLL(2)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] += load<kWidth>(e.before + r * kPanel + v * kWidth);
  }
  SENET_UNROLL(2)
  for (int v = 0; v < kVectors; ++v) {
    const V bias = load<kWidth>(e.bias + v * kWidth);
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r) sum[r][v] += bias;
  }
  if (e.gates) {
    SENET_UNROLL(2)
    for (int v = 0; v < kVectors; ++v) {
      const V gate = load<kWidth>(e.gates + v * kWidth);
      SENET_UNROLL(16)
      for (int r = 0; r < kRows; ++r) sum[r][v] *= gate;
    }
  }
  if (e.shortcut) {
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r)
      SENET_UNROLL(2)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] += load<kWidth>(e.shortcut + r * e.shortcut_ld + v * kWidth);
  }
  if (e.ending.activation == Activation::kRelu) {
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r)
      SENET_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = rectified(sum[r][v]);
  }
  if (e.columns >= kVectors * kWidth) {
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r)
      SENET_UNROLL(2)
      for (int v = 0; v < kVectors; ++v)
        std::memcpy(e.y + r * e.y_ld + v * kWidth, &sum[r][v], sizeof(V));
  } else {
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r)
      SENET_UNROLL(2)
      for (int v = 0; v < kVectors; ++v)
        store_columns(e.y + r * e.y_ld + v * kWidth, sum[r][v], e.columns - v * kWidth);
  }
}

// The depth of a product: `slices` pieces of `depth` each, in the maps `step` apart.
struct Depth {
  int64_t depth, slices = 1, step = 0;
};

template <int kRows, int kVectors>
void tile(const float* a, int64_t lda, const float* b, const Depth& d, const Epilogue& e) {
  constexpr int kSums = sums_of(kRows * kVectors);
  V sum[kSums][kRows][kVectors];
  SENET_UNROLL(4)
  for (int u = 0; u < kSums; ++u)
    SENET_UNROLL(16)
    for (int r = 0; r < kRows; ++r)
      SENET_UNROLL(2)
      for (int v = 0; v < kVectors; ++v) sum[u][r][v] = V{};
  for (int64_t i = 0; i < d.slices; ++i)
    add_product(a + i * d.step, lda, b + i * d.depth * kPanel, d.depth, sum);
  SENET_UNROLL(2)
  for (int half = kSums / 2; half > 0; half /= 2)
    SENET_UNROLL(2)
    for (int u = 0; u < half; ++u)
      SENET_UNROLL(16)
      for (int r = 0; r < kRows; ++r)
        SENET_UNROLL(2)
        for (int v = 0; v < kVectors; ++v) sum[u][r][v] += sum[u + half][r][v];
  finish(e, sum[0]);
}

using Tile = void (*)(const float*, int64_t, const float*, const Depth&, const Epilogue&);

template <int kVectors, int... kRows>
Tile tile_of_rows(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile tiles[] = {tile<kRows + 1, kVectors>...};
  return tiles[rows - 1];
}

// A tile whose depth is more than a run, one run after the other.
SENET_INLINE void run_by_run(Tile run, const float* a, int64_t lda, const float* b, const Depth& d,
                             Epilogue e) {
  float before[kTileRows * kPanel];
  Epilogue open = {kZeros, nullptr, nullptr, nullptr, before, 0, kPanel, kPanel, e.ending};
  open.ending.activation = Activation::kLinear;
  const int64_t depth = std::min(d.depth, kRun), slices = kRun / depth;  // of a run
  for (int64_t i = 0; i < d.slices; i += slices)
    for (int64_t k = 0; k < d.depth; k += depth) {
      const Depth part = {std::min(depth, d.depth - k), std::min(slices, d.slices - i), d.step};
      const bool last = i + slices >= d.slices && k + depth >= d.depth;
      run(a + i * d.step + k, lda, b + (i * d.depth + k) * kPanel, part, last ? e : open);
      open.before = e.before = before;
    }
}

// Rows [0, rows) of a times one panel, in tiles of nearly equal height.
inline void panel_product(const float* a, int64_t lda, int64_t rows, const float* b,
                          const Depth& depth, Epilogue e) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  const int64_t tiles = ceil_div(rows, kTileRows);
  const int64_t height = rows / tiles, taller = rows % tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t here = height + (i < taller);
    const Tile run = e.columns > kWidth ? tile_of_rows<2>(here, Rows{}) : tile_of_rows<1>(here, Rows{});
    depth.depth * depth.slices > kRun ? run_by_run(run, a, lda, b, depth, e) : run(a, lda, b, depth, e);
    if (!in_registers(e.ending)) activate(e.ending, e.y, e.y_ld, here, e.columns);
    a += here * lda;
    e.y += here * e.y_ld;
    if (e.shortcut) e.shortcut += here * e.shortcut_ld;
  }
}

}  // namespace
}  // namespace senet
