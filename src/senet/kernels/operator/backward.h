// The tail backward. Notation and derivation: docs/algebra.md, "Backward".
#pragma once

#include "excitation.h"

namespace senet {
namespace {

// Everything of (N, C) size that the two map passes exchange.
template <class A>
struct BackwardBuffers {
  A* partial;
  ExcitationBuffers<A> gate;
  A *scale, *offset, *slope, *shortcut_slope, *shortcut_offset;
  double* common;  // what batch statistics take from every pixel of a channel
  AffineBuffers<A> affine;
};

template <class T, int kMask, bool kBoth, bool kWrite>
void reduce_pass(const Plan& plan, const TailArguments& a, const BackwardBuffers<Accumulator<T>>& b,
                 int64_t first, const Share& share, bool streams) {
  using A = Accumulator<T>;
  const int64_t image = plan.C * plan.P;
  const A* statistics = static_cast<const A*>(a.statistics);
  const auto at = [image](const void* map, int64_t n) {
    return map ? static_cast<const T*>(map) + n * image : nullptr;
  };
  const auto make = [&](int64_t n) {
    const T *x = at(a.x, n), *shortcut = at(a.shortcut, n);
    using M = Masked<T, kMask>;
    return Reduce<T, kMask, kBoth, kWrite>{
        M{at(a.gradient, n), at(a.y, n), affine_of<T, M::kShortcut>(plan, a, b.affine, n),
          a.activation, A(a.negative_slope)},
        x,
        shortcut,
        a.normalization == kNone ? b.affine.zeros : statistics,
        kBoth ? statistics + 3 * plan.C : nullptr,
        kWrite ? static_cast<T*>(a.dshortcut) + n * image : nullptr,
        streams};
  };
  walk(plan, plan.C, first, share, false, b.partial, op_of(make));
}

template <class T, class... Rest>
void reduce_choice(int mask, bool both, bool write, const Rest&... rest) {
  if (mask == kMaskFromX) return reduce_pass<T, kMaskFromX, false, false>(rest...);
  if (mask == kMaskFromBoth) return reduce_pass<T, kMaskFromBoth, true, false>(rest...);
  if (mask == kMaskFromY)
    return write ? reduce_pass<T, kMaskFromY, false, true>(rest...)
                 : reduce_pass<T, kMaskFromY, false, false>(rest...);
  if (mask == kThroughX) return reduce_pass<T, kThroughX, false, false>(rest...);
  if (mask == kThroughBoth) return reduce_pass<T, kThroughBoth, true, false>(rest...);
  if (mask == kThroughPlain)
    return write ? reduce_pass<T, kThroughPlain, false, true>(rest...)
                 : reduce_pass<T, kThroughPlain, false, false>(rest...);
  return both ? reduce_pass<T, kNoMask, true, false>(rest...)
              : reduce_pass<T, kNoMask, false, false>(rest...);
}

template <class T, int kMask, bool kBatch, int kShortcutGradient>
void gradient_pass(const Plan& plan, const TailArguments& a,
                   const BackwardBuffers<Accumulator<T>>& b, const void* gradient, int64_t first,
                   const Share& share, bool streams) {
  using A = Accumulator<T>;
  const int64_t image = plan.C * plan.P, step = a.H ? plan.C : 0;
  const A* statistics = static_cast<const A*>(a.statistics);
  const A* other = kShortcutGradient == kNormalizedShortcut ? statistics + 3 * plan.C : nullptr;
  const auto at = [image](const void* map, int64_t n) {
    return map ? static_cast<const T*>(map) + n * image : nullptr;
  };
  const auto make = [&](int64_t n) {
    const T *x = at(a.x, n), *shortcut = at(a.shortcut, n);
    using M = Masked<T, kMask>;
    T* const dx = a.dx ? static_cast<T*>(a.dx) + n * image : nullptr;
    T* const dshortcut = kShortcutGradient ? static_cast<T*>(a.dshortcut) + n * image : nullptr;
    return Gradient<T, kMask, kBatch, kShortcutGradient>{
        M{at(gradient, n), at(a.y, n), affine_of<T, M::kShortcut>(plan, a, b.affine, n),
          a.activation, A(a.negative_slope)},
        {x, statistics, b.scale + n * step, b.slope, b.offset + n * step, dx},
        {shortcut, other, b.affine.shortcut_p, b.shortcut_slope, b.shortcut_offset, dshortcut},
        a.dx != nullptr,
        streams};
  };
  Accumulator<T>* none = nullptr;
  walk(plan, plan.C, first, share, true, none, op_of(make));
}

template <class T, bool kBatch, class... Rest>
void gradient_choice(int mask, int shortcut_gradient, const Rest&... rest) {
  if (shortcut_gradient == kNormalizedShortcut) {
    if (mask == kNoMask) return gradient_pass<T, kNoMask, kBatch, kNormalizedShortcut>(rest...);
    return mask == kMaskFromBoth
               ? gradient_pass<T, kMaskFromBoth, kBatch, kNormalizedShortcut>(rest...)
               : gradient_pass<T, kThroughBoth, kBatch, kNormalizedShortcut>(rest...);
  }
  if (shortcut_gradient == kPlainShortcut)
    return mask == kMaskFromY ? gradient_pass<T, kMaskFromY, kBatch, kPlainShortcut>(rest...)
                              : gradient_pass<T, kThroughPlain, kBatch, kPlainShortcut>(rest...);
  switch (mask) {
    case kNoMask:
      return gradient_pass<T, kNoMask, kBatch, kNoShortcut>(rest...);
    case kMaskFromY:
      return gradient_pass<T, kMaskFromY, kBatch, kNoShortcut>(rest...);
    case kMaskFromX:
      return gradient_pass<T, kMaskFromX, kBatch, kNoShortcut>(rest...);
    case kThroughX:
      return gradient_pass<T, kThroughX, kBatch, kNoShortcut>(rest...);
    case kThroughPlain:
      return gradient_pass<T, kThroughPlain, kBatch, kNoShortcut>(rest...);
    case kThroughBoth:
      return gradient_pass<T, kThroughBoth, kBatch, kNoShortcut>(rest...);
    default:
      return gradient_pass<T, kMaskFromBoth, kBatch, kNoShortcut>(rest...);
  }
}

// Sums of the tasks: g1, g2 per image and channel; for a normalized shortcut its parameters'
// gradients and the coefficients of its map gradient.
template <class A>
void merge_reductions(const Plan& plan, const TailArguments& a, const BackwardBuffers<A>& b, bool both,
                      const Norm<A>& other, int64_t first, int64_t last, const Share& share) {
  constexpr int64_t kBlock = 64;
  const int64_t C = plan.C, kinds = both ? 3 : 2;
  const double M = double(plan.N) * double(plan.P);
  const bool batch = a.normalization == kBatchStatistics;
  for (int64_t c0 = share.begin; c0 < share.end; c0 += kBlock) {
    const int64_t width = std::min(kBlock, share.end - c0);
    double total[2][kBlock] = {};
    for (int64_t n = first; n < last; ++n) {
      double sum[3][kBlock] = {};
      for (int64_t k = 0; k < plan.sum_chunks; ++k)
        for (int64_t j = 0; j < kinds; ++j) {
          const A* part = b.partial + ((n * plan.sum_chunks + k) * kinds + j) * C + c0;
          for (int64_t i = 0; i < width; ++i) sum[j][i] += double(part[i]);
        }
      for (int64_t i = 0; i < width; ++i) {
        b.gate.g1[n * C + c0 + i] = A(sum[0][i]);
        b.gate.g2[n * C + c0 + i] = A(sum[1][i]);
        total[0][i] += sum[0][i];
        total[1][i] += sum[2][i];
      }
    }
    if (!both) continue;
    A *dweight = static_cast<A*>(a.dshortcut_weight), *dbias = static_cast<A*>(a.dshortcut_bias);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = c0 + i;
      const double weight = total[1][i] * double(other.inv_std[c]), bias = total[0][i];
      if (dweight) dweight[c] = A(weight);
      if (dbias) dbias[c] = A(bias);
      const double scale = double(other.scale(c));
      b.shortcut_slope[c] = batch ? A(-scale * double(other.inv_std[c]) * weight / M) : A(0);
      b.shortcut_offset[c] = batch ? A(-scale * bias / M) : A(0);
    }
  }
}

// Gradients of the normalization's parameters, and with batch statistics what they add to dx; all
// images at once.
template <class A>
void norm_parameters(const Plan& plan, const TailArguments& a, const BackwardBuffers<A>& b,
                     const Norm<A>& norm, const Share& share) {
  const int64_t C = plan.C;
  const double M = double(plan.N) * double(plan.P);
  const bool batch = a.normalization == kBatchStatistics;
  A *dweight = static_cast<A*>(a.dweight), *dbias = static_cast<A*>(a.dbias);
  // Blocks of channels, images outside: the other way round every load is a row of C numbers away
  // from the one before, and all fall into the same few lines of the cache.
  for_blocks(norm, share, [&](int64_t c0, int64_t width, const NormBlock<A>& block) {
    double bias[NormBlock<A>::kSize] = {}, weight[NormBlock<A>::kSize] = {};
    for (int64_t n = 0; n < plan.N; ++n) {
      const int64_t at = n * C + c0;
      const A *g1 = b.gate.g1 + at, *g2 = b.gate.g2 + at;
      if (!a.H) {
        for (int64_t i = 0; i < width; ++i) bias[i] += double(g1[i]), weight[i] += double(g2[i]);
        continue;
      }
      const A *s = static_cast<const A*>(a.gates) + at, *dz = b.gate.dz + at;
      const A* mean = static_cast<const A*>(a.squeezed) + at;
      for (int64_t i = 0; i < width; ++i) {
        bias[i] += double(s[i]) * double(g1[i]) + double(dz[i]);
        weight[i] += double(s[i]) * double(g2[i]) + double(dz[i]) * double(mean[i] - block.centre[i]);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = c0 + i;
      const double inv_std = norm.mean ? double(norm.inv_std[c]) : 1.0;
      if (dweight) dweight[c] = A(weight[i] * inv_std);
      if (dbias) dbias[c] = A(bias[i]);
      b.slope[c] = batch ? A(-double(block.scale[i]) * inv_std * inv_std * weight[i] / M) : A(0);
      b.common[c] = batch ? bias[i] / M : 0.0;
    }
  });
}

// Coefficients of dx for images [first, last); b.common as norm_parameters leaves it, or zero.
template <class A>
void input_coefficients(const Plan& plan, const TailArguments& a, const BackwardBuffers<A>& b,
                        const Norm<A>& norm, int64_t first, int64_t last, const Share& share) {
  const int64_t C = plan.C;
  const A* gates = a.H ? static_cast<const A*>(a.gates) : nullptr;
  if (!gates) {
    for (int64_t c = share.begin; c < share.end; ++c) {
      b.scale[c] = norm.scale(c);
      b.offset[c] = A(-double(norm.scale(c)) * b.common[c]);
    }
    return;
  }
  const double share_of_pixel = 1.0 / double(plan.P);
  for_blocks(norm, share, [&](int64_t c, int64_t width, const NormBlock<A>& block) {
    const double* common = b.common + c;
    for (int64_t n = first; n < last; ++n) {
      const int64_t at = n * C + c;
      const A *s = gates + at, *dz = b.gate.dz + at;
      A *scale = b.scale + at, *offset = b.offset + at;
      for (int64_t i = 0; i < width; ++i) {
        scale[i] = block.scale[i] * s[i];
        offset[i] = A(double(block.scale[i]) * (double(dz[i]) * share_of_pixel - common[i]));
      }
    }
  });
}

// What all threads know of a backward pass, and what each of them does.
template <class T>
struct TailBackward {
  using A = Accumulator<T>;
  const TailArguments& a;
  const Plan plan;
  const int64_t N, C, H;
  const bool batch, norm_shortcut, plain_shortcut;
  const bool parameters;  // whether gradients of the norm's or the gate's are wanted
  const bool reduces;     // whether anything needs the sums over the maps
  const int mask;
  // Whether the reducing pass writes the shortcut's gradient, from which the other pass goes on. Not
  // if that rounds it; a relu's is as many bits as y's.
  const bool writes;
  const int threads;
  const Norm<A> norm, other;  // other: the shortcut's
  const Excitation<A> excitation;
  BackwardBuffers<A> b;

  explicit TailBackward(const TailArguments& arguments)
      : a(arguments),
        plan(a.N, a.C, a.P, a.channels_last),
        N(a.N),
        C(a.C),
        H(a.H),
        batch(a.normalization == kBatchStatistics),
        norm_shortcut(a.shortcut_kind == kNormalizedShortcut),
        plain_shortcut(a.shortcut_kind == kPlainShortcut),
        parameters(a.dweight || a.dbias || a.dw1 || a.db1 || a.dw2 || a.db2),
        reduces(parameters || a.dshortcut_weight || a.dshortcut_bias || (a.dx && (batch || H)) ||
                (a.dshortcut && norm_shortcut && batch)),
        mask(a.activation == kActLinear ? kNoMask
             : a.activation == kActRelu ? (plain_shortcut  ? kMaskFromY
                                           : norm_shortcut ? kMaskFromBoth
                                                           : kMaskFromX)
             : plain_shortcut           ? kThroughPlain
             : norm_shortcut            ? kThroughBoth
                                        : kThroughX),
        writes(reduces && a.dshortcut &&
               (mask == kMaskFromY || (mask == kThroughPlain && sizeof(T) == sizeof(A)))),
        threads(thread_count(plan, a.threads)),
        norm(norm_of(a.norm, statistics(), C)),
        other(norm_of(a.shortcut_norm, norm_shortcut ? statistics() + 3 * C : nullptr, C)),
        excitation(excitation_of<A>(a)) {}

  const A* statistics() const {
    return a.normalization == kNone ? nullptr : static_cast<const A*>(a.statistics);
  }

  bool allocate() {
    const int64_t map = N * C, gated_map = H ? map : 0, rows_pq = H ? N : 1;
    const int64_t partial = N * plan.sum_chunks * (norm_shortcut ? 3 : 2) * C;
    AffineBuffers<A>& affine = b.affine;
    A* common = nullptr;
    const struct {
      A*& place;
      int64_t size;
    } pieces[] = {
        {b.partial, partial},
        {b.gate.g1, map},
        {b.gate.g2, map},
        {b.gate.dt, gated_map},
        {b.gate.z, gated_map},
        {b.gate.dz, gated_map},
        {b.gate.dhidden, N * H},
        {b.scale, rows_pq * C},
        {b.offset, rows_pq * C},
        {b.slope, C},
        {b.shortcut_slope, C},
        {b.shortcut_offset, C},
        {affine.p, rows_pq * C},
        {affine.q, rows_pq * C},
        {affine.shortcut_p, C},
        {affine.zeros, C},
        {common, C * int64_t(sizeof(double) / sizeof(A))},
    };
    const auto whole_lines = [](int64_t size) { return (size + 15) / 16 * 16; };
    int64_t total = 0;
    for (const auto& piece : pieces) total += whole_lines(piece.size);
    A* memory = scratch<A>(total);
    if (!memory) return false;
    for (const auto& piece : pieces) {
      piece.place = memory;
      memory += whole_lines(piece.size);
    }
    b.common = reinterpret_cast<double*>(common);
    affine.step = H ? C : 0;
    return true;
  }

  void operator()(const Member& member) const {
    const Share channels(C, member.id, member.size, kLanes<A>);
    const Share units(H, member.id, member.size, kLanes<A>);
    prepare(channels);
    member.barrier();
    const int64_t maps_read = plain_shortcut ? 4 : norm_shortcut ? 3 : 2;
    const int64_t group =
        batch || norm_shortcut || !reduces ? N : plan.group(maps_read * sizeof(T), threads);
    for (int64_t first = 0; first < N; first += group) {
      const int64_t last = std::min(N, first + group);
      const Share tasks((last - first) * plan.chunks, member.id, member.size);
      if (reduces) reduce(member, first, last, tasks, channels, units);
      if (a.dx || (a.dshortcut && !writes)) write_gradients(first, tasks);
    }
    // After the map, which is in the cache: nobody waits for these.
    if (!batch && parameters) norm_parameters(plan, a, b, norm, channels);
    if (H && parameters) gate_parameters(excitation, b.gate, norm, channels, units);
    finish_streams();
  }

  void prepare(const Share& channels) const {
    if (norm_shortcut)
      for (int64_t c = channels.begin; c < channels.end; ++c)
        b.shortcut_slope[c] = b.shortcut_offset[c] = 0;
    // Only a mask that is recomputed needs them for each image.
    fill_affine(norm, other, H ? static_cast<const A*>(a.gates) : nullptr, C, 0,
                recomputes(mask) ? N : 1, channels, b.affine);
    if (!batch) std::fill(b.common + channels.begin, b.common + channels.end, 0.0);
    if (!reduces) input_coefficients(plan, a, b, norm, 0, N, channels);
  }

  // The first pass over images [first, last), and from its sums all that the second one needs.
  void reduce(const Member& member, int64_t first, int64_t last, const Share& tasks,
              const Share& channels, const Share& units) const {
    const bool streams = writes && may_stream(plan, sizeof(T), a.dshortcut);
    reduce_choice<T>(mask, norm_shortcut, writes, plan, a, b, first, tasks, streams);
    member.barrier();
    merge_reductions(plan, a, b, norm_shortcut, other, first, last, channels);
    if (H && (parameters || a.dx))
      gate_backward(member, excitation, b.gate, norm, first, last, channels, units);
    if (batch && (parameters || a.dx)) norm_parameters(plan, a, b, norm, channels);
    if (a.dx) input_coefficients(plan, a, b, norm, first, last, channels);
    member.barrier();
  }

  // The second pass.
  void write_gradients(int64_t first, const Share& tasks) const {
    const bool streams = may_stream(plan, sizeof(T), a.dx) && may_stream(plan, sizeof(T), a.dshortcut);
    const int final_mask = writes ? kNoMask : mask;
    const int shortcut = writes || !a.dshortcut ? kNoShortcut : int(a.shortcut_kind);
    const void* gradient = writes ? a.dshortcut : a.gradient;
    if (batch)
      gradient_choice<T, true>(final_mask, shortcut, plan, a, b, gradient, first, tasks, streams);
    else
      gradient_choice<T, false>(final_mask, shortcut, plan, a, b, gradient, first, tasks, streams);
  }
};

template <class T>
int tail_backward(const TailArguments& arguments) {
  TailBackward<T> pass(arguments);
  if (!pass.allocate()) return 1;
  parallel(pass.threads, pass);
  return 0;
}

}  // namespace
}  // namespace senet
