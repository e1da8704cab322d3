// What the kernels of all instruction sets share: types, the argument block, tuning constants.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SENET_X86
#include <immintrin.h>
#endif

#define SENET_INLINE inline __attribute__((always_inline))

namespace {

struct bfloat16 {
  uint16_t bits;
};

// What a sum of elements of T is kept in; also the type of all parameters.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<bfloat16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

SENET_INLINE float widen(float v) { return v; }
SENET_INLINE double widen(double v) { return v; }
SENET_INLINE float widen(bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Shared with cpu.py.
enum Gate { kSigmoid, kTanh, kRelu, kHardSigmoid, kIdentitySigmoid };
// Given: as an earlier forward pass left them in `statistics`; forward only.
enum Normalization { kNone, kRunningStatistics, kBatchStatistics, kGivenStatistics };
enum Shortcut { kNoShortcut, kPlainShortcut, kNormalizedShortcut };
// Where the backward pass knows from which elements the relu let through.
enum Mask { kNoMask, kMaskFromY, kMaskFromX, kMaskFromBoth };

// In batch mode the running statistics, where given, move by `momentum` towards the batch's.
struct NormArguments {
  const void *weight, *bias;
  void *running_mean, *running_var;
  double eps, momentum;
};

struct TailArguments {
  int64_t N, C, P, H;  // images, channels, pixels, hidden width of the gate (0: no gate)
  int64_t channels_last, threads, gate, relu, normalization, shortcut_kind;
  NormArguments norm, shortcut_norm;
  const void *x, *shortcut, *w1, *b1, *w2, *b2;
  void *y, *statistics, *squeezed, *hidden, *gates;
  // backward only; a null output is not wanted
  const void* gradient;
  void *dx, *dshortcut, *dweight, *dbias, *dshortcut_weight, *dshortcut_bias;
  void *dw1, *db1, *dw2, *db2;
};

// One input of a join: a map of C channels. kNone: it goes in as it is; else through norm and relu.
struct JoinBranch {
  int64_t C, normalization;
  NormArguments norm;
  const void* x;
  void *dx, *dweight, *dbias;  // backward only; a null output is not wanted
};

// Followed in memory by its branches. statistics has rows mean, inv_std, var, scale, shift.
struct JoinArguments {
  int64_t N, C, P, H, branches;  // C: of all branches together
  int64_t channels_last, threads, gate;
  const void *w1, *b1, *w2, *b2;
  void *y, *statistics, *squeezed, *hidden, *gates;
  const void* gradient;  // backward only
  void *dw1, *db1, *dw2, *db2;
};

// Bytes of a group of images that are read twice, per thread: a share of the last-level cache.
constexpr int64_t kGroupBytes = 4 << 20;
// Above this size of a map its lines have left the cache before anybody reads them: do not keep them.
constexpr int64_t kStreamBytes = 24 << 20;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Scratch memory of the calling thread, kept between calls: fresh pages would cost more than the sums.
template <class A>
A* scratch(int64_t count) {
  struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  thread_local Buffer buffer;
  const size_t bytes = (size_t(count) * sizeof(A) + 127) / 64 * 64;
  if (bytes > buffer.size) {
    std::free(buffer.memory);
    buffer.memory = std::aligned_alloc(64, bytes);
    buffer.size = buffer.memory ? bytes : 0;
  }
  return static_cast<A*>(buffer.memory);
}

}  // namespace
