// The passes over feature maps. An operation (Statistics, Apply, Reduce, Gradient) says what happens
// to one vector of elements; the drivers below walk it over channels_last rows, where a vector spans
// channels, or over a contiguous plane, where a vector spans pixels of one channel. An element is at i
// in the maps of C channels, and at j in a map whose rows have `width` channels (join.h).
#pragma once

#include "activation.h"

namespace senet {
namespace {

// Where the backward pass knows from which elements the relu let through; kThrough…: any other
// activation, whose derivative is taken at a value that is computed again.
enum Mask {
  kNoMask,
  kMaskFromY,
  kMaskFromX,
  kMaskFromBoth,
  kThroughX,
  kThroughPlain,
  kThroughBoth
};
constexpr bool recomputes(int mask) { return mask >= kMaskFromX; }
constexpr int shortcut_of(int mask) {
  if (mask == kThroughPlain) return kPlainShortcut;
  return mask == kMaskFromBoth || mask == kThroughBoth ? kNormalizedShortcut : kNoShortcut;
}

// How coefficient c of a per-channel array fills a vector.
struct AlongChannels {
  template <int W, class A>
  static SENET_INLINE Vector<A, W> get(const A* values, int64_t c) {
    return load<W>(values + c);
  }
};
struct OneChannel {
  template <int W, class A>
  static SENET_INLINE Vector<A, W> get(const A* values, int64_t c) {
    return splat<A, W>(values[c]);
  }
};

// Groups of rows that are summed in registers are read in R places at a time, which the processor's
// own prefetching does not follow well: the group after is asked for explicitly.
template <class Op, int W, int R>
SENET_INLINE void row_group_lanes(const Op& op, int64_t C, int64_t width, int64_t row, int64_t c,
                                  typename Op::A* sums) {
  const auto k = op.template coefficients<W, AlongChannels>(c);
  Vector<typename Op::A, W> sum[Op::kSums + 1] = {};
  for (int u = 0; u < R; ++u) {
    if constexpr (R > 1 && W > 1) op.prefetch((row + R + u) * C + c, (row + R + u) * width + c);
    op.template step<W>(k, sum, (row + u) * C + c, (row + u) * width + c);
  }
  for (int j = 0; j < Op::kSums; ++j)
    store(sums + j * C + c, load<W>(sums + j * C + c) + sum[j]);
}

template <class Op, int R>
SENET_INLINE void row_group(const Op& op, int64_t C, int64_t width, int64_t row,
                            typename Op::A* sums) {
  constexpr int W = kLanes<typename Op::A>;
  int64_t c = 0;
  for (; c + W <= C; c += W) row_group_lanes<Op, W, R>(op, C, width, row, c, sums);
  if constexpr (W > 8)  // mobile networks' channels are multiples of 8
    for (; c + 8 <= C; c += 8) row_group_lanes<Op, 8, R>(op, C, width, row, c, sums);
  for (; c < C; ++c) row_group_lanes<Op, 1, R>(op, C, width, row, c, sums);
}

// Rows [begin, end) of one image in channels_last; adds to sums[kSums][C]. A pass that also writes
// goes through short rows one by one: so many places at once cost it more than the sums in registers
// save.
template <class Op>
void rows(const Op& op, int64_t C, int64_t width, int64_t begin, int64_t end,
          typename Op::A* sums) {
  constexpr int64_t kShortRow = 512;
  int64_t row = begin;
  if (!Op::kWrites || C > kShortRow)
    for (; row + Op::kRows <= end; row += Op::kRows) row_group<Op, Op::kRows>(op, C, width, row, sums);
  for (; row < end; ++row) row_group<Op, 1>(op, C, width, row, sums);
}

// Elements [begin, end) of a contiguous image, all of channel c; adds to sums[j * stride].
template <class Op>
void plane(const Op& op, int64_t c, int64_t begin, int64_t end, typename Op::A* sums, int64_t stride) {
  using A = typename Op::A;
  constexpr int W = kLanes<A>, U = 4;
  const auto k = op.template coefficients<W, OneChannel>(c);
  Vector<A, W> sum[U][Op::kSums + 1] = {};
  int64_t i = begin;
  for (; i + U * W <= end; i += U * W)
    for (int u = 0; u < U; ++u) op.template step<W>(k, sum[u], i + u * W, i + u * W);
  for (; i + W <= end; i += W) op.template step<W>(k, sum[0], i, i);
  const auto k1 = op.template coefficients<1, OneChannel>(c);
  Vector<A, 1> rest[Op::kSums + 1] = {};
  for (; i < end; ++i) op.template step<1>(k1, rest, i, i);
  for (int j = 0; j < Op::kSums; ++j)
    sums[j * stride] += horizontal_sum<A, W>((sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j])) + rest[j][0];
}

// Sums of x - pivot and its square. With a pivot that is the mean of some of the k elements of a
// block, sum (x - pivot)^2 <= (1 + k) * sum (x - mean)^2, so the cancellation in the second moment
// is bounded however large the mean is.
template <class T>
struct Statistics {
  using A = Accumulator<T>;
  static constexpr int kSums = 2, kRows = 4;
  static constexpr bool kWrites = false;
  const T* x;
  const A* pivot;
  template <int W>
  struct Coefficients {
    Vector<A, W> pivot;
  };
  template <int W, class L>
  SENET_INLINE Coefficients<W> coefficients(int64_t c) const {
    return {L::template get<W>(pivot, c)};
  }
  template <int W>
  SENET_INLINE void step(const Coefficients<W>& k, Vector<A, W>* sum, int64_t i, int64_t) const {
    const Vector<A, W> d = load<W>(x + i) - k.pivot;
    sum[0] += d;
    sum[1] += d * d;
  }
  SENET_INLINE void prefetch(int64_t i, int64_t) const { fetch(x + i); }
};

// The value before the activation: p * (x - mean) + q, + shortcut or + p' * (shortcut - mean'). Centred, so
// that a constant channel comes out as its bias exactly. The backward pass recomputes it with this
// very expression: its mask is that of the forward pass.
template <class T, int kShortcut>
struct Affine {
  using A = Accumulator<T>;
  const T *x, *shortcut;
  const A *mean, *p, *q, *shortcut_mean, *shortcut_p;
  // Coefficients are built in place, member by member: where one struct of vectors is copied into
  // another, GCC takes the copy through memory, at several times the cost of the arithmetic.
  template <int W>
  struct Plain {
    Vector<A, W> mean, p, q;
  };
  template <int W>
  struct Both {
    Vector<A, W> mean, p, q, shortcut_mean, shortcut_p;
  };
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    if constexpr (kShortcut == kNormalizedShortcut)
      return Both<W>{L::template get<W>(mean, c), L::template get<W>(p, c), L::template get<W>(q, c),
                     L::template get<W>(shortcut_mean, c), L::template get<W>(shortcut_p, c)};
    else
      return Plain<W>{L::template get<W>(mean, c), L::template get<W>(p, c),
                      L::template get<W>(q, c)};
  }
  template <int W, class K>
  SENET_INLINE Vector<A, W> value(const K& k, int64_t i) const {
    Vector<A, W> v = k.p * (load<W>(x + i) - k.mean) + k.q;
    if constexpr (kShortcut == kPlainShortcut) v += load<W>(shortcut + i);
    if constexpr (kShortcut == kNormalizedShortcut)
      v += k.shortcut_p * (load<W>(shortcut + i) - k.shortcut_mean);
    return v;
  }
  SENET_INLINE void prefetch(int64_t i) const {
    fetch(x + i);
    if constexpr (kShortcut != kNoShortcut) fetch(shortcut + i);
  }
};

// y = relu of that, or with kOther another activation
template <class T, int kShortcut, bool kOther>
struct Apply {
  using A = Accumulator<T>;
  static constexpr int kSums = 0, kRows = 1;
  static constexpr bool kWrites = true;
  Affine<T, kShortcut> affine;
  T* y;
  bool relus, streams;
  int64_t activation;
  A slope;
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    return affine.template coefficients<W, L>(c);
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>*, int64_t i, int64_t) const {
    Vector<A, W> v = affine.template value<W>(k, i);
    if constexpr (kOther)
      v = activated<W>(v, activation, slope);
    else if (relus)
      v = relu(v);
    store(y + i, v, W == kLanes<A> && streams);
  }
  SENET_INLINE void prefetch(int64_t i, int64_t) const { affine.prefetch(i); }
};

// g' = gradient * [y > 0], with the mask from where kMask says, or through another activation.
template <class T, int kMask>
struct Masked {
  using A = Accumulator<T>;
  static constexpr int kShortcut = shortcut_of(kMask);
  const T *gradient, *y;
  Affine<T, kShortcut> affine;
  int64_t activation;
  A slope;
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    if constexpr (recomputes(kMask))
      return affine.template coefficients<W, L>(c);
    else
      return 0;
  }
  SENET_INLINE void prefetch(int64_t i) const {
    fetch(gradient + i);
    if constexpr (kMask == kMaskFromY) fetch(y + i);
    if constexpr (recomputes(kMask)) affine.prefetch(i);
  }
  template <int W, class K>
  SENET_INLINE Vector<A, W> get(const K& k, int64_t i) const {
    const Vector<A, W> g = load<W>(gradient + i);
    if constexpr (kMask == kMaskFromY) return relu_gradient<Vector<A, W>>(g, load<W>(y + i));
    if constexpr (kMask == kMaskFromX || kMask == kMaskFromBoth)
      return relu_gradient(g, affine.template value<W>(k, i));
    if constexpr (kMask >= kThroughX)
      return gradient_through<W>(g, affine.template value<W>(k, i), activation, slope);
    return g;
  }
};

// Sums of g', g' * (x - mean) and, for a normalized shortcut, g' * (shortcut - its mean); writes g'
// when the shortcut wants it.
template <class T, int kMask, bool kBoth, bool kWrite>
struct Reduce {
  using A = Accumulator<T>;
  static constexpr int kSums = kBoth ? 3 : 2, kRows = 4;
  static constexpr bool kWrites = kWrite;
  Masked<T, kMask> masked;
  const T *x, *shortcut;
  const A *mean, *shortcut_mean;
  T* written;
  bool streams;
  template <class M, class V>
  struct Plain {
    M masked;
    V mean;
  };
  template <class M, class V>
  struct Both {
    M masked;
    V mean, shortcut_mean;
  };
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    using M = decltype(masked.template coefficients<W, L>(c));
    if constexpr (kBoth)
      return Both<M, Vector<A, W>>{masked.template coefficients<W, L>(c), L::template get<W>(mean, c),
                                   L::template get<W>(shortcut_mean, c)};
    else
      return Plain<M, Vector<A, W>>{masked.template coefficients<W, L>(c),
                                    L::template get<W>(mean, c)};
  }
  SENET_INLINE void prefetch(int64_t i, int64_t) const {
    masked.prefetch(i);
    if constexpr (!recomputes(kMask)) fetch(x + i);
    if constexpr (kBoth && !recomputes(kMask)) fetch(shortcut + i);
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>* sum, int64_t i, int64_t) const {
    const Vector<A, W> g = masked.template get<W>(k.masked, i);
    sum[0] += g;
    sum[1] += g * (load<W>(x + i) - k.mean);
    if constexpr (kBoth) sum[2] += g * (load<W>(shortcut + i) - k.shortcut_mean);
    if constexpr (kWrite) store(written + i, g, W == kLanes<A> && streams);
  }
};

// out = scale * g' + slope * (x - mean) + offset, the gradient of a batch normalized map; without
// kBatch the statistics are constants and the middle term is absent.
template <class T, bool kBatch>
struct MapGradient {
  using A = Accumulator<T>;
  const T* x;
  const A *mean, *scale, *slope, *offset;
  T* out;
  template <int W>
  struct Constant {
    Vector<A, W> scale, offset;
  };
  template <int W>
  struct Batch {
    Vector<A, W> scale, offset, mean, slope;
  };
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    if constexpr (kBatch)
      return Batch<W>{L::template get<W>(scale, c), L::template get<W>(offset, c),
                      L::template get<W>(mean, c), L::template get<W>(slope, c)};
    else
      return Constant<W>{L::template get<W>(scale, c), L::template get<W>(offset, c)};
  }
  template <int W, class K>
  SENET_INLINE Vector<A, W> value(const K& k, Vector<A, W> g, int64_t i) const {
    Vector<A, W> v = k.scale * g + k.offset;
    if constexpr (kBatch) v += k.slope * (load<W>(x + i) - k.mean);
    return v;
  }
};

// dx, and the shortcut's gradient where it was not written before.
template <class T, int kMask, bool kBatch, int kShortcutGradient>
struct Gradient {
  using A = Accumulator<T>;
  static constexpr int kSums = 0, kRows = 1;
  static constexpr bool kWrites = true;
  Masked<T, kMask> masked;
  MapGradient<T, kBatch> input, shortcut;
  bool wants_input, streams;
  template <class M, class I, class S>
  struct Coefficients {
    M masked;
    I input;
    S shortcut;
  };
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    using M = decltype(masked.template coefficients<W, L>(c));
    using I = decltype(input.template coefficients<W, L>(c));
    if constexpr (kShortcutGradient == kNormalizedShortcut)
      return Coefficients<M, I, I>{masked.template coefficients<W, L>(c),
                                   input.template coefficients<W, L>(c),
                                   shortcut.template coefficients<W, L>(c)};
    else
      return Coefficients<M, I, int>{masked.template coefficients<W, L>(c),
                                     input.template coefficients<W, L>(c), 0};
  }
  SENET_INLINE void prefetch(int64_t i, int64_t) const {
    masked.prefetch(i);
    if constexpr (kBatch && !recomputes(kMask)) fetch(input.x + i);
    if constexpr (kBatch && kShortcutGradient == kNormalizedShortcut && !recomputes(kMask))
      fetch(shortcut.x + i);
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>*, int64_t i, int64_t) const {
    const bool streamed = W == kLanes<A> && streams;
    const Vector<A, W> g = masked.template get<W>(k.masked, i);
    if (wants_input) store(input.out + i, input.template value<W>(k.input, g, i), streamed);
    if constexpr (kShortcutGradient == kPlainShortcut) store(shortcut.out + i, g, streamed);
    if constexpr (kShortcutGradient == kNormalizedShortcut)
      store(shortcut.out + i, shortcut.template value<W>(k.shortcut, g, i), streamed);
  }
};

}  // namespace
}  // namespace senet
