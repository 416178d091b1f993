"""The activations and their derivatives, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(x):
    # exp overflows to inf for large x, which still gives 1.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """GELU (Hendrycks and Gimpel, 2016) exact or by tanh, ReLU, or nothing."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1.0 + _tanh((x + x * x * x * _CUBIC) * _SQRT_2_OVER_PI))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # keeps a NaN, as torch does
    return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at `x`."""
    if ACTIVATION == "gelu":  # Phi(x) + x phi(x)
        slope = 0.5 * (1.0 + tl.math.erf(x * _SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        t = _tanh((x + x * x * x * _CUBIC) * _SQRT_2_OVER_PI)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (1.0 + x * x * (3.0 * _CUBIC)) * _SQRT_2_OVER_PI
    elif ACTIVATION == "relu":
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope
