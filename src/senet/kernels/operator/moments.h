// Means and variances: of a channel over an image, over the batch, and the running ones.
#pragma once

#include <cmath>

#include "plan.h"

namespace senet {
namespace {

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

}  // namespace
}  // namespace senet
