// The transforms of Winograd's F(4x4, 3x3) for all three passes, see ../winograd.h.
//
//   forward:   y  = A'[(G w G') * (B' x B)]A
//   weights:   dw = G'[sum over tiles of (B' x B) * (A y' A')]G
#pragma once

#include "../winograd.h"
#include "tiles.h"

namespace senet {
namespace {

// Outputs of a tile along one axis, inputs that they take, and products of a tile ("taps").
constexpr int kOut = 4, kPatch = kOut + 2;
constexpr int64_t kTaps = kPatch * kPatch;

constexpr float kAAA = kA * kAA, kBBB = kB * kBB;
constexpr float kOfA = -1.0f / 1.5f, kOfB = 1.0f / 6.0f;  // 1 / (2 aa (aa - bb)), 1 / (2 bb (bb - aa))

// A'm, Ag, Gw, G'm along one axis; B'd is to_products.
SENET_INLINE void to_outputs(const V* p, V* out) {
  const V even_a = p[1] + p[2], odd_a = p[1] - p[2], even_b = p[3] + p[4], odd_b = p[3] - p[4];
  out[0] = p[0] + even_a + even_b;
  out[1] = kA * odd_a + kB * odd_b;
  out[2] = kAA * even_a + kBB * even_b;
  out[3] = kAAA * odd_a + kBBB * odd_b + p[5];
}
SENET_INLINE void of_outputs(const V* g, V* out) {
  const V even_a = g[0] + kAA * g[2], odd_a = kA * g[1] + kAAA * g[3];
  const V even_b = g[0] + kBB * g[2], odd_b = kB * g[1] + kBBB * g[3];
  out[0] = g[0];
  at_points(even_a, odd_a, even_b, odd_b, out + 1);
  out[5] = g[3];
}
SENET_INLINE void of_weights(const V* w, V* out) {
  const V even_a = (w[0] + kAA * w[2]) * kOfA, odd_a = w[1] * (kA * kOfA);
  const V even_b = (w[0] + kBB * w[2]) * kOfB, odd_b = w[1] * (kB * kOfB);
  out[0] = w[0];
  at_points(even_a, odd_a, even_b, odd_b, out + 1);
  out[5] = w[2];
}
SENET_INLINE void to_weights(const V* p, V* out) {
  const V even_a = (p[1] + p[2]) * kOfA, odd_a = (p[1] - p[2]) * (kA * kOfA);
  const V even_b = (p[3] + p[4]) * kOfB, odd_b = (p[3] - p[4]) * (kB * kOfB);
  out[0] = p[0] + even_a + even_b;
  out[1] = odd_a + odd_b;
  out[2] = kAA * even_a + kBB * even_b + p[5];
}

// Both axes of kFrom x kFrom vectors at(i, j): calls put(i, j, vector) for kTo x kTo of them.
template <int kFrom, int kTo, class At, class Axis, class Put>
SENET_INLINE void both_axes(const At& at, const Axis& axis, const Put& put) {
  V half[kTo * kFrom];
  SENET_UNROLL(6)
  for (int j = 0; j < kFrom; ++j) {
    V in[kFrom], out[kTo];
    SENET_UNROLL(6)
    for (int i = 0; i < kFrom; ++i) in[i] = at(i, j);
    axis(in, out);
    SENET_UNROLL(6)
    for (int i = 0; i < kTo; ++i) half[i * kFrom + j] = out[i];
  }
  SENET_UNROLL(6)
  for (int i = 0; i < kTo; ++i) {
    V out[kTo];
    axis(half + i * kFrom, out);
    SENET_UNROLL(6)
    for (int j = 0; j < kTo; ++j) put(i, j, out[j]);
  }
}

// Where the taps of a patch go, `stride` apart.
SENET_INLINE auto taps_at(float* to, int64_t stride) {
  return [=](int i, int j, V value) {
    std::memcpy(to + (kPatch * i + j) * stride, &value, sizeof(V));
  };
}

#define SENET_AXIS(name) [](const V* in, V* out) { name(in, out); }
template <class At, class Put>
SENET_INLINE void to_products_2d(const At& at, const Put& put) {
  both_axes<kPatch, kPatch>(at, SENET_AXIS(to_products), put);
}
template <class At, class Put>
SENET_INLINE void to_outputs_2d(const At& at, const Put& put) {
  both_axes<kPatch, kOut>(at, SENET_AXIS(to_outputs), put);
}
template <class At, class Put>
SENET_INLINE void of_outputs_2d(const At& at, const Put& put) {
  both_axes<kOut, kPatch>(at, SENET_AXIS(of_outputs), put);
}
template <class At, class Put>
SENET_INLINE void of_weights_2d(const At& at, const Put& put) {
  both_axes<3, kPatch>(at, SENET_AXIS(of_weights), put);
}
template <class At, class Put>
SENET_INLINE void to_weights_2d(const At& at, const Put& put) {
  both_axes<kPatch, 3>(at, SENET_AXIS(to_weights), put);
}
#undef SENET_AXIS

}  // namespace
}  // namespace senet
