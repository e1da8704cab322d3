// The operations over the maps of joined branches; see passes.h.
#pragma once

#include "activation.h"
#include "passes.h"

namespace senet {
namespace {

// Sums of act(norm(x)).
template <class T, int kActivation>
struct JoinSum {
  using A = Accumulator<T>;
  static constexpr int kSums = 1, kRows = 4;
  static constexpr bool kWrites = false;
  Affine<T, kNoShortcut> affine;
  A negative_slope;
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    return affine.template coefficients<W, L>(c);
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>* sum, int64_t i, int64_t) const {
    sum[0] += activate<kActivation, W>(affine.template value<W>(k, i), negative_slope);
  }
  SENET_INLINE void prefetch(int64_t i, int64_t) const { affine.prefetch(i); }
};

// The operations below also touch the joined map, at j.
template <class T, int kActivation>
struct JoinApply {
  using A = Accumulator<T>;
  static constexpr int kSums = 0, kRows = 1;
  static constexpr bool kWrites = true;
  Affine<T, kNoShortcut> affine;
  const A* gates;
  T* y;
  A negative_slope;
  bool streams;
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
    const Vector<A, W> v =
        activate<kActivation, W>(affine.template value<W>(k.affine, i), negative_slope);
    store(y + j, v * k.gate, W == kLanes<A> && streams);
  }
  SENET_INLINE void prefetch(int64_t, int64_t) const {}
};

// The first of the sums of m y', m y' (x - mean), m, m (x - mean), y' act(u); u is affine's value, m the
// activation's derivative there.
template <class T, int kActivation, int kCount>
struct JoinReduce {
  using A = Accumulator<T>;
  static constexpr int kSums = kCount, kRows = 4;
  static constexpr bool kWrites = false;
  Affine<T, kNoShortcut> affine;
  const T* gradient;
  A negative_slope;
  template <int W, class L>
  SENET_INLINE auto coefficients(int64_t c) const {
    return affine.template coefficients<W, L>(c);
  }
  template <int W, class K>
  SENET_INLINE void step(const K& k, Vector<A, W>* sum, int64_t i, int64_t j) const {
    using V = Vector<A, W>;
    const V d = load<W>(affine.x + i) - k.mean, g = load<W>(gradient + j);
    V v;
    const V m = derivative<kActivation, W, A>(k.p * d + k.q, negative_slope, v);
    const V mg = through<kActivation>(g, m);
    sum[0] += mg;
    sum[1] += mg * d;
    if constexpr (kSums > 2) sum[2] += m;
    if constexpr (kSums > 2) sum[3] += through<kActivation>(d, m);
    if constexpr (kSums > 4) sum[4] += g * v;
  }
  SENET_INLINE void prefetch(int64_t i, int64_t j) const {
    affine.prefetch(i);
    fetch(gradient + j);
  }
};

// dx = m (scale y' + inside) + slope (x - mean) + outside
template <class T, int kActivation>
struct JoinGradient {
  using A = Accumulator<T>;
  static constexpr int kSums = 0, kRows = 1;
  static constexpr bool kWrites = true;
  Affine<T, kNoShortcut> affine;
  const T* gradient;
  const A *scale, *inside, *slope, *outside;
  T* dx;
  A negative_slope;
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
    using V = Vector<A, W>;
    const V d = load<W>(affine.x + i) - k.affine.mean;
    const V g = k.scale * load<W>(gradient + j) + k.inside;
    V v;
    const V m = derivative<kActivation, W, A>(k.affine.p * d + k.affine.q, negative_slope, v);
    store(dx + i, through<kActivation>(g, m) + (k.slope * d + k.outside),
          W == kLanes<A> && streams);
  }
  SENET_INLINE void prefetch(int64_t, int64_t) const {}
};

}  // namespace
}  // namespace senet
