// Which thread takes which task of a step. Each has a share, tasks behind each other, and then helps
// the others with what is left of theirs: the same rows of the next map are found in the cache of the
// thread that has made them, but one that the operating system has put aside holds up nobody.
#pragma once

#include "../portability.h"

namespace senet {
namespace {

// Floats between the counters of a step and those of the next one.
constexpr int64_t kCounterFloats = 4;

// A thread's part of a step: the first task that nobody has taken, and how many the thread has
// finished, of its own and of others'.
struct Counters {
  int64_t next, done;
};
static_assert(sizeof(Counters) == kCounterFloats * sizeof(float));

// The counters of all threads and steps: at the front of each thread's scratch memory, so that no two
// threads write to the same line of the cache while each is in its own share.
class Shares {
 public:
  Shares(int64_t threads, float* scratch, int64_t scratch_size)
      : threads_(threads), scratch_(scratch), size_(scratch_size) {}

  // Floats that the counters of `steps` steps take: whole lines.
  static int64_t floats(int64_t steps) { return (steps * kCounterFloats + 15) / 16 * 16; }

  void begin(int64_t step, int64_t tasks) const {
    for (int64_t t = 0; t < threads_; ++t) at(t, step) = {tasks * t / threads_, 0};
  }

  // Runs `task(number)` for all tasks of a step that are left; `thread` is the caller.
  template <class F>
  void work(int64_t step, int64_t tasks, int64_t thread, const F& task) const {
    Counters& mine = at(thread, step);
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (thread + i) % threads_, end = tasks * (owner + 1) / threads_;
      int64_t& next = at(owner, step).next;
      while (peek(next) < end) {
        const int64_t number = take_number(next);
        if (number >= end) break;
        task(number);
        publish(mine.done, mine.done + 1);
      }
    }
  }

  // A thread that finds no task left waits for the tasks that others still work on, not for the others
  // themselves: one that has been put aside between two tasks holds up nobody.
  void wait(int64_t step, int64_t tasks) const {
    for (int64_t turns = 0; done(step) < tasks; ++turns) wait_a_little(turns);
  }

 private:
  Counters& at(int64_t thread, int64_t step) const {
    return reinterpret_cast<Counters*>(scratch_ + thread * size_)[step];
  }
  int64_t done(int64_t step) const {
    int64_t sum = 0;
    for (int64_t t = 0; t < threads_; ++t) sum += see(at(t, step).done);
    return sum;
  }

  int64_t threads_;
  float* scratch_;
  int64_t size_;
};

}  // namespace
}  // namespace senet
