// 3x3 convolutions with stride 1 by Winograd's F(4x4, 3x3), see transforms.h: 4x4 outputs at a time in
// 36 products for each pair of channels instead of 144. The gradient of the input is the forward pass
// of y', the gradient of y, with the weights mirrored and transposed.
//
// Channels of a group of x and y are multiples of kGroup.
#pragma once

#include <algorithm>

#include "../memory.h"
#include "../threads.h"
#include "arguments.h"
#include "transforms.h"

namespace senet {
namespace {

constexpr int64_t kGroup = 16;
// Floats of transformed weights that are kept, and of transformed inputs that are there at once.
constexpr int64_t kKept = 600000, kSpan = 6000000;
constexpr int64_t kStrip = 128;  // channels of narrow groups that go together

// The tiles of a map of N images of OH x OW outputs.
struct Tiling {
  int64_t OH, OW, down, across, count;
  Tiling(int64_t N, int64_t h, int64_t w)
      : OH(h), OW(w), down(ceil_div(h, kOut)), across(ceil_div(w, kOut)), count(N * down * across) {}

  // Calls f(tile - first, image, first output row, first output column) for tiles [first, last).
  template <class F>
  void each(int64_t first, int64_t last, const F& f) const {
    int64_t column = first % across, row = first / across % down, n = first / across / down;
    for (int64_t t = first; t < last; ++t) {
      f(t - first, n, kOut * row, kOut * column);
      if (++column == across) {
        column = 0;
        if (++row == down) row = 0, ++n;
      }
    }
  }
};

// Numbers from one tap's to the next one's, for `count` numbers of each: an odd number of cache lines,
// so that the taps do not fall into the same few places of the cache.
SENET_INLINE int64_t tap_stride(int64_t count) { return round_up(count, 32) + 16; }

// Calls f(channel, at) for `count` channels of the patch whose corner is (h, w) of an image whose
// pixels are ld apart: at(i, j) are kWidth channels of its row i and column j; zeros outside.
template <class F>
SENET_INLINE void each_patch(const float* image, int64_t H, int64_t W, int64_t ld, int64_t h, int64_t w,
                             int64_t count, const float* zeros, const F& f) {
  if (h >= 0 && w >= 0 && h + kPatch <= H && w + kPatch <= W) {
    const float* corner = image + (h * W + w) * ld;
    for (int64_t c = 0; c < count; c += kWidth)
      f(c, [&](int i, int j) { return load<kWidth>(corner + (i * W + j) * ld + c); });
    return;
  }
  const float* places[kTaps];
  for (int i = 0; i < kTaps; ++i) {
    const int64_t y = h + i / kPatch, x = w + i % kPatch;
    places[i] = y >= 0 && y < H && x >= 0 && x < W ? image + (y * W + x) * ld : zeros;
  }
  for (int64_t c = 0; c < count; c += kWidth)
    f(c, [&](int i, int j) { return load<kWidth>(places[kPatch * i + j] + c); });
}

// Tiles of a block: what is transformed of it stays in the second-level cache.
inline int64_t block_tiles(int64_t taps, int64_t C, int64_t floats, int64_t most) {
  return std::max<int64_t>(12, std::min(most, floats / (taps * C) / 12 * 12));
}

// A Winograd convolution of x [N][H][W][groups][C] with zeros around: y [N][OH][OW][groups][K].
struct Winograd {
  const float* x;
  int64_t N, H, W, C;
  float* y;
  int64_t OH, OW, K, pad_h, pad_w, groups, threads;
  const float* weights;  // of each group [K][3][3][C], or, mirrored, [C][3][3][K]
  bool mirrored;
  int64_t x_ld = groups * C, y_ld = groups * K;

  // One group alone.
  Winograd alone(int64_t group) const {
    Winograd one = *this;
    one.groups = 1;
    one.x += group * C;
    one.y += group * K;
    one.weights += group * 9 * C * K;
    return one;
  }

  // Outputs that are transformed at a time.
  template <int64_t kTile>
  static constexpr int64_t kOutputs = std::min(kTile, kGroup);

  // kOutputs outputs from k on of kGroup inputs from c on: [tap][input][kTile], `step` between taps.
  template <int64_t kTile>
  void transform_weights(int64_t k, int64_t c, float* to, int64_t step) const {
    constexpr int kVectors = int(kOutputs<kTile> / kWidth);
    V w[kGroup][9][kVectors];  // [c][tap][k]
    for (int tap = 0; tap < 9; ++tap)
      for (int v = 0; v < kVectors; ++v)
        for (int64_t i = 0; i < kGroup; i += kWidth) {
          V rows[kWidth];
          for (int j = 0; j < kWidth; ++j)
            rows[j] = load<kWidth>(
                mirrored ? weights + ((c + i + j) * 9 + 8 - tap) * K + k + v * kWidth
                         : weights + ((k + v * kWidth + j) * 9 + tap) * C + c + i);
          if (!mirrored) transpose(rows);
          for (int j = 0; j < kWidth; ++j) w[i + j][tap][v] = rows[j];
        }
    for (int64_t i = 0; i < kGroup; ++i)
      for (int v = 0; v < kVectors; ++v) {
        float* place = to + i * kTile + v * kWidth;
        of_weights_2d([&](int row, int column) { return w[i][3 * row + column][v]; },
                      taps_at(place, step));
      }
  }

  template <int kRows, int kVectors>
  int run() const {
    const int64_t transformed = kTaps * C * round_up(K, kVectors * kWidth);
    if (transformed <= kKept) return run_keeping<kRows, kVectors>();
    int failed = 0;
    for (int64_t group = 0; group < groups && !failed; ++group)
      failed = alone(group).run_by_pieces<kRows, kVectors>();
    return failed;
  }

  // For weights of a group that stay in the cache: all weights are transformed first, then each block
  // of tiles goes from input to output.
  template <int kRows, int kVectors>
  int run_keeping() const {
    constexpr int64_t kTile = kVectors * kWidth;
    const Tiling tiling(N, OH, OW);
    const int64_t tiles = block_tiles(kTaps, C, 221184, 24), blocks = ceil_div(tiling.count, tiles);
    // Narrow groups that lie beside each other go together: a few numbers of each pixel at a time
    // would be slow to read and write.
    const int64_t strip = K % kTile ? 1 : std::min(groups, std::max<int64_t>(1, kStrip / C));
    const int64_t strips = ceil_div(groups, strip), tasks = strips * blocks;
    const int64_t team = std::min(std::max<int64_t>(1, threads), tasks);
    const int64_t pieces = ceil_div(K, kTile), in_stride = tap_stride(tiles * C);
    const int64_t held = strip > 1 ? strip * pieces : 1, out_stride = tap_stride(tiles * kTile);
    const int64_t own = kTaps * (strip * in_stride + held * out_stride);
    const int64_t weights_size = pieces * kTaps * C * kTile;
    float* memory = scratch<float>(groups * weights_size + strip * C + team * own);
    if (!memory) return 1;
    float *u = memory, *zeros = u + groups * weights_size, *work = zeros + strip * C;
    std::fill(zeros, zeros + strip * C, 0.0f);
    int64_t next = 0, transformed = 0;
    parallel(team, [&](const Member& member) {
      const int64_t across = C / kGroup, each = K / kOutputs<kTile> * across;
      for (int64_t i; (i = take_number(transformed)) < groups * each;) {
        const int64_t group = i / each, k = i % each / across * kOutputs<kTile>;
        const int64_t c = i % across * kGroup;
        float* to = u + group * weights_size + (k / kTile * kTaps * C + c) * kTile + k % kTile;
        alone(group).transform_weights<kTile>(k, c, to, C * kTile);
      }
      member.barrier();
      float *in = work + member.id * own, *products = in + strip * kTaps * in_stride;
      for (int64_t task; (task = take_number(next)) < tasks;) {
        const int64_t group = task % strips * strip, beside = std::min(strip, groups - group);
        const int64_t first = task / strips * tiles, last = std::min(tiling.count, first + tiles);
        const Winograd one = alone(group);
        one.transform_inputs(tiling, first, last, beside * C, C, in_stride, zeros, in);
        for (int64_t piece = 0; piece < beside * pieces; ++piece) {
          const float* from = in + piece / pieces * kTaps * in_stride;
          const float* taps = u + group * weights_size + piece * kTaps * C * kTile;
          float* to = products + piece % held * kTaps * out_stride;
          add_products<kRows, kVectors>(last - first, from, C, in_stride, C, taps, C * kTile, to,
                                        out_stride, true);
          if (held == 1)
            one.transform_outputs<kTile>(tiling, first, last, out_stride, piece * kTile,
                                         std::min(kTile, K - piece * kTile), to);
        }
        if (held > 1)
          one.transform_outputs<kTile>(tiling, first, last, out_stride, 0, beside * K, products);
      }
    });
    return 0;
  }

  // For weights that would not stay there: the inputs are transformed first, then each block of tiles
  // and piece of outputs transforms the weights as it needs them.
  template <int kRows, int kVectors>
  int run_by_pieces() const {
    constexpr int64_t kTile = kVectors * kWidth, kDepth = 32, kBlock = 60;
    const Tiling tiling(N, OH, OW);
    const int64_t chunks = ceil_div(C, kDepth), pieces = ceil_div(K, kTile);
    // Tiles of a span, whose transformed inputs are there at once, and of a block.
    const int64_t span = std::min(
        tiling.count, std::max(kBlock, kSpan / (kTaps * chunks * kDepth) / kBlock * kBlock));
    const int64_t spans = ceil_div(tiling.count, span);
    const int64_t block = round_up(ceil_div(span, ceil_div(span, kBlock)), kRows);
    const int64_t tasks = ceil_div(span, block) * pieces, groups = ceil_div(span, kGroup);
    const int64_t in_stride = tap_stride(span * kDepth), out_stride = tap_stride(block * kTile);
    const int64_t weights_stride = tap_stride(kDepth * kTile);
    const int64_t team = std::min(std::max<int64_t>(1, threads), std::max(tasks, groups));
    const int64_t inputs = chunks * kTaps * in_stride, own = kTaps * (out_stride + weights_stride);
    float* memory = scratch<float>(inputs + C + team * own);
    if (!memory) return 1;
    float *in = memory, *zeros = in + inputs, *work = zeros + C;
    std::fill(zeros, zeros + C, 0.0f);
    int64_t next_group = 0, next_task = 0;
    parallel(team, [&](const Member& member) {
      float *products = work + member.id * own, *u = products + kTaps * out_stride;
      // A number beyond those of a span is kept for the next one.
      int64_t group = take_number(next_group), task = take_number(next_task);
      for (int64_t s = 0; s < spans; ++s) {
        const int64_t begin = s * span, end = std::min(tiling.count, begin + span);
        for (; group < (s + 1) * groups; group = take_number(next_group)) {
          const int64_t first = begin + (group - s * groups) * kGroup;
          transform_inputs(tiling, first, std::min(end, first + kGroup), C, kDepth, in_stride, zeros,
                           in + (first - begin) * kDepth);
        }
        member.barrier();
        for (; task < (s + 1) * tasks; task = take_number(next_task)) {
          const int64_t piece = (task - s * tasks) % pieces;
          const int64_t first = begin + (task - s * tasks) / pieces * block;
          const int64_t last = std::min(end, first + block);
          for (int64_t c = 0; c < C && first < last; c += kDepth) {
            const int64_t depth = std::min(kDepth, C - c);
            for (int64_t k = piece * kTile; k < std::min(K, (piece + 1) * kTile);
                 k += kOutputs<kTile>)
              for (int64_t i = 0; i < depth; i += kGroup)
                transform_weights<kTile>(k, c + i, u + i * kTile + k % kTile, weights_stride);
            const float* from = in + c / kDepth * kTaps * in_stride + (first - begin) * kDepth;
            add_products<kRows, kVectors>(last - first, from, kDepth, in_stride, depth, u,
                                          weights_stride, products, out_stride, c == 0);
          }
          transform_outputs<kTile>(tiling, first, last, out_stride, piece * kTile,
                                   std::min(kTile, K - piece * kTile), products);
        }
        member.barrier();
      }
    });
    return 0;
  }

  // products [tap][tile][kTile] (+)= in [tap][tile][depth] times u [tap][depth][kTile].
  template <int kRows, int kVectors>
  static void add_products(int64_t tiles, const float* in, int64_t in_ld, int64_t in_stride,
                           int64_t depth, const float* u, int64_t u_stride, float* products,
                           int64_t out_stride, bool first) {
    constexpr int64_t kTile = kVectors * kWidth;
    for (int64_t tap = 0; tap < kTaps; ++tap)
      for (int64_t t = 0; t < tiles; t += kRows)
        multiply_of<kRows, kVectors>(std::min<int64_t>(kRows, tiles - t))(
            in + tap * in_stride + t * in_ld, in_ld, depth, u + tap * u_stride,
            products + tap * out_stride + t * kTile, kTile, first);
  }

  // `count` channels, [chunk of `depth` channels][tap][tile][depth].
  void transform_inputs(const Tiling& tiling, int64_t first, int64_t last, int64_t count,
                        int64_t depth, int64_t stride, const float* zeros, float* to) const {
    tiling.each(first, last, [&](int64_t t, int64_t image, int64_t h, int64_t w) {
      float* place = to + t * depth;
      int64_t left = depth;  // of the chunk
      each_patch(x + image * H * W * x_ld, H, W, x_ld, h - pad_h, w - pad_w, count, zeros,
                 [&](int64_t, const auto& at) {
                   to_products_2d(at, taps_at(place, stride));
                   place += kWidth, left -= kWidth;
                   if (!left) place += kTaps * stride - depth, left = depth;
                 });
    });
  }

  // `count` channels from k on, of products [piece of kTile channels][tap][tile][kTile].
  template <int64_t kTile>
  void transform_outputs(const Tiling& tiling, int64_t first, int64_t last, int64_t stride, int64_t k,
                         int64_t count, const float* products) const {
    tiling.each(first, last, [&](int64_t t, int64_t image, int64_t h, int64_t w) {
      float* corner = y + ((image * OH + h) * OW + w) * y_ld + k;
      const int64_t down = OH - h, right = OW - w;
      for (int64_t c = 0; c < count; c += kWidth) {
        const float* from = products + c / kTile * kTaps * stride + t * kTile + c % kTile;
        const auto at = [&](int i, int j) { return load<kWidth>(from + (kPatch * i + j) * stride); };
        if (down >= kOut && right >= kOut)
          to_outputs_2d(at, [&](int i, int j, V value) {
            std::memcpy(corner + c + (i * OW + j) * y_ld, &value, sizeof(V));
          });
        else
          to_outputs_2d(at, [&](int i, int j, V value) {
            if (i < down && j < right)
              std::memcpy(corner + c + (i * OW + j) * y_ld, &value, sizeof(V));
          });
      }
    });
  }
};

inline int forward(const ConvolutionArguments& a) {
  const int64_t C = a.C / a.groups, K = a.K / a.groups;
  const Winograd run{a.x, a.N,     a.H,     a.W,      C,         a.y,       a.OH, a.OW,
                     K,   a.pad_h, a.pad_w, a.groups, a.threads, a.weights, false};
  return with_tile(K, [&](auto rows, auto vectors) { return run.run<rows, vectors>(); });
}

// x is written.
inline int input_gradient(const ConvolutionArguments& a) {
  const int64_t C = a.C / a.groups, K = a.K / a.groups;
  const Winograd run{a.y, a.N,         a.OH,        a.OW,     K,         a.x,       a.H, a.W,
                     C,   2 - a.pad_h, 2 - a.pad_w, a.groups, a.threads, a.weights, true};
  return with_tile(C, [&](auto rows, auto vectors) { return run.run<rows, vectors>(); });
}

// What the gradient of the weights is summed over, see weights.h: the tiles.
struct Tiles {
  static constexpr int64_t kTaps = senet::kTaps, kWeights = 9, kChunk = 64, kMost = 96;

  const ConvolutionArguments& a;
  const Tiling tiling;

  explicit Tiles(const ConvolutionArguments& arguments)
      : a(arguments), tiling(a.N, a.OH, a.OW) {}
  int64_t count() const { return tiling.count; }

  // Channels [from, from + count) of x; place(tile - first, channel - from) is where the first tap of
  // kWidth of them goes, the next ones `stride` apart.
  template <class Place>
  void inputs(int64_t first, int64_t last, int64_t from, int64_t count, int64_t stride,
              const float* zeros, const Place& place) const {
    tiling.each(first, last, [&](int64_t t, int64_t image, int64_t h, int64_t w) {
      each_patch(a.x + image * a.H * a.W * a.C + from, a.H, a.W, a.C, h - a.pad_h, w - a.pad_w,
                 count, zeros, [&](int64_t c, const auto& at) {
                   to_products_2d(at, taps_at(place(t, c), stride));
                 });
    });
  }

  // The same of y, and zeros for the channels from `count` up to `whole`.
  template <class Place>
  void gradient(int64_t first, int64_t last, int64_t from, int64_t count, int64_t whole,
                int64_t stride, const float* zeros, const Place& place) const {
    tiling.each(first, last, [&](int64_t t, int64_t image, int64_t h, int64_t w) {
      const float* corner = a.y + ((image * a.OH + h) * a.OW + w) * a.K + from;
      const int64_t down = a.OH - h, right = a.OW - w;
      const bool inside = down >= kOut && right >= kOut;
      for (int64_t k = 0; k < whole; k += kWidth) {
        const auto put = taps_at(place(t, k), stride);
        const auto there = [&](int i, int j) { return corner + (i * a.OW + j) * a.K + k; };
        if (inside && k < count)
          of_outputs_2d([&](int i, int j) { return load<kWidth>(there(i, j)); }, put);
        else
          of_outputs_2d(
              [&](int i, int j) {
                return load<kWidth>(i < down && j < right && k < count ? there(i, j) : zeros);
              },
              put);
      }
    });
  }

  // Weights put(number, vector) from the sums at(tap).
  template <class At, class Put>
  static void weights(const At& at, const Put& put) {
    to_weights_2d([&](int i, int j) { return at(kPatch * i + j); },
                  [&](int i, int j, V value) { put(3 * i + j, value); });
  }
};

}  // namespace
}  // namespace senet
