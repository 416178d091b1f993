"""Matrix product with bias, activation and dropout in its epilogue, and its launcher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import dropout, launch
from ..common.triton_blocks import dropout_keep, load_block
from .triton_blocks import activate


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
    a_ptr, b_ptr, offs_m, offs_n, rows, columns, inner, stride_am, stride_ak, stride_bk, stride_bn,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of ``a @ b``, accumulated in float32."""
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am + offs_k.to(tl.int64)[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k_ok = start + offs_k < inner
        offset = tl.cast(start, tl.int64)
        a = load_block(a_ptrs + offset * stride_ak, (offs_m < rows)[:, None], k_ok[None, :], True, not EVEN_K)
        b = load_block(b_ptrs + offset * stride_bk, k_ok[:, None], (offs_n < columns)[None, :], not EVEN_K, True)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_act_kernel(
    x_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr, hidden_ptr,
    stride_xm, stride_xk, stride_wn, stride_wk, rows, columns, inner, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, STORE_HIDDEN: tl.constexpr,
    EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # One program computes a block of dropout(activation(x W^T + bias)) and writes it once; for training it
    # also writes the pre-activation, from which the backward pass takes the activation's derivative.
    pid_m, pid_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden = product_block(
        x_ptr, weight_ptr, offs_m, offs_n, rows, columns, inner, stride_xm, stride_xk, stride_wk, stride_wn,
        EVEN_K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # [BM, BN]  # fmt: skip
    if HAS_BIAS:
        hidden += tl.load(bias_ptr + offs_n, mask=offs_n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    if STORE_HIDDEN:
        tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
    out = activate(hidden, ACTIVATION)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, dropout_threshold, BLOCK_N)
        out = tl.where(keep, out * keep_scale, 0.0)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


class LinearConfig(NamedTuple):
    """Block sizes and launch options of a matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By element size. 48 KiB of shared memory at most, so that every supported chip can launch them.
CONFIGS = {2: LinearConfig(128, 128, 32, 8, 3), 4: LinearConfig(64, 64, 32, 4, 2)}
GROUP_M = 8


def as_matrix(x: Tensor) -> Tensor:
    """`x` as ``[rows, width]``; a view where its memory order allows."""
    return x.reshape(-1, x.shape[-1])


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, seed: Tensor | None, dropout_p: float,
    store_hidden: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Launch the kernel on ``x [rows, in]`` and ``weight [out, in]``: the result and maybe the pre-activation."""
    rows, inner = x.shape
    columns = weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    hidden = torch.empty_like(out) if store_hidden else None
    if out.numel() == 0:
        return out, hidden
    config = CONFIGS[x.element_size()]
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)
    with launch.on_device_of(x):
        linear_act_kernel[grid](
            x, weight, out if bias is None else bias.contiguous(), out if seed is None else seed, out,
            out if hidden is None else hidden, *x.stride(), *weight.stride(), rows, columns, inner,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            ACTIVATION=activation, HAS_BIAS=bias is not None, DROPOUT=seed is not None, STORE_HIDDEN=store_hidden,
            EVEN_K=inner % config.block_k == 0, INPUT_PRECISION=launch.input_precision(x),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch.COMPILE_OPTIONS,
        )  # fmt: skip
    return out, hidden


def ffn_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, seed: Tensor | None,
    dropout_p: float, activation: str, save: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Both products: the output, the pre-activation (if `save`) and the dropped-out activation."""
    activated, hidden = linear_act(as_matrix(x), weight1, bias1, activation, seed, dropout_p, save)
    out, _ = linear_act(activated, weight2, bias2, "none", None, 0.0, False)
    return out.view(*x.shape[:-1], weight2.shape[0]), hidden, activated
