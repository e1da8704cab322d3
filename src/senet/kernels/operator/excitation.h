// The excitation of a tail or a join, forward and backward, for a group of images at a time.
#pragma once

#include "../gate.h"
#include "activation.h"
#include "norm.h"

namespace senet {
namespace {

// Sizes and parameters of a gate, what its forward pass leaves, and where its gradients go. `active` is
// what the hidden activation gives: for kActRelu in the place of `hidden`, what it sees, else (N, H) of
// scratch.
template <class A>
struct Excitation {
  int64_t N, C, H;
  int gate;
  const A *w1, *b1, *w2, *b2, *squeezed;
  A *hidden, *gates, *dw1, *db1, *dw2, *db2;
  int64_t hidden_activation;
  A* active;
};

template <class A, class Arguments>
Excitation<A> excitation_of(const Arguments& a) {
  const auto in = [](const void* p) { return static_cast<const A*>(p); };
  const auto out = [](void* p) { return static_cast<A*>(p); };
  return {a.N,        a.C,         a.H,        int(a.gate), in(a.w1),   in(a.b1),   in(a.w2),  in(a.b2),
          in(a.squeezed), out(a.hidden), out(a.gates), out(a.dw1),  out(a.db1), out(a.dw2), out(a.db2),
          kActRelu,   out(a.hidden)};
}

// active = the activation of `count` numbers of the hidden layer; dhidden (or null) times its slope.
template <class A>
void activate_hidden(const Excitation<A>& e, int64_t begin, int64_t count, A* dhidden) {
  A* active = e.active + begin;
  const A* hidden = e.hidden + begin;
  with_activation(e.hidden_activation, [&](auto activation) {
    for (int64_t i = 0; i < count; ++i) {
      Vector<A, 1> v;
      const Vector<A, 1> slope = derivative<activation(), 1, A>(splat<A, 1>(hidden[i]), A(0), v);
      if (active != hidden || !dhidden) active[i] = v[0];
      if (dhidden) dhidden[i] = through<activation()>(splat<A, 1>(dhidden[i]), slope)[0];
    }
  });
}

// Gates of images [first, last) from their squeeze z (N, C); all threads take part.
template <class A>
void excite(const Member& member, const Excitation<A>& e, const A* z, int64_t first, int64_t last,
            const Share& channels, const Share& units) {
  const int64_t C = e.C, H = e.H, images = last - first;
  linear(z + first * C, e.w1, e.b1, e.hidden + first * H, images, H, C, units.begin, units.end);
  for (int64_t n = first; n < last; ++n)
    activate_hidden<A>(e, n * H + units.begin, units.end - units.begin, nullptr);
  member.barrier();
  linear(e.active + first * H, e.w2, e.b2, e.gates + first * C, images, C, H, channels.begin,
         channels.end);
  for (int64_t n = first; n < last; ++n)
    gate_forward(e.gates + n * C + channels.begin, channels.end - channels.begin, e.gate);
}

// What the backward pass computes of (N, C) size, and dhidden of (N, H): g1 and g2 are the sums of g'
// and g' (x - mean) per image and channel, t the gate's input, z the squeeze.
template <class A>
struct ExcitationBuffers {
  A *g1, *g2, *dt, *z, *dz, *dhidden;
};

// Back through the gate of images [first, last), from the gradient of s to that of the squeeze, b.dz;
// all threads take part.
template <class A>
void gate_backward(const Member& member, const Excitation<A>& e, const ExcitationBuffers<A>& b,
                   const Norm<A>& norm, int64_t first, int64_t last, const Share& channels,
                   const Share& units) {
  const int64_t C = e.C, H = e.H, images = last - first;
  for_blocks(norm, channels, [&](int64_t c, int64_t width, const NormBlock<A>& block) {
    for (int64_t n = first; n < last; ++n) {
      const A *g1 = b.g1 + n * C + c, *g2 = b.g2 + n * C + c;
      A* dt = b.dt + n * C + c;
      for (int64_t i = 0; i < width; ++i) dt[i] = block.scale[i] * g2[i] + block.shift[i] * g1[i];
      scale_by_slope(dt, e.gates + n * C + c, width, e.gate);
    }
  });
  member.barrier();
  A* dhidden = b.dhidden + first * H;
  combine(b.dt + first * C, C, 1, e.w2, dhidden, images, C, H, units.begin, units.end);
  for (int64_t n = 0; n < images; ++n)
    activate_hidden(e, (first + n) * H + units.begin, units.end - units.begin,
                    dhidden + n * H + units.begin);
  member.barrier();
  combine(dhidden, H, 1, e.w1, b.dz + first * C, images, H, C, channels.begin, channels.end);
}

// to[i] = the sum over N rows of `width` numbers, for the part `share`; nothing where `to` is null.
template <class A>
void sum_images(const A* from, int64_t N, int64_t width, const Share& share, A* to) {
  if (!to) return;
  std::fill(to + share.begin, to + share.end, A(0));
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = share.begin; i < share.end; ++i) to[i] += from[n * width + i];
}

// Gradients of the gate's parameters, from all images at once: how these were grouped changes no bit.
template <class A>
void gate_parameters(const Excitation<A>& e, const ExcitationBuffers<A>& b, const Norm<A>& norm,
                     const Share& channels, const Share& units) {
  const int64_t N = e.N, C = e.C, H = e.H;
  sum_images(b.dt, N, C, channels, e.db2);
  sum_images(b.dhidden, N, H, units, e.db1);
  if (e.dw2)
    combine(b.dt + channels.begin, 1, C, e.active, e.dw2 + channels.begin * H,
            channels.end - channels.begin, N, H, 0, H);
  if (!e.dw1) return;
  fill_squeeze(norm, e.squeezed, C, 0, N, channels, b.z);
  combine(b.dhidden, 1, H, b.z, e.dw1, H, N, C, channels.begin, channels.end);
}

}  // namespace
}  // namespace senet
