// 3x3 convolutions with stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): 2x2
// outputs at a time in 16 products for each pair of channels instead of 36. Of the transforms known
// it is the one whose rounding errors stay at those of the plain sum.
//
//   forward:   y  = A'[(G w G') * (B' x B)]A
//   weights:   dw = G'[sum over tiles of (B' x B) * (A y' A')]G
//   input: the forward pass of y', the gradient of y, with the weights mirrored and transposed
//
// Channels of x and y are multiples of kGroup.
#pragma once

#include <algorithm>

#include "../memory.h"
#include "../threads.h"
#include "arguments.h"
#include "tiles.h"

namespace senet {
namespace {

constexpr int64_t kGroup = 16, kTaps = 16;

// B'd, A'm, Ag, Gw, G'm along one axis.
template <class T>
SENET_INLINE void to_products(const T* d, int s, T* out, int t) {
  out[0] = d[0] - d[2 * s];
  out[t] = d[s] + d[2 * s];
  out[2 * t] = d[2 * s] - d[s];
  out[3 * t] = d[s] - d[3 * s];
}
template <class T>
SENET_INLINE void to_outputs(const T* m, int s, T* out, int t) {
  out[0] = m[0] + m[s] + m[2 * s];
  out[t] = m[s] - m[2 * s] - m[3 * s];
}
template <class T>
SENET_INLINE void of_outputs(const T* g, int s, T* out, int t) {
  out[0] = g[0];
  out[t] = g[0] + g[s];
  out[2 * t] = g[0] - g[s];
  out[3 * t] = -g[s];
}
template <class T>
SENET_INLINE void of_weights(const T* w, int s, T* out, int t) {
  const T ends = (w[0] + w[2 * s]) * 0.5f, middle = w[s] * 0.5f;
  out[0] = w[0];
  out[t] = ends + middle;
  out[2 * t] = ends - middle;
  out[3 * t] = w[2 * s];
}
template <class T>
SENET_INLINE void to_weights(const T* m, int s, T* out, int t) {
  const T half = (m[s] + m[2 * s]) * 0.5f;
  out[0] = m[0] + half;
  out[t] = (m[s] - m[2 * s]) * 0.5f;
  out[2 * t] = half + m[3 * s];
}

// Both axes of kFrom x kFrom numbers, row by row, become kTo x kTo.
#define SENET_BOTH_AXES(axis, kFrom, kTo)                              \
  template <class T>                                                   \
  SENET_INLINE void axis##_2d(const T* in, T* out) {                   \
    T half[(kTo) * (kFrom)];                                           \
    SENET_UNROLL(4)                                                    \
    for (int j = 0; j < (kFrom); ++j) axis(in + j, kFrom, half + j, kFrom); \
    SENET_UNROLL(4)                                                    \
    for (int i = 0; i < (kTo); ++i) axis(half + i * (kFrom), 1, out + i * (kTo), 1); \
  }
SENET_BOTH_AXES(to_products, 4, 4)
SENET_BOTH_AXES(to_outputs, 4, 2)
SENET_BOTH_AXES(of_outputs, 2, 4)
SENET_BOTH_AXES(of_weights, 3, 4)
SENET_BOTH_AXES(to_weights, 4, 3)
#undef SENET_BOTH_AXES

// The 2x2 tiles of a map of N images of OH x OW outputs.
struct Tiling {
  int64_t OH, OW, down, across, count;
  Tiling(int64_t N, int64_t h, int64_t w)
      : OH(h), OW(w), down(ceil_div(h, 2)), across(ceil_div(w, 2)), count(N * down * across) {}

  // Calls f(tile - first, image, first output row, first output column) for tiles [first, last).
  template <class F>
  void each(int64_t first, int64_t last, const F& f) const {
    int64_t column = first % across, row = first / across % down, n = first / across / down;
    for (int64_t t = first; t < last; ++t) {
      f(t - first, n, 2 * row, 2 * column);
      if (++column == across) {
        column = 0;
        if (++row == down) row = 0, ++n;
      }
    }
  }
};

// Numbers from one tap's to the next one's, for `count` numbers of each: an odd number of cache lines,
// so that the 16 taps do not fall into the same few places of the cache.
SENET_INLINE int64_t tap_stride(int64_t count) { return round_up(count, 32) + 16; }

// Calls f(channel, 16 vectors) for `count` channels of the 4x4 patch whose corner is (h, w) of an
// image of C channels; zeros outside.
template <class F>
SENET_INLINE void each_patch(const float* image, int64_t H, int64_t W, int64_t C, int64_t h, int64_t w,
                             int64_t count, const float* zeros, const F& f) {
  if (h >= 0 && w >= 0 && h + 4 <= H && w + 4 <= W) {
    const float* corner = image + (h * W + w) * C;
    for (int64_t c = 0; c < count; c += kWidth) {
      V d[16];
      SENET_UNROLL(4)
      for (int i = 0; i < 4; ++i)
        SENET_UNROLL(4)
        for (int j = 0; j < 4; ++j) d[4 * i + j] = load<kWidth>(corner + i * W * C + j * C + c);
      f(c, d);
    }
    return;
  }
  const float* at[16];
  for (int i = 0; i < 16; ++i) {
    const int64_t y = h + i / 4, x = w + i % 4;
    at[i] = y >= 0 && y < H && x >= 0 && x < W ? image + (y * W + x) * C : zeros;
  }
  for (int64_t c = 0; c < count; c += kWidth) {
    V d[16];
    SENET_UNROLL(16)
    for (int i = 0; i < 16; ++i) d[i] = load<kWidth>(at[i] + c);
    f(c, d);
  }
}

// Tiles of a block: what is transformed of it stays in the second-level cache.
inline int64_t block_tiles(int64_t C, int64_t floats, int64_t most) {
  return std::max<int64_t>(12, std::min(most, floats / (kTaps * C) / 12 * 12));
}

// A Winograd convolution of x [N][H][W][C] with zeros around: y [N][OH][OW][K].
struct Winograd {
  const float* x;
  int64_t N, H, W, C;
  float* y;
  int64_t OH, OW, K, pad_h, pad_w, threads;
  const float* weights;  // [K][3][3][C], or, mirrored, [C][3][3][K]
  bool mirrored;

  // U, [tile of outputs][tap][C][kTile]: outputs [k, k + kGroup) of inputs [c, c + kGroup).
  template <int64_t kTile>
  void transform_weights(int64_t k, int64_t c, float* u) const {
    V w[kGroup][9][kGroup / kWidth];  // [c][tap][k]
    for (int64_t i = 0; i < kGroup; ++i) {
      for (int tap = 0; tap < 9; ++tap) {
        float row[kGroup];
        if (mirrored) {
          std::memcpy(row, weights + ((c + i) * 9 + 8 - tap) * K + k, sizeof row);
        } else {
          for (int64_t j = 0; j < kGroup; ++j) row[j] = weights[((k + j) * 9 + tap) * C + c + i];
        }
        std::memcpy(w[i][tap], row, sizeof row);
      }
    }
    for (int v = 0; v < kGroup / kWidth; ++v) {
      const int64_t first = k + v * kWidth;
      float* to = u + (first / kTile * kTaps * C + c) * kTile + first % kTile;
      for (int64_t i = 0; i < kGroup; ++i) {
        V in[9], out[16];
        for (int tap = 0; tap < 9; ++tap) in[tap] = w[i][tap][v];
        of_weights_2d(in, out);
        for (int tap = 0; tap < 16; ++tap)
          std::memcpy(to + (tap * C + i) * kTile, &out[tap], sizeof(V));
      }
    }
  }

  template <int kRows, int kVectors>
  int run() const {
    constexpr int64_t kTile = kVectors * kWidth;
    const Tiling tiling(N, OH, OW);
    const int64_t tiles = block_tiles(C, 147456, 48), blocks = ceil_div(tiling.count, tiles);
    const int64_t team = std::min(std::max<int64_t>(1, threads), blocks);
    const int64_t pieces = ceil_div(K, kTile), in_stride = tap_stride(tiles * C);
    const int64_t out_stride = tap_stride(tiles * kTile), own = kTaps * (in_stride + out_stride);
    const int64_t weights_size = pieces * kTaps * C * kTile;
    float* memory = scratch<float>(weights_size + C + team * own);
    if (!memory) return 1;
    float *u = memory, *zeros = u + weights_size, *work = zeros + C;
    std::fill(zeros, zeros + C, 0.0f);
    int64_t next = 0, transformed = 0;
    parallel(team, [&](const Member& member) {
      const int64_t across = C / kGroup;
      for (int64_t i; (i = take_number(transformed)) < K / kGroup * across;)
        transform_weights<kTile>(i / across * kGroup, i % across * kGroup, u);
      member.barrier();
      float *in = work + member.id * own, *products = in + kTaps * in_stride;
      for (int64_t block; (block = take_number(next)) < blocks;) {
        const int64_t first = block * tiles, last = std::min(tiling.count, first + tiles);
        transform_inputs(tiling, first, last, in_stride, zeros, in);
        for (int64_t piece = 0; piece < pieces; ++piece) {
          for (int64_t tap = 0; tap < kTaps; ++tap)
            for (int64_t t = 0; t < last - first; t += kRows)
              multiply_of<kRows, kVectors>(std::min<int64_t>(kRows, last - first - t))(
                  in + tap * in_stride + t * C, C, C, u + (piece * kTaps + tap) * C * kTile,
                  products + tap * out_stride + t * kTile, kTile, kTile);
          transform_outputs<kTile>(tiling, first, last, out_stride, piece * kTile, products);
        }
      }
    });
    return 0;
  }

  // [tap][tile][C].
  void transform_inputs(const Tiling& tiling, int64_t first, int64_t last, int64_t stride,
                        const float* zeros, float* to) const {
    tiling.each(first, last, [&](int64_t t, int64_t n, int64_t h, int64_t w) {
      each_patch(x + n * H * W * C, H, W, C, h - pad_h, w - pad_w, C, zeros, [&](int64_t c, const V* d) {
        V out[16];
        to_products_2d(d, out);
        SENET_UNROLL(16)
        for (int tap = 0; tap < 16; ++tap)
          std::memcpy(to + tap * stride + t * C + c, &out[tap], sizeof(V));
      });
    });
  }

  template <int64_t kTile>
  void transform_outputs(const Tiling& tiling, int64_t first, int64_t last, int64_t stride, int64_t k,
                         const float* products) const {
    const int64_t count = std::min(kTile, K - k);
    tiling.each(first, last, [&](int64_t t, int64_t n, int64_t h, int64_t w) {
      float* corner = y + ((n * OH + h) * OW + w) * K + k;
      const bool below = h + 1 < OH, right = w + 1 < OW;
      for (int64_t c = 0; c < count; c += kWidth) {
        V m[16], out[4];
        SENET_UNROLL(16)
        for (int tap = 0; tap < 16; ++tap)
          m[tap] = load<kWidth>(products + tap * stride + t * kTile + c);
        to_outputs_2d(m, out);
        float* to = corner + c;
        std::memcpy(to, &out[0], sizeof(V));
        if (right) std::memcpy(to + K, &out[1], sizeof(V));
        if (below) std::memcpy(to + OW * K, &out[2], sizeof(V));
        if (below && right) std::memcpy(to + (OW + 1) * K, &out[3], sizeof(V));
      }
    });
  }
};

inline int forward(const ConvolutionArguments& a) {
  const Winograd run{a.x,  a.N,  a.H, a.W,     a.C,     a.y,       a.OH,
                     a.OW, a.K,  a.pad_h, a.pad_w, a.threads, a.weights, false};
  return with_tile(a.K, [&](auto rows, auto vectors) { return run.run<rows, vectors>(); });
}

// x is written.
inline int input_gradient(const ConvolutionArguments& a) {
  const Winograd run{a.y, a.N, a.OH,        a.OW,        a.K,       a.x,       a.H,
                     a.W, a.C, 2 - a.pad_h, 2 - a.pad_w, a.threads, a.weights, true};
  return with_tile(a.C, [&](auto rows, auto vectors) { return run.run<rows, vectors>(); });
}

// The gradient of the weights. Tiles are cut into parts, C and K into chunks; a task is one of each,
// with sums of its own, [tap][channel of x][channel of y]. The cut depends on the shape only, and parts
// are merged in their order: the result does not depend on the threads.
template <int kRows, int kVectors>
struct WinogradWeights {
  static constexpr int64_t kTile = kVectors * kWidth, kChunk = std::max<int64_t>(64, kTile);
  static_assert(kGroup % kRows == 0 && kChunk % kTile == 0 && kChunk % kGroup == 0);

  const ConvolutionArguments& a;
  const Tiling tiling;
  int64_t width, height;  // channels of a chunk of y, of x
  int64_t across, down;   // chunks of y, of x
  int64_t parts, tiles, x_stride, y_stride;

  explicit WinogradWeights(const ConvolutionArguments& arguments)
      : a(arguments), tiling(a.N, a.OH, a.OW) {
    width = std::min(round_up(a.K, kTile), kChunk);
    height = std::min(a.C, kChunk);
    across = ceil_div(a.K, width);
    down = ceil_div(a.C, height);
    tiles = block_tiles(height, 98304, 96);
    parts = std::min(ceil_div(16, across * down), ceil_div(tiling.count, tiles));
    x_stride = tap_stride(tiles * height);
    y_stride = tap_stride(tiles * width);
  }

  int64_t chunks() const { return across * down; }
  int64_t sums_of_task() const { return kTaps * height * width; }

  int run() const {
    const int64_t tasks = parts * chunks();
    const int64_t team = std::min(std::max<int64_t>(1, a.threads), tasks);
    const int64_t own = kTaps * (x_stride + y_stride);
    float* sums = scratch<float>(tasks * sums_of_task() + kChunk + team * own);
    if (!sums) return 1;
    float *zeros = sums + tasks * sums_of_task(), *work = zeros + kChunk;
    std::fill(zeros, zeros + kChunk, 0.0f);
    int64_t next = 0, merged = 0;
    parallel(team, [&](const Member& member) {
      float *x = work + member.id * own, *y = x + kTaps * x_stride;
      for (int64_t task; (task = take_number(next)) < tasks;)
        add_part(task / chunks(), task % chunks(), sums + task * sums_of_task(), zeros, x, y);
      member.barrier();
      const int64_t groups = a.C / kGroup;
      for (int64_t i; (i = take_number(merged)) < a.K / kGroup * groups;)
        merge(i / groups * kGroup, i % groups * kGroup, sums);
    });
    return 0;
  }

  void add_part(int64_t part, int64_t chunk, float* sums, const float* zeros, float* x,
                float* y) const {
    const int64_t from = tiling.count * part / parts, end = tiling.count * (part + 1) / parts;
    const int64_t c = chunk / across * height, k = chunk % across * width, none = 0;
    const int64_t rows = std::min(height, a.C - c), columns = std::min(width, a.K - k);
    for (int64_t first = from; first < end; first += tiles) {
      const int64_t last = std::min(end, first + tiles);
      transform_inputs(first, last, c, rows, zeros, x);
      transform_gradient(first, last, k, columns, zeros, y);
      for (int64_t tap = 0; tap < kTaps; ++tap)
        for (int64_t j = 0; j < columns; j += kTile)
          for (int64_t i = 0; i < rows; i += kRows)
            add_outer_products<kRows, kVectors>(
                x + tap * x_stride + i / kGroup * kGroup * tiles + i % kGroup, kGroup, &none, 1,
                last - first, y + tap * y_stride + j * tiles, sums + (tap * height + i) * width + j,
                width, first == from);
    }
  }

  // Channels [from, from + count) of x, [tap][group of channels][tile][kGroup].
  void transform_inputs(int64_t first, int64_t last, int64_t from, int64_t count, const float* zeros,
                        float* to) const {
    tiling.each(first, last, [&](int64_t t, int64_t n, int64_t h, int64_t w) {
      each_patch(a.x + n * a.H * a.W * a.C + from, a.H, a.W, a.C, h - a.pad_h, w - a.pad_w, count,
                 zeros, [&](int64_t c, const V* d) {
                   V out[16];
                   to_products_2d(d, out);
                   float* place = to + c / kGroup * kGroup * tiles + t * kGroup + c % kGroup;
                   SENET_UNROLL(16)
                   for (int tap = 0; tap < 16; ++tap)
                     std::memcpy(place + tap * x_stride, &out[tap], sizeof(V));
                 });
    });
  }

  // Channels [from, from + count) of y, [tap][tile of channels][tile][kTile], filled up by zeros.
  void transform_gradient(int64_t first, int64_t last, int64_t from, int64_t count,
                          const float* zeros, float* to) const {
    const int64_t K = a.K, whole = round_up(count, kTile);
    tiling.each(first, last, [&](int64_t t, int64_t n, int64_t h, int64_t w) {
      const float* corner = a.y + ((n * a.OH + h) * a.OW + w) * K + from;
      const bool below = h + 1 < a.OH, right = w + 1 < a.OW;
      const float* at[4] = {corner, right ? corner + K : zeros, below ? corner + a.OW * K : zeros,
                            below && right ? corner + (a.OW + 1) * K : zeros};
      for (int64_t k = 0; k < whole; k += kWidth) {
        V g[4], out[16];
        for (int i = 0; i < 4; ++i) g[i] = k < count ? load<kWidth>(at[i] + k) : V{};
        of_outputs_2d(g, out);
        float* place = to + k / kTile * kTile * tiles + t * kTile + k % kTile;
        SENET_UNROLL(16)
        for (int tap = 0; tap < 16; ++tap)
          std::memcpy(place + tap * y_stride, &out[tap], sizeof(V));
      }
    });
  }

  // Adds up the parts of kGroup outputs and inputs, and turns [c][k] into [k][tap][c].
  void merge(int64_t k, int64_t c, const float* sums) const {
    float block[9][kGroup][kGroup];
    const float* from = sums + (c / height * across + k / width) * sums_of_task() +
                        c % height * width + k % width;
    for (int64_t i = 0; i < kGroup; ++i)
      for (int64_t v = 0; v < kGroup; v += kWidth) {
        V m[16], out[9];
        for (int tap = 0; tap < 16; ++tap) {
          const float* p = from + (tap * height + i) * width + v;
          m[tap] = load<kWidth>(p);
          for (int64_t part = 1; part < parts; ++part)
            m[tap] += load<kWidth>(p + part * chunks() * sums_of_task());
        }
        to_weights_2d(m, out);
        for (int tap = 0; tap < 9; ++tap) std::memcpy(&block[tap][i][v], &out[tap], sizeof(V));
      }
    for (int64_t j = 0; j < kGroup; ++j)
      for (int tap = 0; tap < 9; ++tap)
        for (int64_t i = 0; i < kGroup; ++i)
          a.weights[((k + j) * 9 + tap) * a.C + c + i] = block[tap][i][j];
  }
};

inline int weights_gradient(const ConvolutionArguments& a) {
#if SENET_REGISTERS == 32
  if (a.K <= kWidth) return WinogradWeights<16, 1>(a).run();
  if (a.K <= 2 * kWidth) return WinogradWeights<8, 2>(a).run();
  return WinogradWeights<4, 4>(a).run();
#else
  return WinogradWeights<4, 2>(a).run();
#endif
}

}  // namespace
}  // namespace senet
