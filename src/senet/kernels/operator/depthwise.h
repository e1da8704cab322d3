// Depthwise convolution of channels_last float32 maps: forward, gradient of the input, of the weights.
// A vector spans channels; nothing is padded or copied. The first two are one algorithm: a row of
// results, each the sum over taps of a neighbour's vector times a weight's. Where all taps are inside
// the map eight results are kept in registers; those at the edges go one by one.
#pragma once

#include "plan.h"

namespace senet {
namespace {

// Input element `in` steps away from the result's own one, times weights[w]; both count floats. It is
// `shift` pixels beside it.
struct Tap {
  int64_t in, w, shift;
};
constexpr int64_t kMostTaps = 7 * 7;

// The pixels that the next rows of results will be the first to read. They are fetched while this one
// is computed: the processor does not foresee steps of a whole pixel.
struct Ahead {
  const float* from = nullptr;
  int64_t pixels = 0, C = 0;

  // Channels from c on, where a cache line of them begins.
  SENET_INLINE void fetch_line(int64_t c) const {
    if (c % int64_t(64 / sizeof(float))) return;
    for (int64_t p = 0; p < pixels; ++p) fetch(from + p * C + c);
  }
};

// Results [0, B) for V vectors of channels from c on. Without the loops unrolled GCC keeps the sums in
// memory.
template <int B, int V, int W>
SENET_INLINE void results(const Tap* taps, int64_t count, const float* in, int64_t in_step,
                          const float* weights, float* out, int64_t out_step, int64_t c) {
  Vector<float, W> sum[B][V];
  SENET_UNROLL(8)
  for (int b = 0; b < B; ++b)
    SENET_UNROLL(4)
    for (int v = 0; v < V; ++v) sum[b][v] = Vector<float, W>{};
  for (int64_t t = 0; t < count; ++t) {
    const float *from = in + taps[t].in + c, *w = weights + taps[t].w + c;
    SENET_UNROLL(4)
    for (int v = 0; v < V; ++v) {
      const Vector<float, W> factor = load<W>(w + v * W);
      SENET_UNROLL(8)
      for (int b = 0; b < B; ++b) sum[b][v] += factor * load<W>(from + b * in_step + v * W);
    }
  }
  SENET_UNROLL(8)
  for (int b = 0; b < B; ++b)
    SENET_UNROLL(4)
    for (int v = 0; v < V; ++v) store(out + b * out_step + c + v * W, sum[b][v]);
}

template <int B, int V>
void results_of(const Tap* taps, int64_t count, const float* in, int64_t in_step,
                const float* weights, float* out, int64_t out_step, int64_t c, int64_t end,
                const Ahead& ahead = {}) {
  constexpr int W = kLanes<float>;
  for (; c + V * W <= end; c += V * W) {
    ahead.fetch_line(c);
    results<B, V, W>(taps, count, in, in_step, weights, out, out_step, c);
  }
  for (; c + W <= end; c += W)
    results<B, 1, W>(taps, count, in, in_step, weights, out, out_step, c);
  if constexpr (W > 8)
    for (; c + 8 <= end; c += 8)
      results<B, 1, 8>(taps, count, in, in_step, weights, out, out_step, c);
  for (; c < end; ++c) results<B, 1, 1>(taps, count, in, in_step, weights, out, out_step, c);
}

// One row of results at out + j * out_step, j in [0, J), from a row of `width` pixels: j lies at pixel
// j * pixel_step of it. `ahead`: pixels to fetch for each result, from `next` floats into the map on.
struct Row {
  int64_t J, width, C, pixel_step, out_step, ahead = 0, next = 0, count = 0;
  Tap taps[kMostTaps] = {};

  void add(int64_t row_start, int64_t shift, int64_t w) {
    taps[count++] = {row_start + shift * C, w, shift};
  }
  bool holds(int64_t j, const Tap& tap) const {
    const int64_t at = j * pixel_step + tap.shift;
    return at >= 0 && at < width;
  }
  bool covers(int64_t j) const {
    for (int64_t t = 0; t < count; ++t)
      if (!holds(j, taps[t])) return false;
    return true;
  }
  void run(const float* in, const float* weights, float* out, int64_t strip) const {
    int64_t first = 0, last = J;  // results that have all taps
    while (first < J && !covers(first)) ++first;
    while (last > first && !covers(last - 1)) --last;
    const int64_t step = pixel_step * C;
    for (int64_t c0 = 0; c0 < C; c0 += strip) {
      const int64_t c1 = std::min(C, c0 + strip);
      int64_t j = first;
      for (; j + 8 <= last; j += 8)
        results_of<8, 1>(taps, count, in + j * step, step, weights, out + j * out_step,
                         out_step, c0, c1, {in + next + j * ahead * C, 8 * ahead, C});
      for (; j + 4 <= last; j += 4)
        results_of<4, 2>(taps, count, in + j * step, step, weights, out + j * out_step,
                         out_step, c0, c1);
      for (; j < last; ++j)
        results_of<1, 4>(taps, count, in + j * step, step, weights, out + j * out_step,
                         out_step, c0, c1);
    }
    for (int64_t j = 0; j < J; ++j) {
      if (j >= first && j < last) continue;
      Tap inside[kMostTaps];
      int64_t held = 0;
      for (int64_t t = 0; t < count; ++t)
        if (holds(j, taps[t])) inside[held++] = taps[t];
      results_of<1, 4>(inside, held, in + j * step, step, weights, out + j * out_step, out_step, 0, C);
    }
  }
};

// Channels of which as many rows as the kernel has stay in the second-level cache; fewer, for the
// first-level one, are parts of pixels and come from memory slower.
inline int64_t strip_of(const DepthwiseArguments& a, int64_t width) {
  const int64_t fit = (192 << 10) / (4 * a.kernel * std::max<int64_t>(1, width));
  return std::max<int64_t>(kLanes<float>, fit / kLanes<float> * kLanes<float>);
}

// weights (C, k * k) as (k * k, C).
inline void pack_weights(const DepthwiseArguments& a, float* to) {
  const float* from = static_cast<const float*>(a.weights);
  const int64_t T = a.kernel * a.kernel;
  for (int64_t c = 0; c < a.C; ++c)
    for (int64_t t = 0; t < T; ++t) to[t * a.C + c] = from[c * T + t];
}

inline int threads_for(const DepthwiseArguments& a, int64_t tasks) {
  const int64_t worthwhile = a.N * a.OH * a.OW * a.C * a.kernel * a.kernel / (1 << 16) + 1;
  return int(std::min(std::min(tasks, worthwhile), std::max<int64_t>(1, a.threads)));
}

inline int depthwise_forward(const DepthwiseArguments& a) {
  float* const weights = static_cast<float*>(a.packed);
  pack_weights(a, weights);
  parallel(threads_for(a, a.N * a.OH), [&](const Member& member) {
    Row row{a.OW, a.W, a.C, a.stride, a.C};
    row.ahead = a.stride <= 2 ? a.stride * a.stride : 0;  // longer steps pass pixels by
    const Share tasks(a.N * a.OH, member.id, member.size);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t n = task / a.OH, oy = task % a.OH;
      row.count = 0;
      row.next = (oy * a.stride + a.kernel - a.padding) * a.W * a.C;
      for (int64_t ky = 0; ky < a.kernel; ++ky) {
        const int64_t iy = oy * a.stride + ky - a.padding;
        if (iy < 0 || iy >= a.H) continue;
        for (int64_t kx = 0; kx < a.kernel; ++kx)
          row.add(iy * a.W * a.C, kx - a.padding, (ky * a.kernel + kx) * a.C);
      }
      row.run(static_cast<const float*>(a.x) + n * a.H * a.W * a.C, weights,
              static_cast<float*>(a.y) + (n * a.OH + oy) * a.OW * a.C, strip_of(a, a.W));
    }
  });
  return 0;
}

// dx[iy, ix] sums g[oy, ox] w[ky, kx] over iy = oy * stride + ky - padding: the columns of one
// remainder by the stride have the same taps.
inline void depthwise_input_gradient(const DepthwiseArguments& a) {
  const float* const weights = static_cast<const float*>(a.packed);
  parallel(threads_for(a, a.N * a.H), [&](const Member& member) {
    Row row{0, a.OW, a.C, 1, a.stride * a.C};
    const Share tasks(a.N * a.H, member.id, member.size);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t n = task / a.H, iy = task % a.H;
      row.next = ((iy + a.padding) / a.stride + 1) * a.OW * a.C;
      for (int64_t phase = 0; phase < std::min(a.stride, a.W); ++phase) {
        row.count = 0;
        row.ahead = phase == 0;
        row.J = (a.W - phase + a.stride - 1) / a.stride;
        for (int64_t ky = 0; ky < a.kernel; ++ky) {
          const int64_t from = iy + a.padding - ky, oy = from / a.stride;
          if (from < 0 || from % a.stride || oy >= a.OH) continue;
          for (int64_t kx = 0; kx < a.kernel; ++kx) {
            const int64_t at = phase + a.padding - kx;
            if (at % a.stride == 0)
              row.add(oy * a.OW * a.C, at / a.stride, (ky * a.kernel + kx) * a.C);
          }
        }
        row.run(static_cast<const float*>(a.gradient) + n * a.OH * a.OW * a.C, weights,
                static_cast<float*>(a.dx) + ((n * a.H + iy) * a.W + phase) * a.C, strip_of(a, a.OW));
      }
    }
  });
}

// Sums of g x for the taps of G rows of the kernel, of a row of outputs, in registers.
template <int K, int G, int W>
struct TapSums {
  Vector<float, W> sum[G][K] = {};
  template <bool kChecked>
  SENET_INLINE void add(const float* g, const float* const* rows, int64_t ix, int64_t width,
                        int64_t C) {
    const Vector<float, W> factor = load<W>(g);
    for (int q = 0; q < G; ++q)
      for (int kx = 0; kx < K; ++kx)
        if (!kChecked || (ix + kx >= 0 && ix + kx < width))
          sum[q][kx] += factor * load<W>(rows[q] + (ix + kx) * C);
  }
};

// dw of one image's rows [begin, end) for W channels from c on and the kernel's rows [ky, ky + G).
template <int K, int G, int W>
void weights_of_band(const DepthwiseArguments& a, const float* x, const float* g, const float* zeros,
                     int64_t begin, int64_t end, int64_t ky, int64_t c, float* dw) {
  TapSums<K, G, W> sums;
  const int64_t s = a.stride, p = a.padding;
  // Columns whose taps are all inside.
  const int64_t first = std::min(a.OW, (p + s - 1) / s);
  const int64_t last = std::max(first, a.W + p >= K ? std::min(a.OW, (a.W + p - K) / s + 1) : first);
  for (int64_t oy = begin; oy < end; ++oy) {
    const float* rows[G];
    for (int q = 0; q < G; ++q) {
      const int64_t iy = oy * s + ky + q - p;
      rows[q] = iy < 0 || iy >= a.H ? zeros : x + iy * a.W * a.C + c;
    }
    const float* from = g + oy * a.OW * a.C + c;
    int64_t ox = 0;
    for (; ox < first; ++ox)
      sums.template add<true>(from + ox * a.C, rows, ox * s - p, a.W, a.C);
    for (; ox < last; ++ox) sums.template add<false>(from + ox * a.C, rows, ox * s - p, a.W, a.C);
    for (; ox < a.OW; ++ox)
      sums.template add<true>(from + ox * a.C, rows, ox * s - p, a.W, a.C);
  }
  for (int q = 0; q < G; ++q)
    for (int kx = 0; kx < K; ++kx) {
      float* to = dw + ((ky + q) * K + kx) * a.C + c;
      store(to, load<W>(to) + sums.sum[q][kx]);
    }
}

template <int K, int W>
SENET_INLINE void weights_of_lanes(const DepthwiseArguments& a, const float* x, const float* g,
                                   const float* zeros, int64_t begin, int64_t end, int64_t c,
                                   float* dw) {
  // As many sums as there are registers for.
  constexpr int kRegisters = SENET_REGISTERS == 32 ? 28 : 12;
  constexpr int G = std::min(K, std::max(1, kRegisters / K));
  int64_t ky = 0;
  for (; ky + G <= K; ky += G) weights_of_band<K, G, W>(a, x, g, zeros, begin, end, ky, c, dw);
  for (; ky < K; ++ky) weights_of_band<K, 1, W>(a, x, g, zeros, begin, end, ky, c, dw);
}

// Every image and block of channels has sums of its own, which are added in the images' order: results
// do not depend on the number of threads.
template <int K>
int weights_gradient(const DepthwiseArguments& a) {
  constexpr int64_t kBlock = 64, kBand = 1024, T = K * K;
  const int64_t blocks = (a.C + kBlock - 1) / kBlock;
  float* memory = scratch<float>(a.N * T * a.C + a.W * a.C);
  if (!memory) return 1;
  float* const zeros = memory + a.N * T * a.C;
  std::fill(zeros, zeros + a.W * a.C, 0.0f);
  const int64_t band = std::max<int64_t>(1, kBand / std::max<int64_t>(1, a.OW));
  parallel(threads_for(a, a.N * blocks), [&](const Member& member) {
    const Share tasks(a.N * blocks, member.id, member.size);
    for (int64_t task = tasks.begin; task < tasks.end; ++task) {
      const int64_t n = task / blocks, c0 = task % blocks * kBlock, c1 = std::min(a.C, c0 + kBlock);
      const float* x = static_cast<const float*>(a.x) + n * a.H * a.W * a.C;
      const float* g = static_cast<const float*>(a.gradient) + n * a.OH * a.OW * a.C;
      float* dw = memory + n * T * a.C;
      for (int64_t t = 0; t < T; ++t) std::fill(dw + t * a.C + c0, dw + t * a.C + c1, 0.0f);
      for (int64_t begin = 0; begin < a.OH; begin += band) {
        const int64_t end = std::min(a.OH, begin + band);
        constexpr int W = kLanes<float>;
        int64_t c = c0;
        for (; c + W <= c1; c += W) weights_of_lanes<K, W>(a, x, g, zeros, begin, end, c, dw);
        if constexpr (W > 8)
          for (; c + 8 <= c1; c += 8) weights_of_lanes<K, 8>(a, x, g, zeros, begin, end, c, dw);
        for (; c < c1; ++c) weights_of_lanes<K, 1>(a, x, g, zeros, begin, end, c, dw);
      }
    }
    member.barrier();
    float* out = static_cast<float*>(a.dweights);
    const Share channels(a.C, member.id, member.size);
    for (int64_t c = channels.begin; c < channels.end; ++c)
      for (int64_t t = 0; t < T; ++t) {
        double sum = 0;
        for (int64_t n = 0; n < a.N; ++n) sum += double(memory[(n * T + t) * a.C + c]);
        out[c * T + t] = float(sum);
      }
  });
  return 0;
}

// The kernel is 3, 5 or 7 wide.
inline int depthwise_backward(const DepthwiseArguments& a) {
  if (a.dx) depthwise_input_gradient(a);
  if (!a.dweights) return 0;
  if (a.kernel == 3) return weights_gradient<3>(a);
  if (a.kernel == 5) return weights_gradient<5>(a);
  return weights_gradient<7>(a);
}

}  // namespace
}  // namespace senet
