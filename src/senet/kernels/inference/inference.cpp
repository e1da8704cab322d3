// A whole network in one call: the kernels of senet.optimize for float32 on the CPU. Plain C++17 and
// OpenMP, no PyTorch headers, called through ctypes by kernels.py, which also describes the layouts.
//
// Compiled for several instruction sets into one library, like senet/ops/cpu.cpp, whose vectors and
// gate functions are used here; SENET_ISA=avx512|avx2|baseline overrides the choice. Not linked to an
// OpenMP runtime: it uses the one that PyTorch has loaded.

#include <sched.h>

#include <utility>

#include "../ops/cpu_types.h"

namespace {

// Shared with kernels.py. An activation from kFirstGate on is a gate function of senet/ops.
enum Activation { kLinear, kPositive, kFirstGate };
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
};

// One step of a program. Maps are channels_last: element (n, h, w, c) of x lies at
// ((n * H + h) * W + w) * x_ld + c, where x_ld >= C. A null pointer means "none".
struct Step {
  int64_t kind, next, done;  // next: the first task that no thread has taken; done: tasks finished
  const float *x, *weights, *bias, *gates, *shortcut;
  float *y, *shared;
  float* sums;  // of a convolution: [N][blocks][sums_ld], what its tasks for an image have summed of y
  int64_t x_ld, y_ld, gates_ld, shortcut_ld, sums_ld;
  int64_t N, H, W, C, OH, OW, OC;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int64_t activation;
  int64_t rows, panels;  // rows (Winograd: tiles) and panels of a task
  int64_t tile;          // outputs of a Winograd tile along one side
  int64_t strides[4];    // of the network's input along n, c, h, w
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Number of floats between rows of scratch maps: a multiple of a cache line that is odd in lines, so
// that the rows of a tile do not fall into the same sets of the cache.
int64_t row_stride(int64_t width) { return (width + 15) / 32 * 32 + 16; }

}  // namespace

#ifdef SENET_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2,prefer-vector-width=512")
#define SENET_VECTOR_BYTES 64
#define SENET_TILE_ROWS 14
namespace avx512 {
namespace {
#include "../ops/cpu_vector.h"
#include "../ops/cpu_gate.h"
#include "kernels_product.h"
#include "kernels_convolution.h"
#include "kernels_winograd.h"
#include "kernels_grouped.h"
#include "kernels_excitation.h"
#include "kernels_passes.h"
#include "kernels_program.h"
}  // namespace
}  // namespace avx512
#undef SENET_VECTOR_BYTES
#undef SENET_TILE_ROWS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define SENET_VECTOR_BYTES 32
#define SENET_TILE_ROWS 6
namespace avx2 {
namespace {
#include "../ops/cpu_vector.h"
#include "../ops/cpu_gate.h"
#include "kernels_product.h"
#include "kernels_convolution.h"
#include "kernels_winograd.h"
#include "kernels_grouped.h"
#include "kernels_excitation.h"
#include "kernels_passes.h"
#include "kernels_program.h"
}  // namespace
}  // namespace avx2
#undef SENET_VECTOR_BYTES
#undef SENET_TILE_ROWS
#pragma GCC pop_options
#endif

#define SENET_VECTOR_BYTES 16
#define SENET_TILE_ROWS 5
namespace baseline {
namespace {
#include "../ops/cpu_vector.h"
#include "../ops/cpu_gate.h"
#include "kernels_product.h"
#include "kernels_convolution.h"
#include "kernels_winograd.h"
#include "kernels_grouped.h"
#include "kernels_excitation.h"
#include "kernels_passes.h"
#include "kernels_program.h"
}  // namespace
}  // namespace baseline
#undef SENET_VECTOR_BYTES
#undef SENET_TILE_ROWS

namespace {

struct Kernels {
  const char* isa;
  int64_t panel, tile_rows;
  void (*run)(Step*, int64_t, int64_t, float*, int64_t);
};

#define SENET_KERNELS(space) \
  Kernels { #space, space::kPanel, space::kTileRows, space::run }

Kernels choose() {
  const char* wanted = std::getenv("SENET_ISA");
#ifdef SENET_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  const bool any = !wanted || !*wanted;
  if (has_avx512 && (any || !std::strcmp(wanted, "avx512"))) return SENET_KERNELS(avx512);
  if (has_avx2 && (any || std::strcmp(wanted, "baseline"))) return SENET_KERNELS(avx2);
#endif
  (void)wanted;
  return SENET_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

#define SENET_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set in use, the output channels of a weight panel, the rows of a register tile.
SENET_EXPORT const char* senet_inference_isa() { return kernels().isa; }
SENET_EXPORT int64_t senet_inference_panel() { return kernels().panel; }
SENET_EXPORT int64_t senet_inference_tile_rows() { return kernels().tile_rows; }
// Size of a step, so that kernels.py can tell a library of another version.
SENET_EXPORT int64_t senet_inference_step_size() { return sizeof(Step); }
// Runs `count` steps with `threads` threads; each has `scratch_size` floats of scratch.
SENET_EXPORT void senet_inference_run(Step* steps, int64_t count, int64_t threads, float* scratch,
                                      int64_t scratch_size) {
  kernels().run(steps, count, threads, scratch, scratch_size);
}
