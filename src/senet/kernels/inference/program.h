// Runs the steps of a program one after the other, the tasks of a step on all threads.
// Which thread takes a task changes nothing in the result.
#pragma once

#include "../threads.h"
#include "chain.h"
#include "convolution.h"
#include "depthwise.h"
#include "excitation.h"
#include "grouped.h"
#include "paired.h"
#include "passes.h"
#include "shares.h"
#include "sliding.h"
#include "winograd.h"

namespace senet {
namespace {

int64_t task_count(const Step& s) {
  switch (s.kind) {
    case kConvolution:
      return convolution_tasks(s);
    case kWinograd:
    case kWinogradInput:
      return winograd_tasks(s);
    case kWinogradProduct:
      return winograd_product_tasks(s);
    case kInput:
      return s.N * s.H;
    case kSums:
      return s.N * sum_blocks(s);
    case kMeans:
    case kImages:
      return s.N;
    case kPointwise:
      return s.N * ceil_div(s.H * s.W, s.rows);
    case kExcitation:
      return excitation_tasks(s);
    case kDepthwise:
      return depthwise_tasks(s);
    case kChain:
      return chain_tasks(s);
    case kSliding:
      return sliding_tasks(s);
    case kPaired:
      return paired_tasks(s);
    default:  // grouped convolution, pooling
      return s.N * s.OH;
  }
}

// The `steps` steps behind this one, for one image: their tasks are in the order of images, as many
// for each. What one writes is in the cache for the next, and no thread waits between them.
void images(const Step& s, int64_t image, float* scratch) {
  for (const Step* step = &s + 1; step <= &s + s.steps; ++step) {
    const int64_t tasks = task_count(*step) / s.N;
    for (int64_t t = image * tasks; t < (image + 1) * tasks; ++t) run_task(*step, t, scratch);
  }
}

void run_task(const Step& s, int64_t task, float* scratch) {
  switch (s.kind) {
    case kConvolution:
      return convolution(s, task, scratch);
    case kWinograd:
      return s.tile == 2 ? winograd<2>(s, task, scratch) : winograd<4>(s, task, scratch);
    case kWinogradInput:
      return s.tile == 2 ? winograd_input<2>(s, task) : winograd_input<4>(s, task);
    case kWinogradProduct:
      return s.tile == 2 ? winograd_product<2>(s, task, scratch)
                         : winograd_product<4>(s, task, scratch);
    case kInput:
      return read_input(s, task);
    case kSums:
      return sums(s, task);
    case kMeans:
      return means(s, task, scratch);
    case kPointwise:
      return pointwise(s, task);
    case kExcitation:
      return excitation(s, task);
    case kImages:
      return images(s, task, scratch);
    case kChain:
      return chain(s, task, scratch);
    case kSliding:
      return sliding(s, task, scratch);
    case kPaired:
      return paired(s, task, scratch);
    case kGrouped:
      return grouped(s, task);
    case kDepthwise:
      return depthwise(s, task);
    case kMaxPool:
      return pool<true>(s, task);
    default:
      return pool<false>(s, task);
  }
}

bool is_group(const Step& s) { return s.kind == kImages || s.kind == kChain; }

// How many steps from `first` on have a single task each: whoever takes the first one's runs them all.
int64_t single_tasks(const Step* steps, int64_t first, int64_t count) {
  int64_t i = first;
  while (i < count && !is_group(steps[i]) && task_count(steps[i]) == 1) ++i;
  return i - first;
}

void run(Step* steps, int64_t count, int64_t threads, float* scratch, int64_t scratch_size) {
  const Shares shares(threads, scratch, scratch_size);
  for (int64_t i = 0; i < count; ++i) shares.begin(i, task_count(steps[i]));
  parallel(threads, [=](const Member& member) {
    float* mine = scratch + member.id * scratch_size + Shares::floats(count);
    for (int64_t i = 0; i < count;) {
      const int64_t tasks = task_count(steps[i]), in_a_row = single_tasks(steps, i, count);
      shares.work(i, tasks, member.id, [=](int64_t task) {
        run_task(steps[i], task, mine);
        for (int64_t j = 1; j < in_a_row; ++j) run_task(steps[i + j], 0, mine);
      });
      shares.wait(i, tasks);
      i += is_group(steps[i]) ? 1 + steps[i].steps : in_a_row > 0 ? in_a_row : 1;
    }
  });
}

}  // namespace
}  // namespace senet
