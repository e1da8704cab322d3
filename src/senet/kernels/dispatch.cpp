// The library's functions, called through ctypes by senet.kernels: they hand over to the kernels of
// the best instruction set that the processor has, or the one that SENET_ISA names. Compiled for every
// processor; plain C++17, no PyTorch headers.

#include <cstdlib>
#include <cstring>

#include "convolution/arguments.h"
#include "inference/step.h"
#include "layout.h"
#include "operator/arguments.h"
#include "portability.h"

// The instruction set that every processor has which the library is compiled for.
#ifdef __aarch64__
#define SENET_EVERYWHERE neon
#else
#define SENET_EVERYWHERE baseline
#endif

#define SENET_DECLARE(isa)                             \
  namespace senet::isa {                               \
  extern const OperatorKernels operator_kernels;       \
  extern const InferenceKernels inference_kernels;     \
  extern const ConvolutionKernels convolution_kernels; \
  }
SENET_DECLARE(SENET_EVERYWHERE)
#ifdef SENET_X86
SENET_DECLARE(avx2)
SENET_DECLARE(avx512)
#endif

namespace senet {
namespace {

struct Kernels {
  const char* isa;
  const OperatorKernels& operator_kernels;
  const InferenceKernels& inference_kernels;
  const ConvolutionKernels& convolution_kernels;
};

#define SENET_NAME(isa) #isa
#define SENET_KERNELS(isa) \
  Kernels { SENET_NAME(isa), isa::operator_kernels, isa::inference_kernels, isa::convolution_kernels }

Kernels choose() {
#ifdef SENET_X86
  const char* wanted = std::getenv("SENET_ISA");
  const bool any = !wanted || !*wanted;
  if (processor_has_avx512() && (any || !std::strcmp(wanted, "avx512"))) return SENET_KERNELS(avx512);
  if (processor_has_avx2() && (any || std::strcmp(wanted, "baseline"))) return SENET_KERNELS(avx2);
#endif
  return SENET_KERNELS(SENET_EVERYWHERE);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

// The operator's kernels for maps of a type: 0 float32, 1 bfloat16, 2 float64, which that set has for
// all.
const OperatorKernels& operator_kernels(int type) {
  return type == 2 ? SENET_EVERYWHERE::operator_kernels : kernels().operator_kernels;
}

// Number `index` of some tables behind each other; null after the last.
template <class Entry>
struct Table {
  const Entry* entries;
  int64_t count;
  template <size_t kCount>
  constexpr Table(const Entry (&array)[kCount]) : entries(array), count(kCount) {}
};

template <class Entry, size_t kTables>
const Entry* entry(const Table<Entry> (&tables)[kTables], int64_t index) {
  for (const Table<Entry>& table : tables) {
    if (index < table.count) return table.entries + index;
    index -= table.count;
  }
  return nullptr;
}

}  // namespace
}  // namespace senet

using namespace senet;

// What structs.py is compared with, one by one from index 0 on until null is returned.
SENET_EXPORT const Field* senet_field(int64_t index) {
  constexpr Table<Field> tables[] = {kNormFields, kTailFields,      kBranchFields,
                                     kJoinFields, kDepthwiseFields, kStepFields,
                                     kConvolutionFields};
  return entry(tables, index);
}
SENET_EXPORT const Constant* senet_constant(int64_t index) {
  constexpr Table<Constant> tables[] = {kOperatorConstants, kInferenceConstants};
  return entry(tables, index);
}

// The instruction set in use, the output channels of a weight panel, the rows of a register tile, the
// floats of scratch memory that each step needs of a thread's.
SENET_EXPORT const char* senet_isa() { return kernels().isa; }
SENET_EXPORT int64_t senet_panel() { return kernels().inference_kernels.panel; }
SENET_EXPORT int64_t senet_tile_rows() { return kernels().inference_kernels.tile_rows; }
SENET_EXPORT int64_t senet_step_floats() { return kernels().inference_kernels.step_floats; }

// All return 0, or 1 when memory ran out; `type` as above.
SENET_EXPORT int senet_tail_forward(int type, const TailArguments* a) {
  return operator_kernels(type).tail_forward[type](*a);
}
SENET_EXPORT int senet_tail_backward(int type, const TailArguments* a) {
  return operator_kernels(type).tail_backward[type](*a);
}
SENET_EXPORT int senet_join_forward(int type, const JoinArguments* a) {
  return operator_kernels(type).join_forward[type](*a);
}
SENET_EXPORT int senet_join_backward(int type, const JoinArguments* a) {
  return operator_kernels(type).join_backward[type](*a);
}

SENET_EXPORT int senet_depthwise_forward(const DepthwiseArguments* a) {
  return kernels().operator_kernels.depthwise_forward(*a);
}
SENET_EXPORT int senet_depthwise_backward(const DepthwiseArguments* a) {
  return kernels().operator_kernels.depthwise_backward(*a);
}

// Return 0, or 1 when memory ran out; see ConvolutionKernels.
#define SENET_CONVOLUTION(name)                                                \
  SENET_EXPORT int senet_convolution_##name(const ConvolutionArguments* a) {  \
    return kernels().convolution_kernels.name(*a);                            \
  }
SENET_CONVOLUTION(forward)
SENET_CONVOLUTION(input_gradient)
SENET_CONVOLUTION(weights_gradient)

// Runs `count` steps with `threads` threads; each has `scratch_size` floats of scratch, whole lines
// of the cache.
SENET_EXPORT void senet_run(Step* steps, int64_t count, int64_t threads, float* scratch,
                            int64_t scratch_size) {
  kernels().inference_kernels.run(steps, count, threads, scratch, scratch_size);
}
