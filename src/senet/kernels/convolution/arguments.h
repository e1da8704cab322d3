// What Python gives the convolution kernels; structs.py describes the same.
#pragma once

#include "../layout.h"

namespace senet {

// A convolution of float32 maps in channels_last order: x is [N][H][W][C], weights [K][kernel][kernel]
// [C / groups], y [N][OH][OW][K]. C and K are multiples of 16 in each group. The kernel is 3, with
// stride 1 and a padding of at most 2; or, for the gradient of the weights, 1 without padding.
struct ConvolutionArguments {
  int64_t N, H, W, C, OH, OW, K, pad_h, pad_w, kernel, stride, groups, threads;
  float *x, *weights, *y;  // one of them is written; of a gradient pass it and y are gradients
};

namespace {

#define FIELD(name) SENET_FIELD(ConvolutionArguments, name)
constexpr Field kConvolutionFields[] = {
    FIELD(N), FIELD(H), FIELD(W), FIELD(C), FIELD(OH), FIELD(OW), FIELD(K),
    FIELD(pad_h), FIELD(pad_w), FIELD(kernel), FIELD(stride), FIELD(groups), FIELD(threads), FIELD(x), FIELD(weights), FIELD(y),
};
static_assert(covers(kConvolutionFields, sizeof(ConvolutionArguments)));
#undef FIELD

}  // namespace

// The kernels of one instruction set. All return 0, or 1 when memory ran out.
struct ConvolutionKernels {
  int (*forward)(const ConvolutionArguments&);
  int (*input_gradient)(const ConvolutionArguments&);
  int (*weights_gradient)(const ConvolutionArguments&);
};

}  // namespace senet
