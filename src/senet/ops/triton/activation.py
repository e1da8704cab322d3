"""The activations as Triton functions: value and derivative, elementwise."""

# No `from __future__ import annotations`: Triton reads the annotation of a constexpr.

import triton
import triton.language as tl


@triton.jit
def sigmoid(t):
    """1 / (1 + exp(-t))."""
    return 1 / (1 + tl.exp(-t))


@triton.jit
def normal(u):
    """The normal distribution function."""
    return 0.5 * (1 + tl.math.erf(u * 0.70710678118654752440))


@triton.jit
def activate(u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """One of `senet.ops.BRANCH_ACTIVATIONS` of u; a NaN stays one."""
    if ACTIVATION == "relu":
        return tl.where(u <= 0, 0, u)
    if ACTIVATION == "relu6":
        return tl.where(u <= 0, 0, tl.where(u > 6, 6, u))
    if ACTIVATION == "leaky_relu":
        return tl.where(u > 0, u, u * SLOPE)
    if ACTIVATION == "silu":
        return u * sigmoid(u)
    if ACTIVATION == "hardswish":
        t = u + 3
        return u * (tl.where(t <= 0, 0, tl.where(t > 6, 6, t)) / 6)
    if ACTIVATION == "gelu":
        return u * normal(u)
    return u


@triton.jit
def derivative(u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The activation's derivative at u."""
    one = tl.where(u == u, 1, 1).to(u.dtype)
    if ACTIVATION == "relu":
        return tl.where(u <= 0, 0, one)
    if ACTIVATION == "relu6":
        return tl.where((u <= 0) | (u >= 6), 0, one)
    if ACTIVATION == "leaky_relu":
        return tl.where(u > 0, one, one * SLOPE)
    if ACTIVATION == "silu":
        s = sigmoid(u)
        return s + u * s * (1 - s)
    if ACTIVATION == "hardswish":
        return tl.where(u <= -3, 0, tl.where(u >= 3, one, u / 3 + 0.5))
    if ACTIVATION == "gelu":
        return normal(u) + u * tl.exp(u * u * -0.5) * 0.39894228040143267794
    return one


@triton.jit
def through(gradient, slope, ACTIVATION: tl.constexpr):
    """A gradient times the derivative; where that is zero by definition, whatever it is."""
    if ACTIVATION == "linear":
        return gradient
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        return tl.where(slope == 0, 0, gradient)
    return gradient * slope
