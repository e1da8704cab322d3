// What Python gives the kernels of senet.optimize, a program of steps; structs.py describes the same.
#pragma once

#include "../layout.h"

namespace senet {

enum Kind {
  kInput,
  kConvolution,
  kWinograd,
  kWinogradInput,
  kWinogradProduct,
  kDepthwise,
  kMaxPool,
  kAveragePool,
  kSums,
  kMeans,
  kPointwise,
  kExcitation,
  kImages,
  kGrouped,
  kChain,
  kSliding,
  kPaired,
};

// As senet.ops.activations names them; a PReLU has its slopes beside it, and the identity sigmoid, a
// gate, is twice a sigmoid.
enum class Activation : int64_t {
  kLinear,
  kRelu,
  kRelu6,
  kLeakyRelu,
  kPrelu,
  kElu,
  kSilu,
  kHardswish,
  kMish,
  kGelu,
  kGeluTanh,
  kSigmoid,
  kHardsigmoid,
  kTanh,
  kIdentitySigmoid,
};

// One step of a program. Maps are channels_last: element (n, h, w, c) of x lies at
// ((n * H + h) * W + w) * x_ld + c, where x_ld >= C. A null pointer means "none".
struct Step {
  int64_t kind;
  const float *x, *weights, *bias, *gates, *shortcut, *slopes;
  const float* input_gates;  // of a 1×1 convolution: factors of its input, [N][input_gates_ld]
  float *y, *patches;  // patches: of a Winograd convolution that transforms all inputs first
  // Sums over parts of each image, [N][sum_blocks][sums_ld]: of x (kSums), of what a convolution
  // writes; read by kMeans.
  float* sums;
  int64_t x_ld, weights_ld, y_ld, gates_ld, shortcut_ld, sums_ld, input_gates_ld;
  int64_t N, H, W, C, OH, OW, OC;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t activation;
  double parameter;  // of the activation
  int64_t rows, panels, tiles, images;  // of a task, as its kind counts: pixels, panels of weights, …
  int64_t sum_blocks;                   // parts that an image's sums are in
  int64_t steps;                        // behind a kImages or kChain, which runs them
  int64_t parts;                        // tasks of an image, of a kChain
  int64_t lines;                        // rows of its output that a step of a chain keeps
  int64_t counts_padding;               // whether padding counts in an average
  int64_t tile;                         // outputs of a Winograd tile along one side
  int64_t strides[4];                   // of the network's input along n, c, h, w
};

namespace {

// Channels of a map that is read beyond its edges; wider ones take other steps.
constexpr int64_t kMaxChannels = 8192;

#define FIELD(name) SENET_FIELD(Step, name)
constexpr Field kStepFields[] = {
    FIELD(kind), FIELD(x), FIELD(weights), FIELD(bias), FIELD(gates), FIELD(shortcut), FIELD(slopes), FIELD(input_gates),
    FIELD(y), FIELD(patches), FIELD(sums),
    FIELD(x_ld), FIELD(weights_ld), FIELD(y_ld), FIELD(gates_ld), FIELD(shortcut_ld), FIELD(sums_ld),
    FIELD(input_gates_ld),
    FIELD(N), FIELD(H), FIELD(W), FIELD(C), FIELD(OH), FIELD(OW), FIELD(OC),
    FIELD(kernel_h), FIELD(kernel_w), FIELD(stride_h), FIELD(stride_w), FIELD(pad_h), FIELD(pad_w),
    FIELD(dilation_h), FIELD(dilation_w), FIELD(groups), FIELD(activation), FIELD(parameter),
    FIELD(rows), FIELD(panels), FIELD(tiles), FIELD(images),
    FIELD(sum_blocks), FIELD(steps), FIELD(parts), FIELD(lines), FIELD(counts_padding), FIELD(tile), FIELD(strides),
};
static_assert(covers(kStepFields, sizeof(Step)));
#undef FIELD

constexpr Constant kInferenceConstants[] = {
    {"Kind", "INPUT", kInput},
    {"Kind", "CONVOLUTION", kConvolution},
    {"Kind", "WINOGRAD", kWinograd},
    {"Kind", "WINOGRAD_INPUT", kWinogradInput},
    {"Kind", "WINOGRAD_PRODUCT", kWinogradProduct},
    {"Kind", "DEPTHWISE", kDepthwise},
    {"Kind", "MAX_POOL", kMaxPool},
    {"Kind", "AVERAGE_POOL", kAveragePool},
    {"Kind", "SUMS", kSums},
    {"Kind", "MEANS", kMeans},
    {"Kind", "POINTWISE", kPointwise},
    {"Kind", "EXCITATION", kExcitation},
    {"Kind", "IMAGES", kImages},
    {"Kind", "GROUPED", kGrouped},
    {"Kind", "CHAIN", kChain},
    {"Kind", "SLIDING", kSliding},
    {"Kind", "PAIRED", kPaired},
    {"Activation", "LINEAR", int64_t(Activation::kLinear)},
    {"Activation", "RELU", int64_t(Activation::kRelu)},
    {"Activation", "RELU6", int64_t(Activation::kRelu6)},
    {"Activation", "LEAKY_RELU", int64_t(Activation::kLeakyRelu)},
    {"Activation", "PRELU", int64_t(Activation::kPrelu)},
    {"Activation", "ELU", int64_t(Activation::kElu)},
    {"Activation", "SILU", int64_t(Activation::kSilu)},
    {"Activation", "HARDSWISH", int64_t(Activation::kHardswish)},
    {"Activation", "MISH", int64_t(Activation::kMish)},
    {"Activation", "GELU", int64_t(Activation::kGelu)},
    {"Activation", "GELU_TANH", int64_t(Activation::kGeluTanh)},
    {"Activation", "SIGMOID", int64_t(Activation::kSigmoid)},
    {"Activation", "HARDSIGMOID", int64_t(Activation::kHardsigmoid)},
    {"Activation", "TANH", int64_t(Activation::kTanh)},
    {"Activation", "IDENTITY_SIGMOID", int64_t(Activation::kIdentitySigmoid)},
    {"Limit", "CHANNELS", kMaxChannels},
};

}  // namespace

// The kernels of one instruction set; `run` is senet_run of dispatch.cpp.
struct InferenceKernels {
  // Output channels of a weight panel, rows of a register tile, floats of scratch memory that a thread
  // has more for each step.
  int64_t panel, tile_rows, step_floats;
  void (*run)(Step* steps, int64_t count, int64_t threads, float* scratch, int64_t scratch_size);
};

}  // namespace senet
