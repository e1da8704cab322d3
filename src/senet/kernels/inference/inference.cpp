// The kernels of senet.optimize for float32, a whole network in one call: compiled once for each
// instruction set, with its flags and with SENET_ISA its name. Everything is in an unnamed namespace
// but the table at the end, so that the linker cannot take code of one set for that of another.

#include "program.h"

namespace senet::SENET_ISA {

extern const InferenceKernels inference_kernels;
const InferenceKernels inference_kernels = {kPanel, kTileRows, kCounterFloats, run};

}  // namespace senet::SENET_ISA
