// The tail y = act(gate ⊙ norm(x) + shortcut) forward: which passes run over the maps, and the
// (N, C) arithmetic between them. Notation and derivation: docs/algebra.md, "Forward".
#pragma once

#include "excitation.h"
#include "moments.h"

namespace senet {
namespace {

template <class T, int kShortcut, bool kOther>
void apply_pass(const Plan& plan, const TailArguments& a, const AffineBuffers<Accumulator<T>>& b,
                int64_t first, const Share& share, bool streams) {
  const auto make = [&](int64_t n) {
    return Apply<T, kShortcut, kOther>{affine_of<T, kShortcut>(plan, a, b, n),
                                       static_cast<T*>(a.y) + n * plan.C * plan.P,
                                       a.activation == kActRelu,
                                       streams,
                                       a.activation,
                                       Accumulator<T>(a.negative_slope)};
  };
  Accumulator<T>* none = nullptr;
  walk(plan, plan.C, first, share, true, none, op_of(make));
}

// What all threads know of a forward pass, and what each of them does.
template <class T>
struct TailForward {
  using A = Accumulator<T>;
  const TailArguments& a;
  const Plan plan;
  const int64_t C, H;
  const bool batch, norm_shortcut, streams;
  const int threads;
  A *const statistics, *const shortcut_statistics;  // null where there are none
  const Norm<A> norm, other;                        // other: the shortcut's
  const Excitation<A> excitation;
  A *partial, *shortcut_partial, *pivots;
  AffineBuffers<A> affine;

  explicit TailForward(const TailArguments& arguments)
      : a(arguments),
        plan(a.N, a.C, a.P, a.channels_last),
        C(a.C),
        H(a.H),
        batch(a.normalization == kBatchStatistics),
        norm_shortcut(a.shortcut_kind == kNormalizedShortcut),
        streams(may_stream(plan, sizeof(T), a.y)),
        threads(thread_count(plan, a.threads)),
        statistics(a.normalization == kNone ? nullptr : static_cast<A*>(a.statistics)),
        shortcut_statistics(norm_shortcut ? statistics + 3 * C : nullptr),
        norm(norm_of(a.norm, statistics, C)),
        other(norm_of(a.shortcut_norm, shortcut_statistics, C)),
        excitation(excitation_of<A>(a)) {}

  bool allocate() {
    const int64_t partial_size = plan.N * plan.sum_chunks * 2 * C, rows_pq = H ? plan.N : 1;
    partial = scratch<A>(2 * partial_size + threads * C + 2 * rows_pq * C + 2 * C);
    if (!partial) return false;
    shortcut_partial = partial + partial_size;
    pivots = shortcut_partial + partial_size;
    A *p = pivots + threads * C, *q = p + rows_pq * C;
    affine = {p, q, q + rows_pq * C, q + rows_pq * C + C, H ? C : 0};
    return true;
  }

  void operator()(const Member& member) const {
    const Share channels(C, member.id, member.size, kLanes<A>), units(H, member.id, member.size, 4);
    if (a.normalization == kRunningStatistics) {
      use_running(a.norm, C, channels, statistics);
      if (norm_shortcut) use_running(a.shortcut_norm, C, channels, shortcut_statistics);
    }
    const int64_t group = batch || !H ? plan.N : plan.group(sizeof(T), threads);
    for (int64_t first = 0; first < plan.N; first += group) {
      const int64_t last = std::min(plan.N, first + group);
      const Share tasks((last - first) * plan.chunks, member.id, member.size);
      if (batch || H) measure_images(member, first, last, tasks, channels);
      if (H) {
        A* z = affine.p;  // read before p is filled
        fill_squeeze(norm, excitation.squeezed, C, first, last, channels, z);
        member.barrier();
        excite(member, excitation, z, first, last, channels, units);
      }
      fill_affine(norm, other, H ? excitation.gates : nullptr, C, first, last, channels, affine);
      member.barrier();
      apply(first, tasks);
    }
    finish_streams();
  }

  // The statistics of images [first, last): means of each for the gate, with `batch` those of all.
  void measure_images(const Member& member, int64_t first, int64_t last, const Share& tasks,
                      const Share& channels) const {
    A* pivot = pivots + member.id * C;
    measure(plan, static_cast<const T*>(a.x), first, tasks, partial, pivot);
    if (batch && norm_shortcut)
      measure(plan, static_cast<const T*>(a.shortcut), first, tasks, shortcut_partial, pivot);
    member.barrier();
    merge_moments(plan, partial, first, last, channels.begin, channels.end, batch, a.norm.eps,
                  H ? static_cast<A*>(a.squeezed) : nullptr, statistics);
    if (batch) update_running(a.norm, C, channels, statistics);
    if (!batch || !norm_shortcut) return;
    merge_moments<A>(plan, shortcut_partial, first, last, channels.begin, channels.end, true,
                     a.shortcut_norm.eps, nullptr, shortcut_statistics);
    update_running(a.shortcut_norm, C, channels, shortcut_statistics);
  }

  void apply(int64_t first, const Share& tasks) const {
    if (a.activation == kActLinear || a.activation == kActRelu)
      apply_choice<false>(first, tasks);
    else
      apply_choice<true>(first, tasks);
  }

  template <bool kOther>
  void apply_choice(int64_t first, const Share& tasks) const {
    if (a.shortcut_kind == kNoShortcut)
      apply_pass<T, kNoShortcut, kOther>(plan, a, affine, first, tasks, streams);
    else if (norm_shortcut)
      apply_pass<T, kNormalizedShortcut, kOther>(plan, a, affine, first, tasks, streams);
    else
      apply_pass<T, kPlainShortcut, kOther>(plan, a, affine, first, tasks, streams);
  }
};

template <class T>
int tail_forward(const TailArguments& arguments) {
  TailForward<T> pass(arguments);
  if (!pass.allocate()) return 1;
  parallel(pass.threads, pass);
  return 0;
}

}  // namespace
}  // namespace senet
