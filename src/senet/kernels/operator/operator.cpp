// The operator's kernels of one instruction set: compiled once for each, with its flags and with
// SENET_ISA its name. Everything is in an unnamed namespace but the table at the end, so that the
// linker cannot take code of one set for that of another.

#include "backward.h"
#include "depthwise.h"
#include "forward.h"
#include "join.h"

namespace senet::SENET_ISA {

extern const OperatorKernels operator_kernels;

#ifdef SENET_WITH_FLOAT64
#define SENET_EACH_TYPE(kernel) \
  { kernel<float>, kernel<bfloat16>, kernel<double> }
#else
#define SENET_EACH_TYPE(kernel) \
  { kernel<float>, kernel<bfloat16>, nullptr }
#endif

const OperatorKernels operator_kernels = {
    SENET_EACH_TYPE(tail_forward),
    SENET_EACH_TYPE(tail_backward),
    SENET_EACH_TYPE(join_forward),
    SENET_EACH_TYPE(join_backward),
    depthwise_forward,
    depthwise_backward,
};

}  // namespace senet::SENET_ISA
