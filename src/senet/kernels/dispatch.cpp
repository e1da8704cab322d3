// CPU kernels of senet.ops: plain C++17 and OpenMP, no PyTorch headers, called through ctypes.
//
// The same kernels are compiled for several instruction sets into one library, and the best that the
// processor has is chosen when the library is first used (SENET_ISA=avx512|avx2|baseline overrides).
// The library is not linked to an OpenMP runtime: it uses the one that PyTorch has loaded.

#include "cpu_types.h"

#ifdef SENET_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2,prefer-vector-width=512")
#define SENET_VECTOR_BYTES 64
namespace avx512 {
namespace {
#include "cpu_vector.h"
#include "cpu_passes.h"
#include "cpu_gate.h"
#include "cpu_tail.h"
#include "cpu_backward.h"
#include "cpu_join.h"
}  // namespace
}  // namespace avx512
#undef SENET_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define SENET_VECTOR_BYTES 32
namespace avx2 {
namespace {
#include "cpu_vector.h"
#include "cpu_passes.h"
#include "cpu_gate.h"
#include "cpu_tail.h"
#include "cpu_backward.h"
#include "cpu_join.h"
}  // namespace
}  // namespace avx2
#undef SENET_VECTOR_BYTES
#pragma GCC pop_options
#endif

#define SENET_VECTOR_BYTES 16
namespace baseline {
namespace {
#include "cpu_vector.h"
#include "cpu_passes.h"
#include "cpu_gate.h"
#include "cpu_tail.h"
#include "cpu_backward.h"
#include "cpu_join.h"
}  // namespace
}  // namespace baseline
#undef SENET_VECTOR_BYTES

namespace {

using Function = int (*)(const TailArguments*);
using JoinFunction = int (*)(const JoinArguments*);
struct Kernels {
  const char* isa;
  Function forward[3], backward[3];  // float32, bfloat16, float64 (always baseline)
  JoinFunction join_forward[3], join_backward[3];
};

#define SENET_KERNELS(space)                                                                        \
  Kernels {                                                                                         \
    #space, {space::forward<float>, space::forward<bfloat16>, baseline::forward<double>},           \
        {space::backward<float>, space::backward<bfloat16>, baseline::backward<double>},            \
        {space::join_forward<float>, space::join_forward<bfloat16>, baseline::join_forward<double>}, \
        {space::join_backward<float>, space::join_backward<bfloat16>,                               \
         baseline::join_backward<double>},                                                          \
  }

Kernels choose() {
  const char* wanted = std::getenv("SENET_ISA");
  const bool any = !wanted || !*wanted;
#ifdef SENET_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  if (has_avx512 && (any || !std::strcmp(wanted, "avx512"))) return SENET_KERNELS(avx512);
  if (has_avx2 && (any || std::strcmp(wanted, "baseline"))) return SENET_KERNELS(avx2);
#endif
  (void)any;
  return SENET_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

#define SENET_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set in use.
SENET_EXPORT const char* senet_isa() { return kernels().isa; }
// Size of the argument blocks, so that cpu.py can tell a library of another version.
SENET_EXPORT int64_t senet_arguments_size() {
  return sizeof(TailArguments) + sizeof(JoinArguments) + sizeof(JoinBranch);
}
// All return 0, or 1 when memory ran out. storage: 0 float32, 1 bfloat16, 2 float64.
SENET_EXPORT int senet_tail_forward(int storage, const TailArguments* a) {
  return kernels().forward[storage](a);
}
SENET_EXPORT int senet_tail_backward(int storage, const TailArguments* a) {
  return kernels().backward[storage](a);
}
SENET_EXPORT int senet_join_forward(int storage, const JoinArguments* a) {
  return kernels().join_forward[storage](a);
}
SENET_EXPORT int senet_join_backward(int storage, const JoinArguments* a) {
  return kernels().join_backward[storage](a);
}
