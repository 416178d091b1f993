"""The feed-forward block's forward kernels: products with an epilogue, the epilogues alone, and their launchers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common import dropout
from ..common.blocks import dropout_keep, load_block
from ..common.plan import as_rows, launch, once, row_stride
from . import configs, whole
from .arguments import Options, Tensors, stored
from .blocks import activation_and_slope, column_parts, product_block, tile_position


@triton.jit
def _finish_block(
    hidden, up, bias_ptr, residual_ptr, seed_ptr, out_ptr, hidden_ptr, rows, stride_rm, columns,
    first_row, first_column, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of one block of the product: bias, activation, gating, dropout and residual, and its stores. What
    is None is left out."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = first_column + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        hidden += load_block(bias_ptr + offs_n, True, offs_n < columns, False, not EVEN_N).to(tl.float32)[None, :]
        if GATED:
            bias = load_block(bias_ptr + columns + offs_n, True, offs_n < columns, False, not EVEN_N)
            up += bias.to(tl.float32)[None, :]
    inside = (offs_m < rows)[:, None]
    if not EVEN_N:
        inside = inside & (offs_n < columns)[None, :]
    # From the block's first row on offsets fit 32 bits, which halves the registers they take.
    first = tl.cast(first_row, tl.int64)
    row = tl.arange(0, BLOCK_M)[:, None]
    if hidden_ptr is not None:
        width = 2 * columns if GATED else columns
        hidden_ptrs = hidden_ptr + first * width + (row * width + offs_n[None, :])
        tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(hidden_ptrs + columns, up.to(hidden_ptr.dtype.element_ty), mask=inside)
    if out_ptr is not None:
        out, _ = activation_and_slope(hidden, ACTIVATION)
        if GATED:
            out *= up
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, first_column, dropout_threshold, BLOCK_N)
            out = tl.where(keep, out * keep_scale, 0.0)
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + first * stride_rm + (row * stride_rm + offs_n[None, :])
            out += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + first * columns + (row * columns + offs_n[None, :])
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed_ptr"])
def linear_act_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, seed_ptr, out_ptr, hidden_ptr, rows,
    stride_xm, stride_wn, stride_wk, stride_rm, inner, columns, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    # One program computes a block of residual + dropout(activation(x W^T + bias)) and writes it once. Gated, it also
    # computes the block of the up projection, `columns` rows of W further on, which the activated gate multiplies
    # (Shazeer, "GLU variants improve Transformer", 2020): x is read once for both. For training it also writes
    # the pre-activation, from which the backward pass takes the activation's derivative.
    pid_m, pid_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden, up = product_block(
        x_ptr, weight_ptr, offs_m, offs_n, rows, columns, inner, stride_xm, stride_wk, stride_wn,
        GATED, EVEN_N, EVEN_K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # [BM, BN]  # fmt: skip
    hiddens, ups = column_parts(hidden, HALVINGS), column_parts(up, HALVINGS)
    PART_N: tl.constexpr = BLOCK_N // 2**HALVINGS
    for part in tl.static_range(2**HALVINGS):
        _finish_block(
            hiddens[part], ups[part], bias_ptr, residual_ptr, seed_ptr, out_ptr, hidden_ptr, rows, stride_rm, columns,
            pid_m * BLOCK_M, pid_n * BLOCK_N + part * PART_N, dropout_threshold, keep_scale,
            ACTIVATION, GATED, EVEN_N, BLOCK_M, PART_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "seed_ptr"])
def epilogue_kernel(
    product_ptr, residual_ptr, seed_ptr, out_ptr, rows, stride_rm, columns, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The epilogue alone, after the vendor's product: one program reads a block of the product (gated: of its two
    # halves) and of the residual once and writes residual + dropout(activation(product)) once.
    first_row, first_column = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1) * BLOCK_N
    row, offs_n = tl.arange(0, BLOCK_M)[:, None], first_column + tl.arange(0, BLOCK_N)
    inside = (first_row + row < rows) & (offs_n < columns)[None, :]
    width = 2 * columns if GATED else columns
    ptrs = product_ptr + first_row * width + (row * width + offs_n[None, :])
    hidden = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    up = hidden
    if GATED:
        up = tl.load(ptrs + columns, mask=inside, other=0.0).to(tl.float32)
    _finish_block(
        hidden, up, None, residual_ptr, seed_ptr, out_ptr, None, rows, stride_rm, columns, first_row, first_column,
        dropout_threshold, keep_scale, ACTIVATION, GATED, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def _layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dropout_p: float, activation: str,
    gated: bool, fused: bool, store_hidden: bool, store_out: bool,
) -> Callable[..., tuple[Any, Any]]:  # fmt: skip
    """A function of x, weight, bias, seed and residual: ``residual + dropout(activation(x W^T + bias))`` and the
    pre-activation, as far as they are stored; ``[rows, ...]``, or with the leading dimensions of `x`. `fused`: in one
    kernel, or in the vendor's product and a pointwise kernel."""
    (width, inner), of_x, index, flat = weight.shape, x.dtype, x.device.index, as_rows(x)
    columns, dtype = width // 2 if gated else width, of_x if residual is None else residual.dtype
    plain = all(t is None or t.is_contiguous() for t in (x, residual))
    fused = fused and columns > 0 and inner > 0
    in_place = not (fused or store_hidden or gated) and dtype == of_x  # nobody needs the pre-activation again
    fixed: dict[str, Any] = {"ACTIVATION": activation, "GATED": gated}
    numbers = (columns, dropout.threshold(dropout_p), dropout.keep_scale(dropout_p))
    strides = (0 if residual is None else row_stride(residual),)
    if fused:
        config = configs.FORWARD.choose(flat, gated, columns)
        block_m, across = config.block_m, triton.cdiv(columns, config.block_n)
        strides = (row_stride(x), *weight.stride(), *strides, inner)
        go = launch(linear_act_kernel, index, *strides, *numbers, **fixed, **configs.constants(config, flat, columns))
    else:
        block_m, block_n, num_warps = configs.pointwise_block(columns)
        across = triton.cdiv(columns, block_n)
        fixed |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps}
        go = launch(epilogue_kernel, index, *strides, *numbers, **fixed)

    def run(x: Tensor, weight: Tensor, bias: Any, seed: Any, residual: Any = None) -> tuple[Any, Any]:
        if not plain:
            x, residual = as_rows(x), None if residual is None else as_rows(residual)
        if fused:
            rows = x.numel() // inner
            hidden = x.new_empty((rows, width)) if store_hidden else None
        else:
            hidden = F.linear(x if in_place else as_rows(x), weight, bias)
            rows = hidden.numel() // width if width else hidden.shape[0]
        out = hidden if in_place else None
        if store_out and not in_place:
            out = x.new_empty((rows, columns), dtype=dtype)
        if rows and fused:
            go(-(-rows // block_m) * across, 1, x, weight, bias, residual, seed, out, hidden, rows)
        elif rows and columns and store_out:
            go(-(-rows // block_m), across, hidden, residual, seed, out, rows)
        return out, hidden if store_hidden else None

    return run


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str,
    gated: bool, fused: bool | None, store_hidden: bool, store_out: bool = True,
) -> Callable[..., tuple[Any, Any]]:  # fmt: skip
    """A function of x, weight, bias and seed: ``dropout(activation(x W^T + bias))`` and with `store_hidden` the
    pre-activation; without `store_out` only the latter, bit by bit the same. Of ``x [rows, in]`` both are 2-D."""
    fused = configs.use_fused(fused, "ffn_forward", as_rows(x), *weight.shape)
    return _layer(x, weight, bias, None, dropout_p, activation, gated, fused, store_hidden, store_out)


def output_forward(
    activated: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    dropout_p: float, fused: bool | None,
) -> Callable[..., Tensor]:  # fmt: skip
    """A function of activated, weight, bias, residual and seed: ``residual + dropout(activated W^T + bias)``,
    ``[rows, out]`` in the residual's dtype, of ``activated [rows, in]`` and ``residual [..., out]``.

    With neither residual nor dropout there is no epilogue, and the vendor's product does it all.
    """
    if residual is None and seed is None:
        return lambda activated, weight, bias, residual, seed: F.linear(activated, weight, bias)
    fused = configs.use_fused(fused, "ffn_output", activated, *weight.shape)
    layer = _layer(activated, weight, bias, residual, dropout_p, "none", False, fused, False, True)
    return lambda activated, weight, bias, residual, seed: layer(activated, weight, bias, seed, residual)[0]


def ffn_forward(like: Tensors, options: Options, needs: tuple[bool, ...]) -> Callable[..., tuple[Tensor, Any, Any]]:
    """A function of the tensors of a call: the output, and pre-activation and activation as far as they are stored."""
    x, weight1, weight2, residual, index = like.x, like.weight1, like.weight2, like.residual, like.x.device.index
    p, out_p, activation, gated, fused, *_ = options
    (store_hidden, store_activated), d_model = stored(options, needs), weight1.shape[1]
    first = linear_act_forward(*like[:3], like.seed, p, activation, gated, fused, store_hidden)
    second = once(lambda h, w, b, r, s: output_forward(h, w, b, r, s, out_p, fused))
    config, units = None, gpu.compute_units(index)
    at_once: Any = None
    if (
        not (store_hidden or store_activated or gated or p or out_p) and fused is not False
        and (residual is None or residual.dtype == x.dtype)
    ):  # fmt: skip
        config = whole.serving(x, weight1, weight2, gpu.architecture(index))
    if config is not None:
        at_once = whole.whole_ffn(*like[:6], activation, config)

    def run(
        x: Tensor, weight1: Tensor, bias1: Any, weight2: Tensor, bias2: Any, residual: Any, seed: Any, out_seed: Any
    ) -> tuple[Tensor, Any, Any]:
        if config is not None and whole.fills(x.numel() // d_model, config, units):
            return at_once(x, weight1, bias1, weight2, bias2, residual), None, None
        activated, hidden = first(as_rows(x) if needs else x, weight1, bias1, seed)
        out = second(activated, weight2, bias2, residual, out_seed)
        return with_rows_of(x, out), hidden, activated if store_activated else None

    return run


def with_rows_of(x: Tensor, out: Tensor) -> Tensor:
    """`out` ``[rows, n]``, which nothing else holds, as ``[..., n]`` with the leading dimensions of `x`; no view, since
    autograd lets nobody change a view that a function returns."""
    return out if x.dim() == out.dim() else out.resize_(*x.shape[:-1], out.shape[1])
