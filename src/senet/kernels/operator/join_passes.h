// The operations over the maps of joined branches; see passes.h.
#pragma once

#include "passes.h"

namespace senet {
namespace {

// Sums of relu(norm(x)).
template <class T>
struct JoinSum {
  using A = Accumulator<T>;
  static constexpr int kSums = 1, kRows = 4;
  static constexpr bool kWrites = false;
  Affine<T, kNoShortcut> affine;
  bool relus;
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    return affine.template coefficients<W, L>(c);
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>* sum, int64_t i, int64_t) const {
    const Vector<A, W> v = affine.template value<W>(k, i);
    sum[0] += relus ? relu(v) : v;
  }
  SENET_INLINE void prefetch(int64_t i, int64_t) const { affine.prefetch(i); }
};

// The operations below also touch the joined map, at j.
template <class T>
struct JoinApply {
  using A = Accumulator<T>;
  static constexpr int kSums = 0, kRows = 1;
  static constexpr bool kWrites = true;
  Affine<T, kNoShortcut> affine;
  const A* gates;
  T* y;
  bool relus, streams;
  template <class M, class V>
  struct Coefficients {
    M affine;
    V gate;
  };
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    using M = decltype(affine.template coefficients<W, L>(c));
    return Coefficients<M, Vector<A, W>>{affine.template coefficients<W, L>(c),
                                         L::template get<W>(gates, c)};
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>*, int64_t i, int64_t j) const {
    Vector<A, W> v = affine.template value<W>(k.affine, i);
    if (relus) v = relu(v);
    store(y + j, v * k.gate, W == kLanes<A> && streams);
  }
  SENET_INLINE void prefetch(int64_t, int64_t) const {}
};

// Sums of m y', m y' (x - mean) and for a gate m, m (x - mean); m is 1 where affine's value is positive.
template <class T, bool kGate>
struct JoinReduce {
  using A = Accumulator<T>;
  static constexpr int kSums = kGate ? 4 : 2, kRows = 4;
  static constexpr bool kWrites = false;
  Affine<T, kNoShortcut> affine;
  const T* gradient;
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    return affine.template coefficients<W, L>(c);
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>* sum, int64_t i, int64_t j) const {
    const Vector<A, W> d = load<W>(affine.x + i) - k.mean, v = k.p * d + k.q;
    const Vector<A, W> g = relu_gradient<Vector<A, W>>(load<W>(gradient + j), v);
    sum[0] += g;
    sum[1] += g * d;
    if constexpr (kGate) {
      sum[2] += relu_gradient<Vector<A, W>>(splat<A, W>(1), v);
      sum[3] += relu_gradient<Vector<A, W>>(d, v);
    }
  }
  SENET_INLINE void prefetch(int64_t i, int64_t j) const {
    affine.prefetch(i);
    fetch(gradient + j);
  }
};

// dx = m (scale y' + inside) + slope (x - mean) + outside
template <class T>
struct JoinGradient {
  using A = Accumulator<T>;
  static constexpr int kSums = 0, kRows = 1;
  static constexpr bool kWrites = true;
  Affine<T, kNoShortcut> affine;
  const T* gradient;
  const A *scale, *inside, *slope, *outside;
  T* dx;
  bool streams;
  template <class M, class V>
  struct Coefficients {
    M affine;
    V scale, inside, slope, outside;
  };
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    using M = decltype(affine.template coefficients<W, L>(c));
    return Coefficients<M, Vector<A, W>>{
        affine.template coefficients<W, L>(c), L::template get<W>(scale, c),
        L::template get<W>(inside, c), L::template get<W>(slope, c), L::template get<W>(outside, c)};
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>*, int64_t i, int64_t j) const {
    const Vector<A, W> d = load<W>(affine.x + i) - k.affine.mean, v = k.affine.p * d + k.affine.q;
    const Vector<A, W> g = k.scale * load<W>(gradient + j) + k.inside;
    store(dx + i, relu_gradient<Vector<A, W>>(g, v) + (k.slope * d + k.outside),
          W == kLanes<A> && streams);
  }
  SENET_INLINE void prefetch(int64_t, int64_t) const {}
};

}  // namespace
}  // namespace senet
