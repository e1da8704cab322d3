// Runs every kernel on small maps whose buffers have exactly the size they need, so that the address
// and undefined-behaviour sanitizers see any access outside; compares float32 and bfloat16 with
// float64. Compiled and run by test_ops_kernels.py, for one instruction set (AVX2 where it is x86).
#include <cstdio>
#include <vector>

#include "backward.h"
#include "forward.h"
#include "join.h"

using namespace senet;

namespace {

struct Shape {
  int64_t N, C, P, H;
};

// Multiples of 1/64 in [-1, 1], which every type holds exactly.
template <class T>
T number(int64_t i) {
  return T(double((i * 2654435761u) % 129) / 64.0 - 1.0);
}
template <>
bfloat16 number<bfloat16>(int64_t i) {
  const float f = number<float>(i);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return {uint16_t(bits >> 16)};
}

template <class T>
std::vector<T> numbers(int64_t count, int64_t seed) {
  std::vector<T> v(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) v[size_t(i)] = number<T>(i + seed);
  return v;
}

// All results of one forward and backward pass, widened to double.
template <class T>
std::vector<double> run(const Shape& s, int normalization, int shortcut, bool relus, bool gated,
                        bool channels_last, int gate) {
  using A = Accumulator<T>;
  const int64_t map = s.N * s.C * s.P, H = gated ? s.H : 0;
  auto x = numbers<T>(map, 1), r = numbers<T>(map, 7), g = numbers<T>(map, 3);
  auto weight = numbers<A>(s.C, 5), bias = numbers<A>(s.C, 6), mean = numbers<A>(s.C, 8);
  std::vector<A> var(static_cast<size_t>(s.C), A(0.7));
  auto w1 = numbers<A>(H * s.C, 9), b1 = numbers<A>(H, 10), w2 = numbers<A>(s.C * H, 11);
  auto b2 = numbers<A>(s.C, 12);
  const auto filled = [](int64_t count) { return numbers<A>(count, 0); };
  auto y = numbers<T>(map, 0), dx = y, dr = y;
  auto statistics = filled(s.C * 6), squeezed = filled(s.N * s.C), hidden = filled(s.N * H);
  auto gates = filled(s.N * s.C), dw = filled(s.C), db = dw, dsw = dw, dsb = dw, db2 = dw;
  auto dw1 = filled(H * s.C), db1 = filled(H), dw2 = dw1;

  TailArguments a{};
  a.N = s.N, a.C = s.C, a.P = s.P, a.H = H;
  a.channels_last = channels_last, a.threads = 2, a.gate = gate, a.activation = relus ? kActRelu : kActLinear;
  a.normalization = normalization, a.shortcut_kind = shortcut;
  a.norm = a.shortcut_norm = {weight.data(), bias.data(), mean.data(), var.data(), 1e-5, 0.1};
  a.x = x.data(), a.shortcut = shortcut ? r.data() : nullptr;
  if (gated) a.w1 = w1.data(), a.b1 = b1.data(), a.w2 = w2.data(), a.b2 = b2.data();
  a.y = y.data(), a.statistics = statistics.data(), a.squeezed = squeezed.data();
  a.hidden = hidden.data(), a.gates = gates.data();
  int failed = tail_forward<T>(a);
  a.gradient = g.data(), a.dx = dx.data();
  const bool normalized = shortcut == kNormalizedShortcut;
  if (normalized || (shortcut && relus)) a.dshortcut = dr.data();
  if (normalization != kNone) a.dweight = dw.data(), a.dbias = db.data();
  if (normalized) a.dshortcut_weight = dsw.data(), a.dshortcut_bias = dsb.data();
  if (gated) a.dw1 = dw1.data(), a.db1 = db1.data(), a.dw2 = dw2.data(), a.db2 = db2.data();
  if (!relus && shortcut == kPlainShortcut) a.shortcut_kind = kNoShortcut;
  failed += tail_backward<T>(a);

  std::vector<double> all{double(failed)};
  for (const auto* maps : {&y, &dx, &dr})
    for (T value : *maps) all.push_back(double(widen(value)));
  for (const auto* values : {&dw, &db, &dsw, &dsb, &dw1, &db1, &dw2, &db2})
    for (A value : *values) all.push_back(double(value));
  return all;
}

// The same for a join of four branches: s.C channels twice, 3 and 16.
template <class T>
std::vector<double> run_join(const Shape& s, const std::vector<int>& normalizations, bool gated,
                             bool channels_last, int gate) {
  using A = Accumulator<T>;
  const int64_t sizes[] = {s.C, 3, s.C, 16}, C = 2 * s.C + 19, map = s.N * C * s.P;
  const int64_t H = gated ? s.H : 0, squeeze = gated ? s.N * C : 0;
  std::vector<std::vector<T>> x, dx;
  std::vector<std::vector<A>> norms, dweight, dbias;
  for (int64_t c : sizes) {
    x.push_back(numbers<T>(s.N * c * s.P, 1 + c));
    dx.push_back(x.back());
    for (int64_t j = 0; j < 3; ++j) norms.push_back(numbers<A>(c, 5 + j));
    norms.push_back(std::vector<A>(static_cast<size_t>(c), A(0.7)));
    dweight.push_back(norms.back());
    dbias.push_back(norms.back());
  }
  auto w1 = numbers<A>(H * C, 9), b1 = numbers<A>(H, 10), w2 = numbers<A>(C * H, 11);
  auto b2 = numbers<A>(C, 12), dw1 = w1, db1 = b1, dw2 = w2, db2 = b2;
  auto y = numbers<T>(map, 0), g = numbers<T>(map, 3);
  auto statistics = numbers<A>(5 * C, 0), squeezed = numbers<A>(squeeze, 0), gates = squeezed;
  auto hidden = numbers<A>(s.N * H, 0);

  struct {
    JoinArguments a;
    JoinBranch branch[4];
  } block{};
  JoinArguments& a = block.a;
  a.N = s.N, a.C = C, a.P = s.P, a.H = H, a.branches = 4;
  a.channels_last = channels_last, a.threads = 2, a.gate = gate;
  if (gated) a.w1 = w1.data(), a.b1 = b1.data(), a.w2 = w2.data(), a.b2 = b2.data();
  a.y = y.data(), a.statistics = statistics.data(), a.squeezed = squeezed.data();
  a.hidden = hidden.data(), a.gates = gates.data(), a.gradient = g.data();
  if (gated) a.dw1 = dw1.data(), a.db1 = db1.data(), a.dw2 = dw2.data(), a.db2 = db2.data();
  for (size_t k = 0; k < 4; ++k) {
    auto* norm = &norms[4 * k];
    block.branch[k] = {sizes[k], normalizations[k],
                       {norm[0].data(), norm[1].data(), norm[2].data(), norm[3].data(), 1e-5, 0.0},
                       x[k].data(), dx[k].data(), nullptr, nullptr};
    if (normalizations[k] == kNone) continue;
    block.branch[k].dweight = dweight[k].data(), block.branch[k].dbias = dbias[k].data();
  }
  std::vector<double> all{double(join_forward<T>(a) + join_backward<T>(a))};
  for (T value : y) all.push_back(double(widen(value)));
  for (const auto& values : dx)
    for (T value : values) all.push_back(double(widen(value)));
  for (const auto* lists : {&dweight, &dbias})
    for (const auto& values : *lists)
      for (A value : values) all.push_back(double(value));
  for (const auto* values : {&dw1, &db1, &dw2, &db2})
    for (A value : *values) all.push_back(double(value));
  return all;
}

int checks = 0, failures = 0;

// The bounds are loose: the numbers are checked by the Python tests, here they show a crossed buffer.
void compare(const char* type, const std::vector<double>& found,
             const std::vector<double>& expected, double tolerance) {
  ++checks;
  for (size_t i = 0; i < found.size(); ++i)
    if (!(std::abs(found[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])))) {
      std::printf("%s: result %zu is %g instead of %g\n", type, i, found[i], expected[i]);
      ++failures;
      return;
    }
}

}  // namespace

int main() {
  if (SENET_VECTOR_BYTES > 16 && !processor_has_avx2()) {
    std::puts("this processor has no AVX2");
    return 77;
  }
  const Shape shapes[] = {{2, 21, 35, 5}, {3, 16, 9, 4}, {1, 33, 70, 17}, {4, 64, 1, 16}, {3, 3, 131, 2}};
  for (const Shape& s : shapes)
    for (int normalization : {kNone, kRunningStatistics, kBatchStatistics})
      for (int shortcut : {kNoShortcut, kPlainShortcut, kNormalizedShortcut})
        for (int flags = 0; flags < 8; ++flags) {
          if (shortcut == kNormalizedShortcut && normalization == kNone) continue;
          const auto expected =
              run<double>(s, normalization, shortcut, flags & 1, flags & 2, flags & 4, flags % 5);
          const auto as = [&](auto one) {
            return run<decltype(one)>(s, normalization, shortcut, flags & 1, flags & 2, flags & 4,
                                      flags % 5);
          };
          compare("float32", as(float()), expected, 1e-3);
          compare("bfloat16", as(bfloat16()), expected, 0.05);
        }
  const std::vector<int> kinds[] = {
      {kBatchStatistics, kNone, kBatchStatistics, kRunningStatistics},
      {kRunningStatistics, kNone, kNone, kRunningStatistics}};
  for (const Shape& s : shapes)
    for (const auto& normalizations : kinds)
      for (int flags = 0; flags < 8; ++flags) {
        const auto as = [&](auto one) {
          return run_join<decltype(one)>(s, normalizations, flags & 1, flags & 2, flags % 5);
        };
        const auto expected = as(double());
        compare("join, float32", as(float()), expected, 1e-3);
        compare("join, bfloat16", as(bfloat16()), expected, 0.05);
      }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
