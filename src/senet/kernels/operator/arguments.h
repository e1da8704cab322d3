// What Python gives the operator's kernels; structs.py describes the same.
#pragma once

#include "../layout.h"

namespace senet {

enum Gate { kSigmoid, kTanh, kRelu, kHardSigmoid, kIdentitySigmoid };
// Given: as an earlier forward pass left them in `statistics` and `gates`; forward only.
enum Normalization { kNone, kRunningStatistics, kBatchStatistics, kGivenStatistics };
enum Shortcut { kNoShortcut, kPlainShortcut, kNormalizedShortcut };
// At the end of a tail, of each branch of a join, or of a gate's hidden layer.
enum Elementwise {
  kActLinear,
  kActRelu,
  kActRelu6,
  kActSilu,
  kActHardswish,
  kActGelu,
  kActLeakyRelu
};

// In batch mode the running statistics, where given, move by `momentum` towards the batch's.
struct NormArguments {
  const void *weight, *bias;
  void *running_mean, *running_var;
  double eps, momentum;
};

struct TailArguments {
  int64_t N, C, P, H;  // images, channels, pixels, hidden width of the gate (0: no gate)
  int64_t channels_last, threads, gate, activation, normalization, shortcut_kind;
  double negative_slope;  // of kActLeakyRelu
  NormArguments norm, shortcut_norm;
  const void *x, *shortcut, *w1, *b1, *w2, *b2;
  void *y, *statistics, *squeezed, *hidden, *gates;
  // backward only; a null output is not wanted
  const void* gradient;
  void *dx, *dshortcut, *dweight, *dbias, *dshortcut_weight, *dshortcut_bias;
  void *dw1, *db1, *dw2, *db2;
};

// One input of a join: a map of C channels. kNone: it goes in as it is; else through norm and activation.
struct JoinBranch {
  int64_t C, normalization;
  NormArguments norm;
  const void* x;
  void *dx, *dweight, *dbias;  // backward only; a null output is not wanted
};

// Followed in memory by its branches. statistics has rows mean, inv_std, var, scale, shift; hidden is
// what the hidden activation sees, or with kActRelu what it gives.
struct JoinArguments {
  int64_t N, C, P, H, branches;  // C: of all branches together
  int64_t channels_last, threads, gate, activation, hidden_activation;
  double negative_slope;  // of kActLeakyRelu as `activation`
  const void *w1, *b1, *w2, *b2;
  void *y, *statistics, *squeezed, *hidden, *gates;
  const void* gradient;  // backward only
  void *dw1, *db1, *dw2, *db2;
};

// A depthwise convolution of channels_last float32 maps: x (N,H,W,C), weights (C,kernel,kernel).
struct DepthwiseArguments {
  int64_t N, C, H, W, OH, OW, kernel, stride, padding, threads;
  const void *x, *weights;
  void *y, *packed;  // packed: the weights as (kernel * kernel, C), from the forward pass
  // backward only; a null output is not wanted
  const void* gradient;
  void *dx, *dweights;
};

namespace {

#define FIELD(name) SENET_FIELD(NormArguments, name)
constexpr Field kNormFields[] = {
    FIELD(weight), FIELD(bias), FIELD(running_mean), FIELD(running_var), FIELD(eps), FIELD(momentum),
};
static_assert(covers(kNormFields, sizeof(NormArguments)));
#undef FIELD

#define FIELD(name) SENET_FIELD(TailArguments, name)
constexpr Field kTailFields[] = {
    FIELD(N), FIELD(C), FIELD(P), FIELD(H),
    FIELD(channels_last), FIELD(threads), FIELD(gate), FIELD(activation), FIELD(normalization),
    FIELD(shortcut_kind), FIELD(negative_slope), FIELD(norm), FIELD(shortcut_norm),
    FIELD(x), FIELD(shortcut), FIELD(w1), FIELD(b1), FIELD(w2), FIELD(b2),
    FIELD(y), FIELD(statistics), FIELD(squeezed), FIELD(hidden), FIELD(gates),
    FIELD(gradient), FIELD(dx), FIELD(dshortcut), FIELD(dweight), FIELD(dbias),
    FIELD(dshortcut_weight), FIELD(dshortcut_bias), FIELD(dw1), FIELD(db1), FIELD(dw2), FIELD(db2),
};
static_assert(covers(kTailFields, sizeof(TailArguments)));
#undef FIELD

#define FIELD(name) SENET_FIELD(JoinBranch, name)
constexpr Field kBranchFields[] = {
    FIELD(C), FIELD(normalization), FIELD(norm), FIELD(x), FIELD(dx), FIELD(dweight), FIELD(dbias),
};
static_assert(covers(kBranchFields, sizeof(JoinBranch)));
#undef FIELD

#define FIELD(name) SENET_FIELD(JoinArguments, name)
constexpr Field kJoinFields[] = {
    FIELD(N), FIELD(C), FIELD(P), FIELD(H), FIELD(branches),
    FIELD(channels_last), FIELD(threads), FIELD(gate), FIELD(activation), FIELD(hidden_activation),
    FIELD(negative_slope), FIELD(w1), FIELD(b1), FIELD(w2), FIELD(b2),
    FIELD(y), FIELD(statistics), FIELD(squeezed), FIELD(hidden), FIELD(gates),
    FIELD(gradient), FIELD(dw1), FIELD(db1), FIELD(dw2), FIELD(db2),
};
static_assert(covers(kJoinFields, sizeof(JoinArguments)));
#undef FIELD

#define FIELD(name) SENET_FIELD(DepthwiseArguments, name)
constexpr Field kDepthwiseFields[] = {
    FIELD(N), FIELD(C), FIELD(H), FIELD(W), FIELD(OH), FIELD(OW), FIELD(kernel), FIELD(stride),
    FIELD(padding), FIELD(threads), FIELD(x), FIELD(weights), FIELD(y), FIELD(packed),
    FIELD(gradient), FIELD(dx), FIELD(dweights),
};
static_assert(covers(kDepthwiseFields, sizeof(DepthwiseArguments)));
#undef FIELD

constexpr Constant kOperatorConstants[] = {
    {"Gate", "SIGMOID", kSigmoid},
    {"Gate", "TANH", kTanh},
    {"Gate", "RELU", kRelu},
    {"Gate", "HARD_SIGMOID", kHardSigmoid},
    {"Gate", "IDENTITY_SIGMOID", kIdentitySigmoid},
    {"Normalization", "NONE", kNone},
    {"Normalization", "RUNNING", kRunningStatistics},
    {"Normalization", "BATCH", kBatchStatistics},
    {"Normalization", "GIVEN", kGivenStatistics},
    {"Shortcut", "NONE", kNoShortcut},
    {"Shortcut", "PLAIN", kPlainShortcut},
    {"Shortcut", "NORMALIZED", kNormalizedShortcut},
    {"Elementwise", "LINEAR", kActLinear},
    {"Elementwise", "RELU", kActRelu},
    {"Elementwise", "RELU6", kActRelu6},
    {"Elementwise", "SILU", kActSilu},
    {"Elementwise", "HARDSWISH", kActHardswish},
    {"Elementwise", "GELU", kActGelu},
    {"Elementwise", "LEAKY_RELU", kActLeakyRelu},
};

}  // namespace

// The kernels of one instruction set, by the maps' type: float32, bfloat16, float64. All return 0, or
// 1 when memory ran out. float64 is there in the baseline set only, which serves the others.
struct OperatorKernels {
  int (*tail_forward[3])(const TailArguments&);
  int (*tail_backward[3])(const TailArguments&);
  int (*join_forward[3])(const JoinArguments&);
  int (*join_backward[3])(const JoinArguments&);
  int (*depthwise_forward)(const DepthwiseArguments&);
  int (*depthwise_backward)(const DepthwiseArguments&);
};

}  // namespace senet
