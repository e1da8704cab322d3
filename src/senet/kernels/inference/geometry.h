// Sizes and places in the maps of a step.
#pragma once

#include <cstring>

#include "../portability.h"
#include "step.h"

namespace senet {
namespace {

SENET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Number of floats between rows of scratch maps: a multiple of a cache line that is odd in lines, so
// that the rows of a tile do not fall into the same sets of the cache.
SENET_INLINE int64_t row_stride(int64_t width) { return (width + 15) / 32 * 32 + 16; }

// What is read in place of a pixel outside of a map.
alignas(64) const float kZeros[kMaxChannels + 64] = {};

// Where the output pixels (n, h, w) of a step are, counted in row order.
struct Pixel {
  int64_t n, h, w;
};

SENET_INLINE Pixel pixel_at(int64_t index, int64_t height, int64_t width) {
  return {index / (height * width), index / width % height, index % width};
}

SENET_INLINE void advance(Pixel& p, int64_t height, int64_t width) {
  if (++p.w < width) return;
  p.w = 0;
  if (++p.h < height) return;
  p.h = 0;
  ++p.n;
}

SENET_INLINE void copy(float* to, const float* from, int64_t count) {
  std::memcpy(to, from, size_t(count) * sizeof(float));
}

}  // namespace
}  // namespace senet
