// Memory that kernels work in.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace senet {
namespace {

// Scratch memory of the calling thread, kept between calls: fresh pages would cost more than the sums.
template <class A>
A* scratch(int64_t count) {
  struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  thread_local Buffer buffer;
  const size_t bytes = (size_t(count) * sizeof(A) + 127) / 64 * 64;
  if (bytes > buffer.size) {
    std::free(buffer.memory);
    buffer.memory = std::aligned_alloc(64, bytes);
    buffer.size = buffer.memory ? bytes : 0;
  }
  return static_cast<A*>(buffer.memory);
}

}  // namespace
}  // namespace senet
