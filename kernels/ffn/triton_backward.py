"""The pre-activation's gradient: a matrix product with the activation's derivative in its epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import dropout, launch
from ..common.triton_blocks import dropout_keep
from .triton_blocks import activation_derivative
from .triton_forward import CONFIGS, GROUP_M, product_block, tile_position


@triton.jit(do_not_specialize=["rows"])
def hidden_gradient_kernel(
    dout_ptr, weight_ptr, hidden_ptr, seed_ptr, dhidden_ptr,
    stride_dm, stride_dk, stride_wk, stride_wn, rows, columns, inner, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # One program computes a block of dropout(dout W2) * activation'(hidden): it reads its block of the saved
    # pre-activation once and writes the gradient once; the activation's own gradient never reaches memory.
    pid_m, pid_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    grad = product_block(
        dout_ptr, weight_ptr, offs_m, offs_n, rows, columns, inner, stride_dm, stride_dk, stride_wk, stride_wn,
        EVEN_K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # [BM, BN]  # fmt: skip
    inside = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * columns + offs_n[None, :]
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, dropout_threshold, BLOCK_N)
        grad = tl.where(keep, grad * keep_scale, 0.0)
    hidden = tl.load(hidden_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad *= activation_derivative(hidden, ACTIVATION)
    tl.store(dhidden_ptr + offsets, grad.to(dhidden_ptr.dtype.element_ty), mask=inside)


def hidden_gradient(
    dout: Tensor, weight2: Tensor, hidden: Tensor, seed: Tensor | None, dropout_p: float, activation: str
) -> Tensor:
    """Launch the kernel on ``dout [rows, out]``, ``weight2 [out, hidden]`` and ``hidden [rows, hidden]``."""
    rows, inner = dout.shape
    columns = weight2.shape[1]
    dhidden = torch.empty_like(hidden)
    if dhidden.numel() == 0:
        return dhidden
    config = CONFIGS[dout.element_size()]
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)
    with launch.on_device_of(dout):
        hidden_gradient_kernel[grid](
            dout, weight2, hidden, dhidden if seed is None else seed, dhidden, *dout.stride(), *weight2.stride(),
            rows, columns, inner, dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            ACTIVATION=activation, DROPOUT=seed is not None, EVEN_K=inner % config.block_k == 0,
            INPUT_PRECISION=launch.input_precision(dout),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
            num_warps=config.num_warps, num_stages=config.num_stages, **launch.COMPILE_OPTIONS,
        )  # fmt: skip
    return dhidden
