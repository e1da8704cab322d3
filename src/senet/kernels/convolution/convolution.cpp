// The convolution kernels of one instruction set: compiled once for each, with its flags and with
// SENET_ISA its name. Everything is in an unnamed namespace but the table at the end, so that the
// linker cannot take code of one set for that of another.

#include "weights.h"

namespace senet::SENET_ISA {

extern const ConvolutionKernels convolution_kernels;
const ConvolutionKernels convolution_kernels = {forward, input_gradient, weights_gradient};

}  // namespace senet::SENET_ISA
