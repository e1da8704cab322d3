// How a pass over maps is cut into tasks and shared by threads, and the memory that it works in.
#pragma once

#include <algorithm>

#include "../memory.h"
#include "../threads.h"
#include "passes.h"

namespace senet {
namespace {

// Bytes of a group of images that are read twice, per thread: a share of the last-level cache.
constexpr int64_t kGroupBytes = 4 << 20;
// Above this size of a map its lines have left the cache before anybody reads them: do not keep them.
constexpr int64_t kStreamBytes = 24 << 20;

SENET_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

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

// Whether a pass should write a map past the cache.
inline bool may_stream(const Plan& plan, int64_t element, const void* to) {
  const int64_t run = (plan.channels_last ? plan.C : plan.P) * element;
  return plan.N * plan.C * plan.P * element >= kStreamBytes && run % 64 == 0 && aligned(to);
}

// Threads worth their while.
inline int thread_count(const Plan& plan, int64_t wanted) {
  const int64_t tasks = std::max<int64_t>(1, plan.N * plan.chunks);
  const int64_t worthwhile = plan.N * plan.C * plan.P / (1 << 13) + 1;
  return int(std::min(std::min(tasks, worthwhile), std::max<int64_t>(1, wanted)));
}

}  // namespace
}  // namespace senet
