"""What the feed-forward kernels share: activations with their derivatives in float32, and the matrix product."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.blocks import load_block

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))  # exp overflows to inf, which still gives 0


@triton.jit
def activation_and_slope(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative at `x`; what the caller does not use is never computed.

    GELU by erf or tanh, quick GELU (Hendrycks and Gimpel, 2016), SiLU (the same), ReLU, squared ReLU (So et al.,
    Primer, 2021), or nothing.
    """
    value = x
    slope = tl.full(x.shape, 1.0, tl.float32)
    if ACTIVATION == "gelu":  # x Phi(x), Phi(x) + x phi(x)
        cdf = 0.5 + 0.5 * tl.math.erf(x * _SQRT_HALF)
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        # From 10 on the hyperbolic tangent is 1, while the square of a large x would overflow and give 0 * inf.
        near = tl.minimum(tl.maximum(x, -10.0), 10.0)
        square = near * near
        cdf = _sigmoid((near + near * square * _CUBIC) * (2.0 * _SQRT_2_OVER_PI))  # (1 + tanh(a)) / 2 = sigmoid(2 a)
        value = x * cdf
        slope = cdf + x * cdf * (1.0 - cdf) * (1.0 + square * (3.0 * _CUBIC)) * (2.0 * _SQRT_2_OVER_PI)
    elif ACTIVATION == "quick_gelu":
        cdf = _sigmoid(x * _QUICK)
        value = x * cdf
        slope = cdf * (1.0 + x * _QUICK * (1.0 - cdf))
    elif ACTIVATION == "silu":
        cdf = _sigmoid(x)
        value = x * cdf
        slope = cdf * (1.0 + x * (1.0 - cdf))
    elif ACTIVATION == "relu":
        value = tl.where(x < 0.0, 0.0, x)  # keeps a NaN, as torch does
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(x < 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def tile_position(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Block row and column of this program. Programs that run together share GROUP_M block rows, so that the
    second matrix is read from the L2 cache (Triton's matrix multiplication tutorial)."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    return group * GROUP_M + within % height, within // height


@triton.jit
def product_block(
    a_ptr, b_ptr, offs_m, offs_n, rows, columns, inner, stride_am, stride_bk, stride_bn,
    TWO: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of ``a @ b``, accumulated in float32; with TWO also that `columns` columns further on, else the same
    again. Rows of `a` have unit column stride."""
    offs_k = tl.arange(0, BLOCK_K)
    row = tl.minimum(offs_m, rows - 1).to(tl.int64)  # rows past the end repeat the last one and are never stored
    column_ok = (offs_n < columns)[None, :]
    a_ptrs = a_ptr + row[:, None] * stride_am + offs_k.to(tl.int64)[None, :]
    b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn
    to_second = tl.cast(columns, tl.int64) * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc2 = acc
    for start in range(0, inner, BLOCK_K):
        k_ok = start + offs_k < inner
        offset = tl.cast(start, tl.int64)
        a = load_block(a_ptrs + offset, True, k_ok[None, :], False, not EVEN_K)
        b = load_block(b_ptrs + offset * stride_bk, k_ok[:, None], column_ok, not EVEN_K, not EVEN_N)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
        if TWO:
            b2 = load_block(b_ptrs + (offset * stride_bk + to_second), k_ok[:, None], column_ok, not EVEN_K, not EVEN_N)
            acc2 = tl.dot(a, b2, acc2, input_precision=INPUT_PRECISION)
    if not TWO:
        acc2 = acc
    return acc, acc2


@triton.jit
def column_parts(x, HALVINGS: tl.constexpr):
    """A block's columns in 2**HALVINGS neighbouring parts: an epilogue then has fewer values in registers at once."""
    parts = (x,)
    for _ in tl.static_range(HALVINGS):
        halves = ()
        for i in tl.static_range(len(parts)):
            part = parts[i]
            low, high = tl.split(part.reshape(part.shape[0], 2, part.shape[1] // 2).permute(0, 2, 1))
            halves = halves + (low, high)  # type: ignore[assignment]
        parts = halves  # type: ignore[assignment]
    return parts
