// The gradient of the weights: a product of x and y', the gradient of y, summed over positions.
#pragma once

#include "winograd.h"

namespace senet {
namespace {

// The positions of a 1x1 convolution, one by one.
struct Points {
  static constexpr int64_t kTaps = 1, kWeights = 1, kChunk = 256, kMost = 96;

  const ConvolutionArguments& a;

  explicit Points(const ConvolutionArguments& arguments) : a(arguments) {}
  int64_t count() const { return a.N * a.OH * a.OW; }

  template <class Place>
  void inputs(int64_t first, int64_t last, int64_t from, int64_t count, int64_t, const float*,
              const Place& place) const {
    int64_t w = first % a.OW, h = first / a.OW % a.OH, n = first / a.OW / a.OH;
    for (int64_t p = first; p < last; ++p) {
      const float* pixel = a.x + ((n * a.H + h * a.stride) * a.W + w * a.stride) * a.C + from;
      for (int64_t c = 0; c < count; c += kWidth) std::memcpy(place(p - first, c), pixel + c, sizeof(V));
      if (++w == a.OW) {
        w = 0;
        if (++h == a.OH) h = 0, ++n;
      }
    }
  }

  template <class Place>
  void gradient(int64_t first, int64_t last, int64_t from, int64_t count, int64_t whole, int64_t,
                const float* zeros, const Place& place) const {
    for (int64_t p = first; p < last; ++p)
      for (int64_t k = 0; k < whole; k += kWidth)
        std::memcpy(place(p - first, k), k < count ? a.y + p * a.K + from + k : zeros, sizeof(V));
  }

  template <class At, class Put>
  static void weights(const At& at, const Put& put) {
    put(0, at(0));
  }
};

// Positions are cut into parts, a group's C and K into chunks; a task is one of each, with sums of its
// own, [tap][channel of x][channel of y]. The cut depends on the shape only, and parts are merged in
// their order: the result does not depend on the threads.
template <class Domain, int kRows, int kVectors>
struct WeightsGradient {
  static constexpr int64_t kTaps = Domain::kTaps, kTile = kVectors * kWidth;
  static constexpr int64_t kChunk = std::max<int64_t>(Domain::kChunk, kTile);
  static_assert(kGroup % kRows == 0 && kChunk % kTile == 0 && kChunk % kGroup == 0);

  const ConvolutionArguments& a;
  const Domain domain;
  int64_t C, K;           // channels of a group of x, of y
  int64_t width, height;  // those of a chunk of y, of x
  int64_t across, down;   // chunks of y, of x
  int64_t parts, tiles, x_stride, y_stride;

  explicit WeightsGradient(const ConvolutionArguments& arguments) : a(arguments), domain(a) {
    C = a.C / a.groups, K = a.K / a.groups;
    width = std::min(round_up(K, kTile), kChunk);
    height = std::min(C, kChunk);
    across = ceil_div(K, width);
    down = ceil_div(C, height);
    tiles = block_tiles(kTaps, height, 98304, Domain::kMost);
    // A part writes all its sums once, however few its tiles are.
    parts = std::min(ceil_div(16, chunks()),
                     ceil_div(domain.count(), std::max<int64_t>(tiles, 64)));
    x_stride = tap_stride(tiles * height);
    y_stride = tap_stride(tiles * width);
  }

  int64_t chunks() const { return a.groups * across * down; }

  // Calls f(group, first channel of x, of y) of a chunk; channels count within the group.
  template <class F>
  void at_chunk(int64_t chunk, const F& f) const {
    f(chunk / (across * down), chunk / across % down * height, chunk % across * width);
  }
  int64_t sums_of_task() const { return kTaps * height * width; }

  int run() const {
    const int64_t tasks = parts * chunks();
    const int64_t team = std::min(std::max<int64_t>(1, a.threads), tasks);
    const int64_t own = kTaps * (x_stride + y_stride);
    const int64_t kept = (parts > 1 ? tasks : team) * sums_of_task();
    float* sums = scratch<float>(kept + kChunk + team * own);
    if (!sums) return 1;
    float *zeros = sums + kept, *work = zeros + kChunk;
    std::fill(zeros, zeros + kChunk, 0.0f);
    int64_t next = 0, merged = 0;
    parallel(team, [&](const Member& member) {
      float *x = work + member.id * own, *y = x + kTaps * x_stride;
      for (int64_t task; (task = take_number(next)) < tasks;) {
        float* to = sums + (parts > 1 ? task : member.id) * sums_of_task();
        add_part(task / chunks(), task % chunks(), to, zeros, x, y);
        if (parts == 1) merge(task, 0, height / kGroup * (width / kGroup), to);
      }
      if (parts == 1) return;
      member.barrier();
      const int64_t blocks = height / kGroup * (width / kGroup);
      for (int64_t i; (i = take_number(merged)) < chunks() * blocks;) {
        const int64_t chunk = i / blocks;
        merge(chunk, i % blocks, i % blocks + 1, sums + chunk * sums_of_task());
      }
    });
    return 0;
  }

  void add_part(int64_t part, int64_t chunk, float* sums, const float* zeros, float* x,
                float* y) const {
    const int64_t from = domain.count() * part / parts, end = domain.count() * (part + 1) / parts;
    at_chunk(chunk, [&](int64_t group, int64_t c, int64_t k) {
      const int64_t rows = std::min(height, C - c), columns = std::min(width, K - k);
      for (int64_t first = from; first < end; first += tiles) {
        const int64_t last = std::min(end, first + tiles);
        domain.inputs(first, last, group * C + c, rows, x_stride, zeros, [&](int64_t t, int64_t i) {
          return x + i / kGroup * kGroup * tiles + t * kGroup + i % kGroup;
        });
        domain.gradient(first, last, group * K + k, columns, round_up(columns, kTile), y_stride, zeros,
                        [&](int64_t t, int64_t j) {
                          return y + j / kTile * kTile * tiles + t * kTile + j % kTile;
                        });
        for (int64_t tap = 0; tap < kTaps; ++tap)
          for (int64_t j = 0; j < columns; j += kTile)
            for (int64_t i = 0; i < rows; i += kRows)
              add_outer_products<kRows, kVectors>(
                  x + tap * x_stride + i / kGroup * kGroup * tiles + i % kGroup, kGroup, last - first,
                  y + tap * y_stride + j * tiles,
                  sums + (tap * height + i) * width + j, width, first == from);
      }
    });
  }

  // Adds up the parts of a chunk, of kGroup outputs and inputs at a time, numbered, and turns
  // [tap][c][k] into [k][weight][c].
  void merge(int64_t chunk, int64_t begin, int64_t end, const float* sums) const {
    const int64_t across_chunk = width / kGroup;
    at_chunk(chunk, [&](int64_t group, int64_t c, int64_t k) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t i = block / across_chunk * kGroup, j = block % across_chunk * kGroup;
        if (c + i < C && k + j < K)
          merge_block(a.weights + (group * K + k + j) * Domain::kWeights * C + c + i,
                      sums + i * width + j);
      }
    });
  }

  void merge_block(float* to, const float* from) const {
    const int64_t part_stride = chunks() * sums_of_task();
    for (int64_t v = 0; v < kGroup; v += kWidth)
      for (int64_t i = 0; i < kGroup; i += kWidth) {
        V block[Domain::kWeights][kWidth];
        for (int64_t j = 0; j < kWidth; ++j) {
          const auto sum = [&](int tap) {
            const float* p = from + (tap * height + i + j) * width + v;
            V total = load<kWidth>(p);
            for (int64_t part = 1; part < parts; ++part) total += load<kWidth>(p + part * part_stride);
            return total;
          };
          Domain::weights(sum, [&](int number, V value) { block[number][j] = value; });
        }
        for (int64_t number = 0; number < Domain::kWeights; ++number) {
          transpose(block[number]);
          for (int64_t j = 0; j < kWidth; ++j)
            std::memcpy(to + ((v + j) * Domain::kWeights + number) * C + i, &block[number][j],
                        sizeof(V));
        }
      }
  }
};

template <class Domain>
int weights_gradient_of(const ConvolutionArguments& a) {
#if SENET_REGISTERS == 32
  const int64_t K = a.K / a.groups;
  if (K <= kWidth) return WeightsGradient<Domain, 16, 1>(a).run();
  if (K <= 2 * kWidth) return WeightsGradient<Domain, 8, 2>(a).run();
  return WeightsGradient<Domain, 4, 4>(a).run();
#else
  return WeightsGradient<Domain, 4, 2>(a).run();
#endif
}

inline int weights_gradient(const ConvolutionArguments& a) {
  return a.kernel == 1 ? weights_gradient_of<Points>(a) : weights_gradient_of<Tiles>(a);
}

}  // namespace
}  // namespace senet
