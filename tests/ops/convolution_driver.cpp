// Runs the three passes on maps whose buffers have exactly the size they need, so that the address and
// undefined-behaviour sanitizers see any access outside. Compiled and run by test_convolution.py.
#include <cmath>
#include <cstdio>
#include <vector>

#include "weights.h"

using namespace senet;

int main() {
  struct Shape {
    int64_t N, H, W, C, K, pad, groups = 1, kernel = 3, stride = 1;
  };
  int passes = 0;
  for (const Shape& s : {Shape{2, 5, 7, 16, 48, 1}, Shape{1, 6, 4, 80, 16, 0}, Shape{3, 3, 2, 32, 96, 2},
                        Shape{1, 1, 1, 16, 16, 1}, Shape{9, 8, 8, 64, 64, 1},
                        Shape{2, 9, 6, 144, 176, 1}, Shape{2, 9, 6, 96, 192, 1, 3},
                        Shape{3, 7, 9, 64, 96, 0, 2, 1, 2}}) {
    const int64_t OH = (s.H + 2 * s.pad - s.kernel) / s.stride + 1;
    const int64_t OW = (s.W + 2 * s.pad - s.kernel) / s.stride + 1;
    const int64_t weights = s.K * s.kernel * s.kernel * s.C / s.groups;
    std::vector<float> x(size_t(s.N * s.H * s.W * s.C), 0.5f), w(size_t(weights), 0.25f);
    std::vector<float> y(size_t(s.N * OH * OW * s.K), 0.5f);
    const ConvolutionArguments a{s.N,      s.H,      s.W,      s.C,   OH,       OW,       s.K,     s.pad,
                                 s.pad,    s.kernel, s.stride, s.groups, 2,     x.data(), w.data(),
                                 y.data()};
    for (auto* pass : {forward, input_gradient, weights_gradient}) {
      if (s.kernel == 1 && pass != weights_gradient) continue;
      std::vector<float>& written = pass == forward ? y : pass == input_gradient ? x : w;
      std::fill(written.begin(), written.end(), NAN);
      if (pass(a)) return 1;
      for (const float value : written)
        if (!std::isfinite(value)) return 2;
      ++passes;
    }
  }
  std::printf("%d passes\n", passes);
  return 0;
}
