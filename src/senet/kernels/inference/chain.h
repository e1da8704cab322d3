// Convolutions one behind the other, a few rows of the last one's output at a time: what one writes
// lies in scratch memory, and in the cache, when the next one reads it. An expansion's wide map, and
// the map of the depthwise convolution behind it, never see the memory.
#pragma once

#include <algorithm>

#include "geometry.h"
#include "step.h"

namespace senet {
namespace {

constexpr int64_t kLongestChain = 8;

int64_t task_count(const Step& s);
void run_task(const Step& s, int64_t task, float* scratch);

// Rows [begin, end) of a map of one image.
struct Lines {
  int64_t begin, end;
};

// The input rows that output rows need, of `H` that there are.
SENET_INLINE Lines input_lines(const Step& s, Lines output, int64_t H) {
  const int64_t begin = std::max<int64_t>(0, output.begin * s.stride_h - s.pad_h);
  const int64_t reach = (s.kernel_h - 1) * s.dilation_h + 1;
  const int64_t end = std::min(H, (output.end - 1) * s.stride_h - s.pad_h + reach);
  return {begin, std::max(begin, end)};
}

SENET_INLINE int64_t chain_blocks(const Step& s) { return ceil_div(s.OH, s.rows); }

int64_t chain_tasks(const Step& s) { return s.N * s.parts; }

// Output rows `lines` of one image by a step of a chain; row 0 of `from` is row `first` of its input.
SENET_INLINE void run_lines(Step s, int64_t n, Lines lines, const float* from, Lines held, float* to,
                            int64_t block, int64_t blocks, float* scratch) {
  const int64_t top = lines.begin * s.stride_h - s.pad_h, base = std::max<int64_t>(0, top);
  const int64_t pixel = (n * s.OH + lines.begin) * s.OW;
  s.x = from + (base - held.begin) * s.W * s.x_ld;
  s.H = held.end - base;
  s.pad_h = base - top;
  s.y = to;
  if (s.shortcut) s.shortcut += pixel * s.shortcut_ld;
  if (s.gates) s.gates += n * s.gates_ld;
  if (s.input_gates) s.input_gates += n * s.input_gates_ld;
  if (s.sums) s.sums += (n * blocks + block) * s.sums_ld;
  s.N = 1;
  s.OH = lines.end - lines.begin;
  const int64_t tasks = task_count(s);
  for (int64_t t = 0; t < tasks; ++t) run_task(s, t, scratch);
}

// A task is a part of an image; neighbouring tasks both compute the rows that both need.
void chain(const Step& s, int64_t task, float* scratch) {
  const Step* steps = &s + 1;
  const int64_t last = s.steps - 1, blocks = chain_blocks(s);
  const int64_t n = task / s.parts, part = task % s.parts;
  float* maps[kLongestChain];
  Lines held[kLongestChain], wanted[kLongestChain];  // of each step's output
  for (int64_t i = 0; i < last; ++i) {
    maps[i] = scratch;
    held[i] = {0, 0};
    scratch += steps[i].lines * steps[i].OW * steps[i].y_ld;
  }
  for (int64_t block = blocks * part / s.parts; block < blocks * (part + 1) / s.parts; ++block) {
    wanted[last] = {s.OH * block / blocks, s.OH * (block + 1) / blocks};
    for (int64_t i = last; i > 0; --i)
      wanted[i - 1] = input_lines(steps[i], wanted[i], steps[i - 1].OH);
    for (int64_t i = 0; i <= last; ++i) {
      const Step& step = steps[i];
      Lines lines = wanted[i];
      const int64_t row = step.OW * step.y_ld;
      float* to;
      if (i < last) {
        if (held[i].end > lines.begin) {  // rows that the block before has made
          std::memmove(maps[i], maps[i] + (lines.begin - held[i].begin) * row,
                       size_t((held[i].end - lines.begin) * row) * sizeof(float));
          lines.begin = held[i].end;
        }
        held[i] = wanted[i];
        to = maps[i] + (lines.begin - held[i].begin) * row;
      } else {
        to = step.y + (n * step.OH + lines.begin) * row;
      }
      if (lines.begin >= lines.end) continue;
      const float* from = i ? maps[i - 1] : step.x + n * step.H * step.W * step.x_ld;
      const Lines source = i ? held[i - 1] : Lines{0, step.H};
      run_lines(step, n, lines, from, source, to, block, blocks, scratch);
    }
  }
}

}  // namespace
}  // namespace senet
