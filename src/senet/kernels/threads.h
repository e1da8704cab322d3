// Teams of threads, from the OpenMP runtime that PyTorch has loaded into the process.
//
// These are the functions that GCC makes `#pragma omp parallel` and `#pragma omp barrier` into;
// libgomp has them, and LLVM's libomp and Intel's libiomp5 have them for its sake. Called by name,
// they serve every compiler with the one pool of threads that is there. Clang's pragmas call
// functions that libgomp lacks: they would need libomp beside it, whose threads spin against those
// of PyTorch.
#pragma once

#include <cstdint>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) noexcept;
void GOMP_barrier() noexcept;
int omp_get_thread_num() noexcept;
int omp_get_num_threads() noexcept;
}

namespace senet {
namespace {

// One thread of a team.
struct Member {
  int id, size;  // its number, and that of all
  void barrier() const { GOMP_barrier(); }
};

// Runs f(member) in each of `threads` threads at once; f must not throw.
template <class F>
void parallel(int64_t threads, const F& f) {
  const auto body = [](void* data) {
    (*static_cast<const F*>(data))(Member{omp_get_thread_num(), omp_get_num_threads()});
  };
  GOMP_parallel(body, const_cast<F*>(&f), unsigned(threads), 0);
}

}  // namespace
}  // namespace senet
