"""The whole feed-forward block in one kernel, for narrow layers, and its launcher; docs/ffn_whole_block.md has the
evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.plan import as_rows, launch, row_stride
from .blocks import activation_and_slope


@triton.jit(do_not_specialize=["rows"])
def whole_ffn_kernel(
    x_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, residual_ptr, out_ptr, rows,
    stride_xm, stride_w1n, stride_w2n, stride_rm, hidden,
    ACTIVATION: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_M rows of activation(x W1^T + bias1) W2^T + bias2 (+ residual). It reads its rows of x
    # (and residual) and both weights once and writes its rows once; the hidden activation never reaches memory.
    # The width is CHUNKS blocks of BLOCK_D, so that 384 = 3 x 128 needs no padding. Inference only: no backward.
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row_ok = (offs_m < rows)[:, None]
    row = offs_m.to(tl.int64)[:, None]
    x, acc = (), ()
    for c in tl.static_range(CHUNKS):
        x = x + (tl.load(x_ptr + row * stride_xm + (c * BLOCK_D + offs_d)[None, :], mask=row_ok, other=0.0),)
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)
    for start in range(0, hidden, BLOCK_N):
        weight1 = weight1_ptr + (start + offs_n)[None, :] * stride_w1n + offs_d[:, None]  # [BD, BN]
        h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in tl.static_range(CHUNKS):
            h = tl.dot(x[c], tl.load(weight1 + c * BLOCK_D), h)
        if bias1_ptr is not None:
            h += tl.load(bias1_ptr + start + offs_n).to(tl.float32)[None, :]
        h, _ = activation_and_slope(h, ACTIVATION)
        h = h.to(x_ptr.dtype.element_ty)
        weight2 = weight2_ptr + offs_d[None, :] * stride_w2n + (start + offs_n)[:, None]  # [BN, BD]
        sums = ()
        for c in tl.static_range(CHUNKS):
            sums = sums + (tl.dot(h, tl.load(weight2 + c * BLOCK_D * stride_w2n), acc[c]),)
        acc = sums
    for c in tl.static_range(CHUNKS):
        columns = c * BLOCK_D + offs_d
        out = acc[c]
        if bias2_ptr is not None:
            out += tl.load(bias2_ptr + columns).to(tl.float32)[None, :]
        if residual_ptr is not None:
            out += tl.load(residual_ptr + row * stride_rm + columns[None, :], mask=row_ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * (CHUNKS * BLOCK_D) + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=row_ok)


class WholeConfig(NamedTuple):
    """Block sizes and launch options of the kernel."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


# By architecture and width; docs/ffn_whole_block.md says why there are no others.
CONFIGS = {
    ("sm_90", 128): WholeConfig(128, 64, 128, 8, 2),
    ("sm_90", 256): WholeConfig(128, 64, 256, 8, 2),
}
_LEAST_FILL = 0.85
"""How much of the chip's units programs must fill, in the last round of them too, on average: a program keeps its rows
to the end, where two products have columns to share out as well."""


def serving(x: Tensor, weight1: Tensor, weight2: Tensor, architecture: str) -> WholeConfig | None:
    """The configuration for tensors like these if the kernel takes them and its figures on `architecture` are better
    than two products', where rows fill the chip; else None."""
    d_hidden, d_model = weight1.shape
    config = CONFIGS.get((architecture, d_model))
    taken = (
        config is not None and x.element_size() == 2 and weight2.shape[0] == d_model
        and d_hidden % config.block_n == 0 and d_hidden >= 4 * d_model and weight1.stride(1) == weight2.stride(1) == 1
    )  # fmt: skip
    return config if taken else None


def fills(rows: int, config: WholeConfig, units: int) -> bool:
    """True if the programs for so many rows fill the chip's units."""
    programs = -(-rows // config.block_m)
    return programs >= _LEAST_FILL * units * max(-(-programs // units), 1)


def whole_ffn(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, residual: Tensor | None,
    activation: str, config: WholeConfig,
) -> Callable[..., Tensor]:  # fmt: skip
    """A function of tensors like these that launches the kernel; `x` and `residual` are ``[..., d_model]``."""
    d_hidden, d_model = weight1.shape
    strides = (row_stride(x), weight1.stride(0), weight2.stride(0), 0 if residual is None else row_stride(residual))
    go = launch(
        whole_ffn_kernel, x.device.index, *strides, d_hidden,
        ACTIVATION=activation, CHUNKS=d_model // config.block_d, BLOCK_D=config.block_d, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    def run(x: Tensor, weight1: Tensor, bias1: Any, weight2: Tensor, bias2: Any, residual: Any) -> Tensor:
        out = x.new_empty(x.shape)
        rows = x.numel() // d_model
        if rows:
            added = None if residual is None else as_rows(residual)
            go(-(-rows // config.block_m), 1, as_rows(x), weight1, bias1, weight2, bias2, added, out, rows)
        return out

    return run
