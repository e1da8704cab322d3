// The tail y = relu(gate ⊙ norm(x) + shortcut) forward and backward: which passes run over the maps,
// and the (N, C) arithmetic between them. Notation and derivation: docs/performance.md (The algebra).
// Included once per instruction set.

// How the maps are cut into tasks. The cut depends on the shape only, and partial sums are merged in
// a fixed order: results do not depend on the number of threads.
struct Plan {
  static constexpr int64_t kTaskElements = 1 << 16, kMaxRows = 1024;
  int64_t N, C, P;
  bool channels_last;
  int64_t chunks;       // tasks per image
  int64_t chunk;        // rows (channels_last) or channels (contiguous) of a task
  int64_t sum_chunks;   // partial sums per image and channel: a plane is summed by one task

  Plan(int64_t n, int64_t c, int64_t p, bool last) : N(n), C(c), P(p), channels_last(last) {
    const int64_t extent = last ? P : C, other = last ? C : P;
    int64_t size = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, other));
    if (last) size = std::min(size, kMaxRows);
    chunks = (extent + size - 1) / size;
    chunk = (extent + chunks - 1) / chunks;
    chunks = (extent + chunk - 1) / chunk;
    sum_chunks = last ? chunks : 1;
  }
  int64_t rows_of(int64_t k) const {
    return channels_last ? std::min(P, (k + 1) * chunk) - k * chunk : P;
  }
  // Images that are summed and then scaled while they are still cached.
  int64_t group(int64_t bytes_per_element, int threads) const {
    const int64_t image = C * P * bytes_per_element;
    const int64_t images = (threads * kGroupBytes) / std::max<int64_t>(1, image);
    return std::min(N, std::max<int64_t>(std::max<int64_t>(1, images), chunks >= threads ? 1 : threads));
  }
};

// The part of [0, count) that thread `id` of `size` works on, in multiples of `grain`.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int id, int size, int64_t grain = 1) {
    const int64_t pieces = (count + grain - 1) / grain;
    begin = std::min(count, pieces * id / size * grain);
    end = std::min(count, pieces * (id + 1) / size * grain);
  }
};

// Runs `op_of(n)` over this thread's tasks of images [first, last); sums (or null) has per image,
// chunk and sum C entries. Backwards, so that a pass starts with what the one before left in cache.
template <class OpOf>
void walk(const Plan& plan, int64_t width, int64_t first, const Share& share, bool backwards,
          typename OpOf::Op::A* sums, const OpOf& op_of) {
  using Op = typename OpOf::Op;
  for (int64_t step = share.begin; step < share.end; ++step) {
    const int64_t task = backwards ? share.end - 1 - (step - share.begin) : step;
    const int64_t n = first + task / plan.chunks, k = task % plan.chunks;
    const Op op = op_of(n);
    const int64_t from = k * plan.chunk;
    if (plan.channels_last) {
      typename Op::A* to = sums + (Op::kSums ? (n * plan.sum_chunks + k) * Op::kSums * plan.C : 0);
      if (Op::kSums) std::fill(to, to + Op::kSums * plan.C, typename Op::A(0));
      rows(op, plan.C, width, from, std::min(plan.P, from + plan.chunk), to);
    } else {
      for (int64_t c = from; c < std::min(plan.C, from + plan.chunk); ++c) {
        typename Op::A* to = sums + (Op::kSums ? n * Op::kSums * plan.C + c : 0);
        for (int j = 0; j < Op::kSums; ++j) to[j * plan.C] = 0;
        plane(op, c, c * plan.P, (c + 1) * plan.P, to, plan.C);
      }
    }
  }
}

template <class Op_, class F>
struct OpOf {
  using Op = Op_;
  const F& f;
  Op operator()(int64_t n) const { return f(n); }
};
template <class F>
auto op_of(const F& f) {
  return OpOf<decltype(f(int64_t(0))), F>{f};
}

// Mean of the first elements, as many as the largest power of two up to 16 and `count`: exact when
// they are equal. The pivot of Statistics; 0 where it would not be finite.
template <class T>
Accumulator<T> pivot_of(const T* x, int64_t count) {
  using A = Accumulator<T>;
  A values[16];
  int64_t size = 1;
  while (size < 16 && size * 2 <= count) size *= 2;
  for (int64_t i = 0; i < size; ++i) values[i] = widen(x[i]) / A(size);
  for (int64_t half = size / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
  return std::isfinite(values[0]) ? values[0] : A(0);
}

// Mean and second moment about it of each task's part of each channel, as partial[...][2][C].
template <class T>
void measure_rows(const T* x, int64_t C, int64_t begin, int64_t end, Accumulator<T>* partial,
                  Accumulator<T>* pivot) {
  using A = Accumulator<T>;
  const int64_t count = end - begin;
  const T* first = x + begin * C;
  for (int64_t c = 0; c < C; ++c) pivot[c] = widen(first[c]);
  if (count >= 4)
    for (int64_t c = 0; c < C; ++c)
      pivot[c] = (pivot[c] * A(0.25) + widen(first[C + c]) * A(0.25)) +
                 (widen(first[2 * C + c]) * A(0.25) + widen(first[3 * C + c]) * A(0.25));
  for (int64_t c = 0; c < C; ++c) pivot[c] = pivot[c] - pivot[c] == 0 ? pivot[c] : A(0);  // finite?
  std::fill(partial, partial + 2 * C, A(0));
  rows(Statistics<T>{x, pivot}, C, C, begin, end, partial);
  const A weight = A(1) / A(count);
  for (int64_t c = 0; c < C; ++c) {
    const A sum = partial[c], second = partial[C + c] - sum * (sum * weight);
    partial[c] = pivot[c] + sum * weight;
    partial[C + c] = second < 0 ? A(0) : second;
  }
}

template <class T>
void measure_plane(const T* x, int64_t P, Accumulator<T>* mean, Accumulator<T>* second) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = 1024;
  double total = 0, moment = 0, old_mean = 0;
  for (int64_t begin = 0; begin < P; begin += kBlock) {
    const int64_t end = std::min(P, begin + kBlock), count = end - begin;
    const A pivot = pivot_of(x + begin, count);
    A sums[2] = {0, 0};
    plane(Statistics<T>{x, &pivot}, 0, begin, end, sums, 1);
    const double shift = double(sums[0]) / double(count), block_mean = double(pivot) + shift;
    const double inside = double(sums[1]) - double(sums[0]) * shift;
    moment += inside < 0 ? 0 : inside;
    if (begin > 0) {  // Chan's merge of two sets
      const double d = block_mean - old_mean;
      moment += d * d * double(begin) * double(count) / double(end);
    }
    total += block_mean * double(count);
    old_mean = total / double(end);
  }
  *mean = A(old_mean);
  *second = A(moment);
}

template <class T>
void measure(const Plan& plan, const T* x, int64_t first, const Share& share,
             Accumulator<T>* partial, Accumulator<T>* pivot) {
  for (int64_t task = share.begin; task < share.end; ++task) {
    const int64_t n = first + task / plan.chunks, k = task % plan.chunks;
    const T* image = x + n * plan.C * plan.P;
    const int64_t from = k * plan.chunk;
    if (plan.channels_last) {
      measure_rows(image, plan.C, from, std::min(plan.P, from + plan.chunk),
                   partial + (n * plan.sum_chunks + k) * 2 * plan.C, pivot);
    } else {
      auto* to = partial + n * 2 * plan.C;
      for (int64_t c = from; c < std::min(plan.C, from + plan.chunk); ++c)
        measure_plane(image + c * plan.P, plan.P, to + c, to + plan.C + c);
    }
  }
}

// Merges the partial moments of images [first, last) for channels [begin, end): per image means into
// `squeezed` (or null), and with `kBatch` the statistics over all into rows mean, inv_std, var.
template <class A>
void merge_moments(const Plan& plan, const A* partial, int64_t first, int64_t last, int64_t begin,
                   int64_t end, bool batch, double eps, A* squeezed, A* statistics) {
  constexpr int64_t kBlock = 64;
  const int64_t C = plan.C;
  const double M = double(plan.N) * double(plan.P);
  for (int64_t c0 = begin; c0 < end; c0 += kBlock) {
    const int64_t width = std::min(kBlock, end - c0);
    double total[kBlock] = {}, moment[kBlock] = {};
    for (int64_t n = first; n < last; ++n) {
      double image[kBlock] = {};
      for (int64_t k = 0; k < plan.sum_chunks; ++k) {
        const A* part = partial + (n * plan.sum_chunks + k) * 2 * C + c0;
        const double weight = double(plan.rows_of(k));
        for (int64_t i = 0; i < width; ++i) image[i] += weight * double(part[i]);
      }
      for (int64_t i = 0; i < width; ++i) total[i] += image[i];
      if (squeezed)
        for (int64_t i = 0; i < width; ++i)
          squeezed[n * C + c0 + i] = A(image[i] / double(plan.P));
    }
    if (!batch) continue;
    for (int64_t i = 0; i < width; ++i) total[i] /= M;
    for (int64_t n = first; n < last; ++n)
      for (int64_t k = 0; k < plan.sum_chunks; ++k) {
        const A* part = partial + (n * plan.sum_chunks + k) * 2 * C + c0;
        const double weight = double(plan.rows_of(k));
        for (int64_t i = 0; i < width; ++i) {
          const double d = double(part[i]) - total[i];
          moment[i] += double(part[C + i]) + weight * d * d;
        }
      }
    for (int64_t i = 0; i < width; ++i) {
      const double var = moment[i] / M;
      statistics[c0 + i] = A(total[i]);
      statistics[C + c0 + i] = A(1 / std::sqrt(var + eps));
      statistics[2 * C + c0 + i] = A(moment[i] / std::max(M - 1, 1.0));
    }
  }
}

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

template <class T, int kShortcut>
void apply_pass(const Plan& plan, const TailArguments& a, const AffineBuffers<Accumulator<T>>& b,
                int64_t first, const Share& share, bool streams) {
  const auto make = [&](int64_t n) {
    return Apply<T, kShortcut>{affine_of<T, kShortcut>(plan, a, b, n),
                               static_cast<T*>(a.y) + n * plan.C * plan.P, a.relu != 0, streams};
  };
  Accumulator<T>* none = nullptr;
  walk(plan, plan.C, first, share, true, none, op_of(make));
}

bool may_stream(const Plan& plan, int64_t element, const void* to) {
  const int64_t run = (plan.channels_last ? plan.C : plan.P) * element;
  return plan.N * plan.C * plan.P * element >= kStreamBytes && run % 64 == 0 && aligned(to);
}

int thread_count(const Plan& plan, const TailArguments& a) {
  const int64_t tasks = std::max<int64_t>(1, plan.N * plan.chunks);
  const int64_t worthwhile = plan.N * plan.C * plan.P / (1 << 13) + 1;
  return int(std::min(std::min(tasks, worthwhile), std::max<int64_t>(1, a.threads)));
}

// Statistics for evaluation: the running ones, in rows mean, inv_std, var.
template <class A>
void use_running(const NormArguments& norm, int64_t C, const Share& share, A* statistics) {
  const A* mean = static_cast<const A*>(norm.running_mean);
  const A* var = static_cast<const A*>(norm.running_var);
  for (int64_t c = share.begin; c < share.end; ++c) {
    statistics[c] = mean[c];
    statistics[C + c] = A(1 / std::sqrt(double(var[c]) + norm.eps));
    statistics[2 * C + c] = var[c];
  }
}

// Moves the running statistics towards the batch's, with torch.lerp's own two formulas.
template <class A>
void update_running(const NormArguments& norm, int64_t C, const Share& share, const A* statistics) {
  if (!norm.running_mean || !norm.running_var) return;
  const A w = A(norm.momentum);
  const auto move = [w](A& from, A to) {
    from = w < A(0.5) ? from + w * (to - from) : to - (to - from) * (1 - w);
  };
  A *mean = static_cast<A*>(norm.running_mean), *var = static_cast<A*>(norm.running_var);
  for (int64_t c = share.begin; c < share.end; ++c) {
    move(mean[c], statistics[c]);
    move(var[c], statistics[2 * C + c]);
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

// Gates of images [first, last) from their squeeze z (N, C); all threads take part.
template <class A>
void excite(const TailArguments& a, const A* z, int64_t first, int64_t last, const Share& channels,
            const Share& units) {
  const int64_t C = a.C, H = a.H, images = last - first;
  A *hidden = static_cast<A*>(a.hidden), *gates = static_cast<A*>(a.gates);
  linear(z + first * C, static_cast<const A*>(a.w1), static_cast<const A*>(a.b1), hidden + first * H,
         images, H, C, units.begin, units.end);
  for (int64_t n = first; n < last; ++n)
    gate_forward(hidden + n * H + units.begin, units.end - units.begin, kRelu);
#pragma omp barrier
  linear(hidden + first * H, static_cast<const A*>(a.w2), static_cast<const A*>(a.b2),
         gates + first * C, images, C, H, channels.begin, channels.end);
  for (int64_t n = first; n < last; ++n)
    gate_forward(gates + n * C + channels.begin, channels.end - channels.begin, int(a.gate));
}

template <class T>
int forward(const TailArguments* arguments) {
  using A = Accumulator<T>;
  const TailArguments& a = *arguments;
  const Plan plan(a.N, a.C, a.P, a.channels_last);
  const int64_t C = plan.C, H = a.H, step = H ? C : 0, rows_pq = H ? plan.N : 1;
  const bool batch = a.normalization == kBatchStatistics, measures = batch || H;
  const bool norm_shortcut = a.shortcut_kind == kNormalizedShortcut;
  const int threads = thread_count(plan, a);
  const int64_t partial_size = plan.N * plan.sum_chunks * 2 * C;

  A* memory = scratch<A>(2 * partial_size + threads * C + 2 * rows_pq * C + 2 * C);
  if (!memory) return 1;
  A *partial = memory, *shortcut_partial = partial + partial_size;
  A *pivots = shortcut_partial + partial_size, *p = pivots + threads * C, *q = p + rows_pq * C;
  const AffineBuffers<A> affine{p, q, q + rows_pq * C, q + rows_pq * C + C, step};
  A* statistics = a.normalization == kNone ? nullptr : static_cast<A*>(a.statistics);
  A* shortcut_statistics = norm_shortcut ? statistics + 3 * C : nullptr;
  A *squeezed = static_cast<A*>(a.squeezed), *gates = static_cast<A*>(a.gates);
  const Norm<A> norm = norm_of(a.norm, statistics, C);
  const Norm<A> other = norm_of(a.shortcut_norm, shortcut_statistics, C);
  const int64_t group = batch || !H ? plan.N : plan.group(sizeof(T), threads);
  const bool streams = may_stream(plan, sizeof(T), a.y);

#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), size = omp_get_num_threads();
    const Share channels(C, id, size, kLanes<A>);
    if (a.normalization == kRunningStatistics) {
      use_running(a.norm, C, channels, statistics);
      if (norm_shortcut) use_running(a.shortcut_norm, C, channels, shortcut_statistics);
    }
    for (int64_t first = 0; first < plan.N; first += group) {
      const int64_t last = std::min(plan.N, first + group), images = last - first;
      const Share tasks(images * plan.chunks, id, size);
      if (measures) {
        A* pivot = pivots + id * C;
        measure(plan, static_cast<const T*>(a.x), first, tasks, partial, pivot);
        if (batch && norm_shortcut)
          measure(plan, static_cast<const T*>(a.shortcut), first, tasks, shortcut_partial, pivot);
#pragma omp barrier
        merge_moments(plan, partial, first, last, channels.begin, channels.end, batch, a.norm.eps,
                      H ? squeezed : nullptr, statistics);
        if (batch && norm_shortcut)
          merge_moments<A>(plan, shortcut_partial, first, last, channels.begin, channels.end, true,
                           a.shortcut_norm.eps, nullptr, shortcut_statistics);
        if (batch) update_running(a.norm, C, channels, statistics);
        if (batch && norm_shortcut)
          update_running(a.shortcut_norm, C, channels, shortcut_statistics);
      }
      if (H) {
        const Share units(H, id, size, 4);
        A* z = p;  // read before p is filled
        fill_squeeze(norm, squeezed, C, first, last, channels, z);
#pragma omp barrier
        excite(a, z, first, last, channels, units);
      }
      fill_affine(norm, other, H ? gates : nullptr, C, first, last, channels, affine);
#pragma omp barrier
      if (a.shortcut_kind == kNoShortcut)
        apply_pass<T, kNoShortcut>(plan, a, affine, first, tasks, streams);
      else if (norm_shortcut)
        apply_pass<T, kNormalizedShortcut>(plan, a, affine, first, tasks, streams);
      else
        apply_pass<T, kPlainShortcut>(plan, a, affine, first, tasks, streams);
    }
    finish_streams();
  }
  return 0;
}
