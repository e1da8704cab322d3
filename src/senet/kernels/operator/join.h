// Branches joined along the channels, y = gates ⊙ concat(relu(norm(x_i))), forward and backward; gates
// and norms are optional. A relu does not commute with the squeeze, so the pass that would write a
// branch's activation sums it instead, and the joined map is written once, scaled: from the branches'
// inputs, which a group of images leaves in the cache. Backward, with m = [norm(x) > 0], y' = dL/dy and
// d = dL/d(squeeze) / P: the gradient of the activation is s y' + d, so the sums of m y', m and of both
// times x - mean give the gradients of the gate and then, with known s and d, of the norm.
// Included once per instruction set.

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
  bool activates() const { return branch->normalization != kNone; }
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

// The gate's arguments as the tail's functions take them.
TailArguments gate_arguments(const JoinArguments& a) {
  TailArguments t{};
  t.N = a.N, t.C = a.C, t.P = a.P, t.H = a.H, t.threads = a.threads, t.gate = a.gate;
  t.w1 = a.w1, t.b1 = a.b1, t.w2 = a.w2, t.b2 = a.b2;
  t.squeezed = a.squeezed, t.hidden = a.hidden, t.gates = a.gates;
  t.dw1 = a.dw1, t.db1 = a.db1, t.dw2 = a.dw2, t.db2 = a.db2;
  return t;
}

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
  else if (part.activates())
    use_running(b.norm, C, own, moments);
  const A *weight = static_cast<const A*>(b.norm.weight), *bias = static_cast<const A*>(b.norm.bias);
  for (int64_t c = own.begin; c < own.end; ++c) {
    A* to = statistics + part.offset + c;
    for (int row = 0; row < 3; ++row)
      to[row * width] = part.activates() ? moments[row * C + c] : A(row == kInvStd);
    to[kScale * width] = to[kInvStd * width] * (weight ? weight[c] : A(1));
    to[kShift * width] = bias ? bias[c] : A(0);
  }
}

template <class T>
int join_forward(const JoinArguments* arguments) {
  using A = Accumulator<T>;
  const JoinArguments& a = *arguments;
  const TailArguments gate = gate_arguments(a);
  const Plan whole(a.N, a.C, a.P, a.channels_last);
  const int64_t N = a.N, C = a.C, H = a.H;
  std::vector<JoinPart<A>> parts = join_parts<A>(a);
  const int threads = thread_count(whole, gate);
  int64_t total = 4 * C + threads * C;
  for (const auto& part : parts) total += N * part.plan.sum_chunks * 2 * part.plan.C;
  A* memory = scratch<A>(total);
  if (!memory) return 1;
  A *moments = memory, *ones = memory + 3 * C, *pivots = ones + C, *free = pivots + threads * C;
  for (auto& part : parts) {
    part.partial = free;
    free += N * part.plan.sum_chunks * 2 * part.plan.C;
  }
  A *statistics = static_cast<A*>(a.statistics), *squeezed = static_cast<A*>(a.squeezed);
  const A* gates = static_cast<const A*>(a.gates);
  const int64_t group = H ? whole.group(sizeof(T), threads) : N;
  const auto affine = [&](const JoinPart<A>& part, int64_t n) {
    const T* x = static_cast<const T*>(part.branch->x) + n * part.plan.C * a.P;
    const A* row = statistics + part.offset;
    return Affine<T, kNoShortcut>{x, nullptr, row, row + kScale * C, row + kShift * C, nullptr, nullptr};
  };

#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), size = omp_get_num_threads();
    const Share channels(C, id, size, kLanes<A>), units(H, id, size, 4);
    for (const auto& part : parts)
      if (part.batch())
        measure(part.plan, static_cast<const T*>(part.branch->x), 0,
                Share(N * part.plan.chunks, id, size), part.partial, pivots + id * C);
#pragma omp barrier
    for (const auto& part : parts)
      join_statistics(part, part.own(channels), C, moments + 3 * part.offset, statistics);
    std::fill(ones + channels.begin, ones + channels.end, A(1));
#pragma omp barrier
    for (int64_t first = 0; first < N; first += group) {
      const int64_t last = std::min(N, first + group);
      if (H) {
        for (const auto& part : parts) {
          const auto make = [&](int64_t n) { return JoinSum<T>{affine(part, n), part.activates()}; };
          walk(part.plan, part.plan.C, first, Share((last - first) * part.plan.chunks, id, size), false,
               part.partial, op_of(make));
        }
#pragma omp barrier
        for (const auto& part : parts)
          merge_sums(part, 1, first, last, part.own(channels), 1.0 / double(a.P), C, &squeezed);
#pragma omp barrier
        excite<A>(gate, squeezed, first, last, channels, units);
#pragma omp barrier
      }
      for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
        const bool streams = join_may_stream<T>(*part, C, a.y);
        const auto make = [&](int64_t n) {
          const int64_t at = n * C * a.P + part->offset * (a.channels_last ? 1 : a.P);
          return JoinApply<T>{affine(*part, n), (H ? gates + n * C : ones) + part->offset,
                              static_cast<T*>(a.y) + at, part->activates(), streams};
        };
        A* none = nullptr;
        walk(part->plan, C, first, Share((last - first) * part->plan.chunks, id, size), true,
                  none, op_of(make));
      }
    }
    finish_streams();
  }
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
        if (!part.activates()) continue;
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

template <class T>
int join_backward(const JoinArguments* arguments) {
  using A = Accumulator<T>;
  const JoinArguments& a = *arguments;
  const TailArguments gate = gate_arguments(a);
  const Plan whole(a.N, a.C, a.P, a.channels_last);
  const int64_t N = a.N, C = a.C, H = a.H, map = N * C, kinds = H ? 4 : 2;
  std::vector<JoinPart<A>> parts = join_parts<A>(a);
  const int threads = thread_count(whole, gate);
  int64_t total = 9 * map + 4 * C + N * H;
  for (const auto& part : parts) total += N * part.plan.sum_chunks * kinds * part.plan.C;
  A* memory = scratch<A>(total);
  if (!memory) return 1;
  A *sums[4], *coefficients[4];
  for (A*& sum : sums) sum = memory, memory += map;
  coefficients[0] = memory, coefficients[1] = memory + map, memory += 2 * map;
  coefficients[2] = memory, coefficients[3] = memory + C, memory += 2 * C;
  A *mask_p = memory, *mask_q = memory + C;
  memory += 2 * C;
  BackwardBuffers<A> b{};
  b.g1 = sums[0], b.g2 = sums[1], b.dt = memory, b.z = b.dt + map, b.dz = b.z + map;
  b.dhidden = b.dz + map, memory = b.dhidden + N * H;
  for (auto& part : parts) {
    part.partial = memory;
    memory += N * part.plan.sum_chunks * kinds * part.plan.C;
  }
  const A* statistics = static_cast<const A*>(a.statistics);
  const Norm<A> identity{nullptr, nullptr, nullptr, nullptr};
  // What the gate's gradient sees: a map with gain kScale and offset kShift, centred.
  const Norm<A> norm{nullptr, statistics + kShift * C, statistics, statistics + kScale * C};
  const auto affine = [&](const JoinPart<A>& part, int64_t n) {
    const T* x = static_cast<const T*>(part.branch->x) + n * part.plan.C * a.P;
    const int64_t c = part.offset;
    return Affine<T, kNoShortcut>{x, nullptr, statistics + c, mask_p + c, mask_q + c, nullptr, nullptr};
  };
  const auto gradient = [&](const JoinPart<A>& part, int64_t n) {
    return static_cast<const T*>(a.gradient) + n * C * a.P +
           part.offset * (a.channels_last ? 1 : a.P);
  };

#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), size = omp_get_num_threads();
    const Share channels(C, id, size, kLanes<A>), units(H, id, size, kLanes<A>);
    for (const auto& part : parts) {
      const Share own = part.own(channels);
      for (int64_t c = part.offset + own.begin; c < part.offset + own.end; ++c) {
        mask_p[c] = part.activates() ? statistics[kScale * C + c] : A(0);
        mask_q[c] = part.activates() ? statistics[kShift * C + c] : A(1);
      }
    }
#pragma omp barrier
    for (const auto& part : parts) {
      const Share tasks(N * part.plan.chunks, id, size);
      const auto gated = [&](int64_t n) {
        return JoinReduce<T, true>{affine(part, n), gradient(part, n)};
      };
      const auto plain = [&](int64_t n) {
        return JoinReduce<T, false>{affine(part, n), gradient(part, n)};
      };
      if (H)
        walk(part.plan, C, 0, tasks, false, part.partial, op_of(gated));
      else if (part.activates())
        walk(part.plan, C, 0, tasks, false, part.partial, op_of(plain));
    }
#pragma omp barrier
    for (const auto& part : parts)
      if (H || part.activates()) merge_sums(part, kinds, 0, N, part.own(channels), 1.0, C, sums);
    if (H) gate_backward(whole, gate, b, norm, 0, N, channels, units);
    for (const auto& part : parts)
      join_parameters(part, a, part.own(channels), sums, b.dz, coefficients);
#pragma omp barrier
    for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
      if (!part->branch->dx) continue;
      const bool streams = may_stream(part->plan, sizeof(T), part->branch->dx);
      const auto make = [&](int64_t n) {
        const int64_t c = part->offset;
        T* const dx = static_cast<T*>(part->branch->dx) + n * part->plan.C * a.P;
        return JoinGradient<T>{affine(*part, n),        gradient(*part, n),
                               coefficients[0] + n * C + c, coefficients[1] + n * C + c,
                               coefficients[2] + c,     coefficients[3] + c,
                               dx,                      streams};
      };
      A* none = nullptr;
      walk(part->plan, C, 0, Share(N * part->plan.chunks, id, size), true, none, op_of(make));
    }
    if (H) gate_parameters(whole, gate, b, identity, channels, units);
    finish_streams();
  }
  return 0;
}
