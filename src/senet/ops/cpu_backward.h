// The backward pass of the tail; algebra.md's notation: G1, G2 are the sums of g' and g' (x - mean)
// per image and channel. Included once per instruction set.

// Everything of (N, C) size that the two map passes exchange.
template <class A>
struct BackwardBuffers {
  A *partial, *g1, *g2, *dt, *z, *dz, *dhidden, *scale, *offset;
  A *slope, *shortcut_slope, *shortcut_offset;
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
        M{at(a.gradient, n), at(a.y, n), affine_of<T, M::kShortcut>(plan, a, b.affine, n)},
        x,
        shortcut,
        a.normalization == kNone ? b.affine.zeros : statistics,
        kBoth ? statistics + 3 * plan.C : nullptr,
        kWrite ? static_cast<T*>(a.dshortcut) + n * image : nullptr,
        streams};
  };
  walk(plan, first, share, false, b.partial, op_of(make));
}

template <class T, class... Rest>
void reduce_choice(int mask, bool both, bool write, const Rest&... rest) {
  if (mask == kMaskFromX) return reduce_pass<T, kMaskFromX, false, false>(rest...);
  if (mask == kMaskFromBoth) return reduce_pass<T, kMaskFromBoth, true, false>(rest...);
  if (mask == kMaskFromY)
    return write ? reduce_pass<T, kMaskFromY, false, true>(rest...)
                 : reduce_pass<T, kMaskFromY, false, false>(rest...);
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
        M{at(gradient, n), at(a.y, n), affine_of<T, M::kShortcut>(plan, a, b.affine, n)},
        {x, statistics, b.scale + n * step, b.slope, b.offset + n * step, dx},
        {shortcut, other, b.affine.shortcut_p, b.shortcut_slope, b.shortcut_offset, dshortcut},
        a.dx != nullptr,
        streams};
  };
  Accumulator<T>* none = nullptr;
  walk(plan, first, share, true, none, op_of(make));
}

template <class T, bool kBatch, class... Rest>
void gradient_choice(int mask, int shortcut_gradient, const Rest&... rest) {
  if (shortcut_gradient == kNormalizedShortcut)
    return mask == kNoMask
               ? gradient_pass<T, kNoMask, kBatch, kNormalizedShortcut>(rest...)
               : gradient_pass<T, kMaskFromBoth, kBatch, kNormalizedShortcut>(rest...);
  if (shortcut_gradient == kPlainShortcut)
    return gradient_pass<T, kMaskFromY, kBatch, kPlainShortcut>(rest...);
  switch (mask) {
    case kNoMask:
      return gradient_pass<T, kNoMask, kBatch, kNoShortcut>(rest...);
    case kMaskFromY:
      return gradient_pass<T, kMaskFromY, kBatch, kNoShortcut>(rest...);
    case kMaskFromX:
      return gradient_pass<T, kMaskFromX, kBatch, kNoShortcut>(rest...);
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
        b.g1[n * C + c0 + i] = A(sum[0][i]);
        b.g2[n * C + c0 + i] = A(sum[1][i]);
        total[0][i] += sum[0][i];
        total[1][i] += sum[2][i];
      }
    }
    if (!both) continue;
    A *dweight = static_cast<A*>(a.dshortcut_weight), *dbias = static_cast<A*>(a.dshortcut_bias);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = c0 + i;
      const double weight = total[1][i] * double(other.inv_std[c]), bias = total[0][i];
      if (dweight) dweight[c] = A(weight) + (first ? dweight[c] : A(0));
      if (dbias) dbias[c] = A(bias) + (first ? dbias[c] : A(0));
      const double scale = double(other.scale(c));
      b.shortcut_slope[c] = batch ? A(-scale * double(other.inv_std[c]) * weight / M) : A(0);
      b.shortcut_offset[c] = batch ? A(-scale * bias / M) : A(0);
    }
  }
}

// Back through the gate, from the gradient of s to that of the squeeze, b.dz; all threads take part.
template <class A>
void gate_backward(const Plan& plan, const TailArguments& a, const BackwardBuffers<A>& b,
                   const Norm<A>& norm, int64_t first, int64_t last, const Share& channels,
                   const Share& units) {
  const int64_t C = plan.C, H = a.H, images = last - first;
  const A *gates = static_cast<const A*>(a.gates), *hidden = static_cast<const A*>(a.hidden);
  const A *w1 = static_cast<const A*>(a.w1), *w2 = static_cast<const A*>(a.w2);
  A *dw1 = static_cast<A*>(a.dw1), *dw2 = static_cast<A*>(a.dw2);
  A *db1 = static_cast<A*>(a.db1), *db2 = static_cast<A*>(a.db2);
  const bool more = first > 0;  // a later group adds to the gradients of the parameters

  fill_squeeze(norm, static_cast<const A*>(a.squeezed), C, first, last, channels, b.z);
  if (db2 && !more) std::fill(db2 + channels.begin, db2 + channels.end, A(0));
  for (int64_t n = first; n < last; ++n)
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t i = n * C + c;
      const A ds = norm.scale(c) * b.g2[i] + norm.shift(c) * b.g1[i];
      b.dt[i] = ds * gate_slope(gates[i], int(a.gate));
      if (db2) db2[c] += b.dt[i];
    }
#pragma omp barrier
  const A *dt = b.dt + first * C, *z = b.z + first * C;
  if (dw2)
    combine(dt + channels.begin, 1, C, hidden + first * H, dw2 + channels.begin * H,
            channels.end - channels.begin, images, H, 0, H, more);
  A* dhidden = b.dhidden + first * H;
  combine(dt, C, 1, w2, dhidden, images, C, H, units.begin, units.end, false);
  if (db1 && !more) std::fill(db1 + units.begin, db1 + units.end, A(0));
  for (int64_t n = 0; n < images; ++n)
    for (int64_t j = units.begin; j < units.end; ++j) {
      if (hidden[(first + n) * H + j] <= 0) dhidden[n * H + j] = 0;
      if (db1) db1[j] += dhidden[n * H + j];
    }
#pragma omp barrier
  if (dw1) combine(dhidden, 1, H, z, dw1, H, images, C, channels.begin, channels.end, more);
  combine(dhidden, H, 1, w1, b.dz + first * C, images, H, C, channels.begin, channels.end, false);
}

// Gradients of the normalization's parameters, and the coefficients of dx.
template <class A>
void norm_backward(const Plan& plan, const TailArguments& a, const BackwardBuffers<A>& b,
                   const Norm<A>& norm, int64_t first, int64_t last, const Share& share) {
  const int64_t C = plan.C, step = a.H ? C : 0;
  const double M = double(plan.N) * double(plan.P);
  const bool batch = a.normalization == kBatchStatistics;
  const A *gates = static_cast<const A*>(a.gates), *squeezed = static_cast<const A*>(a.squeezed);
  A *dweight = static_cast<A*>(a.dweight), *dbias = static_cast<A*>(a.dbias);
  for (int64_t c = share.begin; c < share.end; ++c) {
    double bias = 0, weight = 0;
    const A inv_std = norm.mean ? norm.inv_std[c] : A(1), scale = norm.scale(c);
    for (int64_t n = first; n < last; ++n) {
      const int64_t i = n * C + c;
      const double s = a.H ? double(gates[i]) : 1.0, dz = a.H ? double(b.dz[i]) : 0.0;
      bias += s * double(b.g1[i]) + dz;
      weight += s * double(b.g2[i]);
      if (a.H) weight += dz * double(squeezed[i] - norm.centre(c));
    }
    weight *= double(inv_std);
    if (dweight) dweight[c] = A(weight) + (first ? dweight[c] : A(0));
    if (dbias) dbias[c] = A(bias) + (first ? dbias[c] : A(0));
    if (batch) b.slope[c] = A(-double(scale) * double(inv_std) * weight / M);
    const double common = batch ? bias / M : 0.0;
    for (int64_t n = a.H ? first : 0; n < (a.H ? last : 1); ++n) {
      const double dz = a.H ? double(b.dz[n * C + c]) : 0.0;
      b.scale[n * step + c] = scale * (a.H ? gates[n * C + c] : A(1));
      b.offset[n * step + c] = A(double(scale) * (dz / double(plan.P) - common));
    }
  }
}

template <class T>
int backward(const TailArguments* arguments) {
  using A = Accumulator<T>;
  const TailArguments& a = *arguments;
  const Plan plan(a.N, a.C, a.P, a.channels_last);
  const int64_t C = plan.C, N = plan.N, H = a.H, step = H ? C : 0, rows_pq = H ? N : 1;
  const bool batch = a.normalization == kBatchStatistics;
  const bool norm_shortcut = a.shortcut_kind == kNormalizedShortcut;
  const bool plain_shortcut = a.shortcut_kind == kPlainShortcut;
  const bool parameters = a.dweight || a.dbias || a.dw1 || a.db1 || a.dw2 || a.db2;
  const bool reduces = parameters || a.dshortcut_weight || a.dshortcut_bias ||
                       (a.dx && (batch || H)) || (a.dshortcut && norm_shortcut && batch);
  const bool gate = H && (parameters || a.dx);
  const int mask = !a.relu ? kNoMask : plain_shortcut ? kMaskFromY
                   : norm_shortcut ? kMaskFromBoth : kMaskFromX;
  const bool writes = reduces && plain_shortcut && a.relu && a.dshortcut;
  const bool final_pass = a.dx || (a.dshortcut && !writes);
  const int final_mask = writes ? kNoMask : mask;
  const int final_shortcut = writes || !a.dshortcut ? kNoShortcut : int(a.shortcut_kind);
  const int threads = thread_count(plan, a);

  const int64_t map = N * C, partial_size = N * plan.sum_chunks * (norm_shortcut ? 3 : 2) * C;
  const int64_t gated_map = H ? map : 0;
  const int64_t sizes[] = {partial_size, map, map, gated_map, gated_map, gated_map, N * H,
                           rows_pq * C, rows_pq * C, C, C, C,  // until shortcut_offset
                           rows_pq * C, rows_pq * C, C, C};    // affine
  constexpr int kPieces = sizeof sizes / sizeof *sizes;
  int64_t total = 0;
  for (int64_t size : sizes) total += (size + 15) / 16 * 16;
  A* memory = scratch<A>(total);
  if (!memory) return 1;
  A* piece[kPieces];
  for (int i = 0; i < kPieces; ++i) {
    piece[i] = memory;
    memory += (sizes[i] + 15) / 16 * 16;
  }
  const BackwardBuffers<A> b{piece[0], piece[1], piece[2], piece[3],  piece[4],  piece[5], piece[6],
                             piece[7], piece[8], piece[9], piece[10], piece[11],
                             {piece[12], piece[13], piece[14], piece[15], step}};
  const A* statistics = a.normalization == kNone ? nullptr : static_cast<const A*>(a.statistics);
  const Norm<A> norm = norm_of(a.norm, statistics, C);
  const Norm<A> other = norm_of(a.shortcut_norm, norm_shortcut ? statistics + 3 * C : nullptr, C);
  const A* gates = H ? static_cast<const A*>(a.gates) : nullptr;
  const int64_t maps_read = plain_shortcut ? 4 : norm_shortcut ? 3 : 2;
  const int64_t group = batch || !reduces ? N : plan.group(maps_read * sizeof(T), threads);
  const bool streams_written = writes && may_stream(plan, sizeof(T), a.dshortcut);
  const bool streams = may_stream(plan, sizeof(T), a.dx) && may_stream(plan, sizeof(T), a.dshortcut);

#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), size = omp_get_num_threads();
    const Share channels(C, id, size, kLanes<A>), units(H, id, size, kLanes<A>);
    if (norm_shortcut)
      for (int64_t c = channels.begin; c < channels.end; ++c)
        b.shortcut_slope[c] = b.shortcut_offset[c] = 0;
    fill_affine(norm, other, gates, C, 0, N, channels, b.affine);
    if (!reduces)
      for (int64_t n = 0; n < rows_pq; ++n)
        for (int64_t c = channels.begin; c < channels.end; ++c) {
          b.scale[n * step + c] = norm.scale(c) * (gates ? gates[n * C + c] : A(1));
          b.offset[n * step + c] = 0;
        }
#pragma omp barrier
    for (int64_t first = 0; first < N; first += group) {
      const int64_t last = std::min(N, first + group);
      const Share tasks((last - first) * plan.chunks, id, size);
      if (reduces) {
        reduce_choice<T>(mask, norm_shortcut, writes, plan, a, b, first, tasks, streams_written);
        finish_streams();
#pragma omp barrier
        merge_reductions(plan, a, b, norm_shortcut, other, first, last, channels);
        if (gate) gate_backward(plan, a, b, norm, first, last, channels, units);
        if (parameters || a.dx) norm_backward(plan, a, b, norm, first, last, channels);
#pragma omp barrier
      }
      if (final_pass) {
        const void* gradient = writes ? a.dshortcut : a.gradient;
        if (batch)
          gradient_choice<T, true>(final_mask, final_shortcut, plan, a, b, gradient, first, tasks,
                                   streams);
        else
          gradient_choice<T, false>(final_mask, final_shortcut, plan, a, b, gradient, first, tasks,
                                    streams);
      }
    }
    finish_streams();
  }
  return 0;
}
