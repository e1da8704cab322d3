// A normalization as the (N, C) arithmetic between the passes sees it, and the coefficients that the
// passes take from it.
#pragma once

#include "plan.h"

namespace senet {
namespace {

// One normalization: its parameters (null: 1 and 0) and the statistics in use.
template <class A>
struct Norm {
  const A *weight, *bias, *mean, *inv_std;  // mean null: the identity
  A scale(int64_t c) const {
    return mean ? (weight ? weight[c] : A(1)) * inv_std[c] : A(1);
  }
  A shift(int64_t c) const { return mean && bias ? bias[c] : A(0); }
  A centre(int64_t c) const { return mean ? mean[c] : A(0); }
};

template <class A>
Norm<A> norm_of(const NormArguments& a, const A* statistics, int64_t C) {
  return {static_cast<const A*>(a.weight), static_cast<const A*>(a.bias), statistics,
          statistics ? statistics + C : nullptr};
}

// A normalization's numbers for a block of channels, with its null pointers resolved once.
template <class A>
struct NormBlock {
  static constexpr int64_t kSize = 64;
  A scale[kSize], shift[kSize], centre[kSize];
  NormBlock(const Norm<A>& norm, int64_t begin, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      scale[i] = norm.scale(begin + i);
      shift[i] = norm.shift(begin + i);
      centre[i] = norm.centre(begin + i);
    }
  }
};

// Calls f(first channel, width, block of the normalization) over a thread's share of channels.
template <class A, class F>
SENET_INLINE void for_blocks(const Norm<A>& norm, const Share& share, const F& f) {
  for (int64_t c = share.begin; c < share.end; c += NormBlock<A>::kSize) {
    const int64_t width = std::min(NormBlock<A>::kSize, share.end - c);
    f(c, width, NormBlock<A>(norm, c, width));
  }
}

// The squeeze: by linearity the mean of norm(x) is norm of the mean of x (eq. 2 without a pass).
template <class A>
void fill_squeeze(const Norm<A>& norm, const A* squeezed, int64_t C, int64_t first, int64_t last,
                  const Share& share, A* z) {
  for_blocks(norm, share, [&](int64_t c, int64_t width, const NormBlock<A>& block) {
    for (int64_t n = first; n < last; ++n) {
      const A* mean = squeezed + n * C + c;
      A* to = z + n * C + c;
      for (int64_t i = 0; i < width; ++i)
        to[i] = block.scale[i] * (mean[i] - block.centre[i]) + block.shift[i];
    }
  });
}

// Coefficients of Affine: p and q have rows of C entries, `step` apart per image.
template <class A>
struct AffineBuffers {
  A *p, *q, *shortcut_p, *zeros;
  int64_t step;
};

template <class A>
void fill_affine(const Norm<A>& norm, const Norm<A>& other, const A* gates, int64_t C, int64_t first,
                 int64_t last, const Share& share, const AffineBuffers<A>& to) {
  if (!gates) first = 0, last = 1;
  for_blocks(norm, share, [&](int64_t c, int64_t width, const NormBlock<A>& block) {
    const NormBlock<A> added(other, c, width);
    for (int64_t i = 0; i < width; ++i) to.shortcut_p[c + i] = added.scale[i], to.zeros[c + i] = 0;
    for (int64_t n = first; n < last; ++n) {
      A *p = to.p + n * to.step + c, *q = to.q + n * to.step + c;
      if (gates) {
        const A* s = gates + n * C + c;
        for (int64_t i = 0; i < width; ++i) {
          const A gate = s[i];
          p[i] = gate * block.scale[i];
          q[i] = gate * block.shift[i] + added.shift[i];
        }
      } else {
        for (int64_t i = 0; i < width; ++i) {
          p[i] = block.scale[i];
          q[i] = block.shift[i] + added.shift[i];
        }
      }
    }
  });
}

template <class T, int kShortcut>
Affine<T, kShortcut> affine_of(const Plan& plan, const TailArguments& a,
                               const AffineBuffers<Accumulator<T>>& b, int64_t n) {
  using A = Accumulator<T>;
  const int64_t at = n * plan.C * plan.P;
  const A* statistics = static_cast<const A*>(a.statistics);
  return {static_cast<const T*>(a.x) + at,
          kShortcut == kNoShortcut ? nullptr : static_cast<const T*>(a.shortcut) + at,
          a.normalization == kNone ? b.zeros : statistics,
          b.p + n * b.step,
          b.q + n * b.step,
          kShortcut == kNormalizedShortcut ? statistics + 3 * plan.C : nullptr,
          b.shortcut_p};
}

}  // namespace
}  // namespace senet
