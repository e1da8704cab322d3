// Branches joined along the channels, y = gates ⊙ concat(act(norm(x_i))), forward and backward; gates
// and norms are optional, one branch is BN → activation → SE. An activation does not commute with the squeeze, so the pass that would write a
// branch's activation sums it instead, and the joined map is written once, scaled: from the branches'
// inputs, which a group of images leaves in the cache. Backward, with m = act'(norm(x)), y' = dL/dy and
// d = dL/d(squeeze) / P: the gradient of the activation is s y' + d, so the sums of m y', m and of both
// times x - mean give the gradients of the gate and then, with known s and d, of the norm.
// Derivation: docs/algebra.md, "Behind an activation".
#pragma once

#include <utility>
#include <vector>

#include "excitation.h"
#include "join_passes.h"
#include "moments.h"

namespace senet {
namespace {

// Rows of `statistics`.
enum { kMean, kInvStd, kVar, kScale, kShift, kStatisticsRows };

// A branch's place in the join.
template <class A>
struct JoinPart {
  const JoinBranch* branch;
  Plan plan;
  int64_t offset;  // of its first channel
  A* partial;
  // The channels of `share`, which counts those of all branches, that are this branch's own.
  Share own(const Share& share) const {
    Share mine = share;
    mine.begin = std::min(std::max(share.begin - offset, int64_t(0)), plan.C);
    mine.end = std::min(std::max(share.end - offset, int64_t(0)), plan.C);
    return mine;
  }
  bool normalizes() const { return branch->normalization != kNone; }
  // What its map goes through.
  int64_t activation(const JoinArguments& a) const { return normalizes() ? a.activation : int64_t(kActLinear); }
  bool batch() const { return branch->normalization == kBatchStatistics; }
};

template <class A>
std::vector<JoinPart<A>> join_parts(const JoinArguments& a) {
  const JoinBranch* branch = reinterpret_cast<const JoinBranch*>(&a + 1);
  std::vector<JoinPart<A>> parts;
  int64_t offset = 0;
  for (int64_t k = 0; k < a.branches; offset += branch[k++].C)
    parts.push_back({branch + k, Plan(a.N, branch[k].C, a.P, a.channels_last), offset, nullptr});
  return parts;
}

// Numbers of scratch that the branches' sums of `kinds` kinds take, and places for them.
template <class A>
int64_t partial_size(const std::vector<JoinPart<A>>& parts, int64_t kinds) {
  int64_t total = 0;
  for (const auto& part : parts) total += part.plan.N * part.plan.sum_chunks * kinds * part.plan.C;
  return total;
}

template <class A>
void place_partials(std::vector<JoinPart<A>>& parts, int64_t kinds, A* memory) {
  for (auto& part : parts) {
    part.partial = memory;
    memory += part.plan.N * part.plan.sum_chunks * kinds * part.plan.C;
  }
}

// to[j][n][offset + c] = weight * (sum j over the chunks of image n), for the channels `own`.
template <class A>
void merge_sums(const JoinPart<A>& part, int64_t kinds, int64_t first, int64_t last, const Share& own,
                double weight, int64_t width, A* const* to) {
  constexpr int64_t kBlock = 64;
  const int64_t C = part.plan.C, chunks = part.plan.sum_chunks;
  for (int64_t n = first; n < last; ++n)
    for (int64_t j = 0; j < kinds; ++j)
      for (int64_t c0 = own.begin; c0 < own.end; c0 += kBlock) {
        const int64_t size = std::min(kBlock, own.end - c0);
        double sum[kBlock] = {};
        for (int64_t k = 0; k < chunks; ++k) {
          const A* from = part.partial + ((n * chunks + k) * kinds + j) * C + c0;
          for (int64_t i = 0; i < size; ++i) sum[i] += double(from[i]);
        }
        A* out = to[j] + n * width + part.offset + c0;
        for (int64_t i = 0; i < size; ++i) out[i] = A(sum[i] * weight);
      }
}

template <class T>
bool join_may_stream(const JoinPart<Accumulator<T>>& part, int64_t width, const void* to) {
  const bool even = part.plan.channels_last ? (width | part.plan.C | part.offset) * sizeof(T) % 64 == 0
                                            : part.plan.P * sizeof(T) % 64 == 0;
  return even && aligned(to) &&
         part.plan.N * width * part.plan.P * int64_t(sizeof(T)) >= kStreamBytes;
}

// A branch's rows of `statistics`, for the channels `own`; `moments` is (3, C) of scratch.
template <class A>
void join_statistics(const JoinPart<A>& part, const Share& own, int64_t width, A* moments,
                     A* statistics) {
  const JoinBranch& b = *part.branch;
  const int64_t C = part.plan.C;
  if (part.batch())
    merge_moments<A>(part.plan, part.partial, 0, part.plan.N, own.begin, own.end, true, b.norm.eps,
                     nullptr, moments);
  else if (part.normalizes())
    use_running(b.norm, C, own, moments);
  const A *weight = static_cast<const A*>(b.norm.weight), *bias = static_cast<const A*>(b.norm.bias);
  for (int64_t c = own.begin; c < own.end; ++c) {
    A* to = statistics + part.offset + c;
    for (int row = 0; row < 3; ++row)
      to[row * width] = part.normalizes() ? moments[row * C + c] : A(row == kInvStd);
    to[kScale * width] = to[kInvStd * width] * (weight ? weight[c] : A(1));
    to[kShift * width] = bias ? bias[c] : A(0);
  }
}

// What all threads know of a forward pass, and what each of them does.
template <class T>
struct JoinForward {
  using A = Accumulator<T>;
  const JoinArguments& a;
  const Plan whole;
  const int64_t N, C, H;
  const int threads;
  A *const statistics, *const squeezed;
  Excitation<A> excitation;
  std::vector<JoinPart<A>> parts;
  A *moments, *ones, *pivots;

  explicit JoinForward(const JoinArguments& arguments)
      : a(arguments),
        whole(a.N, a.C, a.P, a.channels_last),
        N(a.N),
        C(a.C),
        H(a.H),
        threads(thread_count(whole, a.threads)),
        statistics(static_cast<A*>(a.statistics)),
        squeezed(static_cast<A*>(a.squeezed)),
        excitation(excitation_of<A>(a)),
        parts(join_parts<A>(a)) {
    excitation.hidden_activation = a.hidden_activation;
  }

  bool allocate() {
    moments = scratch<A>(4 * C + threads * C + N * H + partial_size(parts, 2));
    if (!moments) return false;
    ones = moments + 3 * C;
    pivots = ones + C;
    if (a.hidden_activation != kActRelu) excitation.active = pivots + threads * C;
    place_partials(parts, 2, pivots + threads * C + N * H);
    return true;
  }

  Affine<T, kNoShortcut> affine(const JoinPart<A>& part, int64_t n) const {
    const T* x = static_cast<const T*>(part.branch->x) + n * part.plan.C * a.P;
    const A* row = statistics + part.offset;
    return {x, nullptr, row, row + kScale * C, row + kShift * C, nullptr, nullptr};
  }

  // Statistics and gates are those of an earlier pass: y once more, to the bit.
  bool given() const { return parts[0].branch->normalization == kGivenStatistics; }

  void operator()(const Member& member) const {
    const Share channels(C, member.id, member.size, kLanes<A>), units(H, member.id, member.size, 4);
    if (given()) {
      std::fill(ones + channels.begin, ones + channels.end, A(1));
      member.barrier();
      for (const auto& part : parts)
        apply(part, 0, Share(N * part.plan.chunks, member.id, member.size));
      return finish_streams();
    }
    for (const auto& part : parts)
      if (part.batch())
        measure(part.plan, static_cast<const T*>(part.branch->x), 0,
                Share(N * part.plan.chunks, member.id, member.size), part.partial,
                pivots + member.id * C);
    member.barrier();
    for (const auto& part : parts)
      join_statistics(part, part.own(channels), C, moments + 3 * part.offset, statistics);
    std::fill(ones + channels.begin, ones + channels.end, A(1));
    member.barrier();
    const int64_t group = H ? whole.group(sizeof(T), threads) : N;
    for (int64_t first = 0; first < N; first += group) {
      const int64_t last = std::min(N, first + group);
      if (H) {
        squeeze(member, first, last, channels);
        member.barrier();
        excite(member, excitation, squeezed, first, last, channels, units);
        member.barrier();
      }
      for (auto part = parts.rbegin(); part != parts.rend(); ++part)
        apply(*part, first, Share((last - first) * part->plan.chunks, member.id, member.size));
    }
    finish_streams();
  }

  // Means of the activations of images [first, last).
  void squeeze(const Member& member, int64_t first, int64_t last, const Share& channels) const {
    for (const auto& part : parts) {
      const Share tasks((last - first) * part.plan.chunks, member.id, member.size);
      with_activation(part.activation(a), [&](auto activation) {
        const auto make = [&](int64_t n) {
          return JoinSum<T, activation()>{affine(part, n), A(a.negative_slope)};
        };
        walk(part.plan, part.plan.C, first, tasks, false, part.partial, op_of(make));
      });
    }
    member.barrier();
    for (const auto& part : parts)
      merge_sums(part, 1, first, last, part.own(channels), 1.0 / double(a.P), C, &squeezed);
  }

  void apply(const JoinPart<A>& part, int64_t first, const Share& tasks) const {
    const bool streams = join_may_stream<T>(part, C, a.y);
    with_activation(part.activation(a), [&](auto activation) {
      const auto make = [&](int64_t n) {
        const int64_t at = n * C * a.P + part.offset * (a.channels_last ? 1 : a.P);
        return JoinApply<T, activation()>{
            affine(part, n), (H ? excitation.gates + n * C : ones) + part.offset,
            static_cast<T*>(a.y) + at, A(a.negative_slope), streams};
      };
      A* none = nullptr;
      walk(part.plan, C, first, tasks, true, none, op_of(make));
    });
  }
};

template <class T>
int join_forward(const JoinArguments& arguments) {
  JoinForward<T> pass(arguments);
  if (!pass.allocate()) return 1;
  parallel(pass.threads, pass);
  return 0;
}

// Gradients of a branch's norm from the sums g1 = m y', g2 = m y' (x - mean), n1 = m, n2 = m (x - mean),
// all (N, C), and the coefficients of JoinGradient; for the channels `own`.
template <class A>
void join_parameters(const JoinPart<A>& part, const JoinArguments& a, const Share& own,
                     const A* const* sums, const A* dz, A* const* coefficients) {
  const int64_t C = a.C;
  const double pixel = 1.0 / double(a.P), M = double(a.N) * double(a.P);
  const A *statistics = static_cast<const A*>(a.statistics), *gates = static_cast<const A*>(a.gates);
  A *dweight = static_cast<A*>(part.branch->dweight), *dbias = static_cast<A*>(part.branch->dbias);
  constexpr int64_t kBlock = 64;
  for (int64_t c0 = own.begin; c0 < own.end; c0 += kBlock) {
    const int64_t size = std::min(kBlock, own.end - c0), at = part.offset + c0;
    const A *scale = statistics + kScale * C + at, *inv_std = statistics + kInvStd * C + at;
    double bias[kBlock] = {}, weight[kBlock] = {};
    for (int64_t n = 0; n < a.N; ++n) {
      const int64_t row = n * C + at;
      A *gain = coefficients[0] + row, *inside = coefficients[1] + row;
      for (int64_t i = 0; i < size; ++i) {
        const double s = a.H ? double(gates[row + i]) : 1.0;
        const double d = a.H ? double(dz[row + i]) * pixel : 0.0;
        gain[i] = A(double(scale[i]) * s);
        inside[i] = A(double(scale[i]) * d);
        if (!part.normalizes()) continue;
        bias[i] += s * double(sums[0][row + i]);
        weight[i] += s * double(sums[1][row + i]);
        if (!a.H) continue;
        bias[i] += d * double(sums[2][row + i]);
        weight[i] += d * double(sums[3][row + i]);
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      const double inv = double(inv_std[i]), a_M = part.batch() ? double(scale[i]) / M : 0.0;
      if (dweight) dweight[c0 + i] = A(weight[i] * inv);
      if (dbias) dbias[c0 + i] = A(bias[i]);
      coefficients[2][at + i] = A(-a_M * inv * inv * weight[i]);
      coefficients[3][at + i] = A(-a_M * bias[i]);
    }
  }
}

// What all threads know of a backward pass, and what each of them does.
template <class T>
struct JoinBackward {
  using A = Accumulator<T>;
  const JoinArguments& a;
  const Plan whole;
  const int64_t N, C, H, kinds;
  const int threads;
  const A* const statistics;
  Excitation<A> excitation;
  std::vector<JoinPart<A>> parts;
  A *sums[5];          // of join_parameters, as are the coefficients; the last of y' act(u)
  A *coefficients[4];  // scale, inside (N, C), slope, outside (C,) of JoinGradient
  ExcitationBuffers<A> b;

  explicit JoinBackward(const JoinArguments& arguments)
      : a(arguments),
        whole(a.N, a.C, a.P, a.channels_last),
        N(a.N),
        C(a.C),
        H(a.H),
        kinds(!H ? 2 : homogeneous(int(a.activation)) ? 4 : 5),
        threads(thread_count(whole, a.threads)),
        statistics(static_cast<const A*>(a.statistics)),
        excitation(excitation_of<A>(a)),
        parts(join_parts<A>(a)) {
    excitation.hidden_activation = a.hidden_activation;
  }

  bool allocate() {
    const int64_t map = N * C;
    A* memory = scratch<A>(10 * map + 2 * C + 2 * N * H + partial_size(parts, kinds));
    if (!memory) return false;
    const auto take = [&memory](int64_t size) { return std::exchange(memory, memory + size); };
    for (A*& sum : sums) sum = take(map);
    for (int i = 0; i < 4; ++i) coefficients[i] = take(i < 2 ? map : C);
    b.g1 = sums[0], b.g2 = sums[kinds == 5 ? 4 : 1];
    b.dt = take(map), b.z = take(map), b.dz = take(map), b.dhidden = take(N * H);
    A* const active = take(N * H);
    if (a.hidden_activation != kActRelu) excitation.active = active;
    place_partials(parts, kinds, memory);
    return true;
  }

  Affine<T, kNoShortcut> affine(const JoinPart<A>& part, int64_t n) const {
    const T* x = static_cast<const T*>(part.branch->x) + n * part.plan.C * a.P;
    const A* row = statistics + part.offset;
    return {x, nullptr, row, row + kScale * C, row + kShift * C, nullptr, nullptr};
  }

  const T* gradient(const JoinPart<A>& part, int64_t n) const {
    return static_cast<const T*>(a.gradient) + n * C * a.P + part.offset * (a.channels_last ? 1 : a.P);
  }

  void operator()(const Member& member) const {
    const Share channels(C, member.id, member.size, kLanes<A>);
    const Share units(H, member.id, member.size, kLanes<A>);
    // The gate's gradient, sum of y' act(u): by itself, or as gain kScale and offset kShift make it.
    const Norm<A> identity{nullptr, nullptr, nullptr, nullptr};
    const Norm<A> norm{nullptr, statistics + kShift * C, statistics, statistics + kScale * C};
    for (const auto& part : parts)
      reduce(part, Share(N * part.plan.chunks, member.id, member.size));
    member.barrier();
    for (const auto& part : parts)
      if (H || part.normalizes()) merge_sums(part, kinds, 0, N, part.own(channels), 1.0, C, sums);
    if (H) gate_backward(member, excitation, b, kinds == 5 ? identity : norm, 0, N, channels, units);
    for (const auto& part : parts)
      join_parameters(part, a, part.own(channels), sums, b.dz, coefficients);
    member.barrier();
    for (auto part = parts.rbegin(); part != parts.rend(); ++part)
      if (part->branch->dx)
        write_gradient(*part, Share(N * part->plan.chunks, member.id, member.size));
    if (H) gate_parameters(excitation, b, identity, channels, units);
    finish_streams();
  }

  template <int kActivation, int kCount>
  void reduce_as(const JoinPart<A>& part, const Share& tasks) const {
    const auto make = [&](int64_t n) {
      return JoinReduce<T, kActivation, kCount>{affine(part, n), gradient(part, n),
                                                A(a.negative_slope)};
    };
    walk(part.plan, C, 0, tasks, false, part.partial, op_of(make));
  }

  void reduce(const JoinPart<A>& part, const Share& tasks) const {
    with_activation(part.activation(a), [&](auto activation) {
      if (!H && part.normalizes()) reduce_as<activation(), 2>(part, tasks);
      if constexpr (homogeneous(activation()))
        if (kinds == 4) reduce_as<activation(), 4>(part, tasks);
      if constexpr (activation() == kActLinear || !homogeneous(activation()))
        if (kinds == 5) reduce_as<activation(), 5>(part, tasks);
    });
  }

  void write_gradient(const JoinPart<A>& part, const Share& tasks) const {
    const bool streams = may_stream(part.plan, sizeof(T), part.branch->dx);
    with_activation(part.activation(a), [&](auto activation) {
      const auto make = [&](int64_t n) {
        const int64_t c = part.offset;
        T* const dx = static_cast<T*>(part.branch->dx) + n * part.plan.C * a.P;
        return JoinGradient<T, activation()>{affine(part, n),
                                             gradient(part, n),
                                             coefficients[0] + n * C + c,
                                             coefficients[1] + n * C + c,
                                             coefficients[2] + c,
                                             coefficients[3] + c,
                                             dx,
                                             A(a.negative_slope),
                                             streams};
      };
      A* none = nullptr;
      walk(part.plan, C, 0, tasks, true, none, op_of(make));
    });
  }
};

template <class T>
int join_backward(const JoinArguments& arguments) {
  JoinBackward<T> pass(arguments);
  if (!pass.allocate()) return 1;
  parallel(pass.threads, pass);
  return 0;
}

}  // namespace
}  // namespace senet
