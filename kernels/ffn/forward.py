"""The feed-forward block's forward kernels: products with an epilogue, the epilogues alone, and their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common import dropout
from ..common.blocks import dropout_keep
from . import configs
from .blocks import activation_and_slope, column_parts, product_block, tile_position
from .eager import as_matrix


@triton.jit
def _load_bias(bias_ptr, offs_n, columns, EVEN_N: tl.constexpr):
    if EVEN_N:
        return tl.load(bias_ptr + offs_n).to(tl.float32)[None, :]
    else:
        return tl.load(bias_ptr + offs_n, mask=offs_n < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _finish_block(
    hidden, up, bias_ptr, residual_ptr, seed_ptr, out_ptr, hidden_ptr, stride_rm, rows, columns,
    first_row, first_column, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr, STORE_HIDDEN: tl.constexpr, STORE_OUT: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue: bias, activation, gating, dropout and residual of one block of the product, and its stores."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_n = first_column + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        hidden += _load_bias(bias_ptr, offs_n, columns, EVEN_N)
        if GATED:
            up += _load_bias(bias_ptr + columns, offs_n, columns, EVEN_N)
    inside = (offs_m < rows)[:, None]
    if not EVEN_N:
        inside = inside & (offs_n < columns)[None, :]
    # From the block's first row on offsets fit 32 bits, which halves the registers they take.
    first = tl.cast(first_row, tl.int64)
    row = tl.arange(0, BLOCK_M)[:, None]
    if STORE_HIDDEN:
        width = 2 * columns if GATED else columns
        hidden_ptrs = hidden_ptr + first * width + (row * width + offs_n[None, :])
        tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(hidden_ptrs + columns, up.to(hidden_ptr.dtype.element_ty), mask=inside)
    if STORE_OUT:
        out, _ = activation_and_slope(hidden, ACTIVATION)
        if GATED:
            out *= up
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, first_column, dropout_threshold, BLOCK_N)
            out = tl.where(keep, out * keep_scale, 0.0)
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + first * stride_rm + (row * stride_rm + offs_n[None, :])
            out += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        out_ptrs = out_ptr + first * columns + (row * columns + offs_n[None, :])
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed_ptr"])
def linear_act_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, seed_ptr, out_ptr, hidden_ptr,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_rm, rows, columns, inner, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DROPOUT: tl.constexpr, STORE_HIDDEN: tl.constexpr, STORE_OUT: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVINGS: tl.constexpr,
):  # fmt: skip
    # One program computes a block of residual + dropout(activation(x W^T + bias)) and writes it once. Gated, it also
    # computes the block of the up projection, `columns` rows of W further on, which the activated gate multiplies
    # (Shazeer, "GLU variants improve Transformer", 2020): x is read once for both. For training it also writes
    # the pre-activation, from which the backward pass takes the activation's derivative.
    pid_m, pid_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden, up = product_block(
        x_ptr, weight_ptr, offs_m, offs_n, rows, columns, inner, stride_xm, stride_xk, stride_wk, stride_wn,
        GATED, EVEN_N, EVEN_K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # [BM, BN]  # fmt: skip
    hiddens, ups = column_parts(hidden, HALVINGS), column_parts(up, HALVINGS)
    PART_N: tl.constexpr = BLOCK_N // 2**HALVINGS
    for part in tl.static_range(2**HALVINGS):
        _finish_block(
            hiddens[part], ups[part], bias_ptr, residual_ptr, seed_ptr, out_ptr, hidden_ptr, stride_rm, rows, columns,
            pid_m * BLOCK_M, pid_n * BLOCK_N + part * PART_N, dropout_threshold, keep_scale,
            ACTIVATION, GATED, HAS_BIAS, HAS_RESIDUAL, DROPOUT, STORE_HIDDEN, STORE_OUT, EVEN_N, BLOCK_M, PART_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "seed_ptr"])
def activation_kernel(
    hidden_ptr, seed_ptr, out_ptr, rows, columns, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The first product's epilogue alone, after the vendor's product: one program reads a block of the pre-activation
    # (gated: its two halves) once and writes dropout(activation(hidden)) (times the up projection) once.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    ptrs = hidden_ptr + offs_m[:, None] * (2 * columns if GATED else columns) + offs_n[None, :]
    out, _ = activation_and_slope(tl.load(ptrs, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        out *= tl.load(ptrs + columns, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, tl.program_id(1) * BLOCK_N, dropout_threshold, BLOCK_N)
        out = tl.where(keep, out * keep_scale, 0.0)
    out_ptrs = out_ptr + offs_m[:, None] * columns + offs_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed_ptr"])
def dropout_add_kernel(
    product_ptr, residual_ptr, seed_ptr, out_ptr, stride_rm, rows, columns, dropout_threshold, keep_scale,
    HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The second product's epilogue alone: one program reads a block of the product and of the residual once and
    # writes residual + dropout(product) once.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    offsets = offs_m[:, None] * columns + offs_n[None, :]
    out = tl.load(product_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, tl.program_id(1) * BLOCK_N, dropout_threshold, BLOCK_N)
        out = tl.where(keep, out * keep_scale, 0.0)
    if HAS_RESIDUAL:
        r_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :]
        out += tl.load(r_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


def as_rows(x: Tensor) -> Tensor:
    """`x` as ``[rows, width]`` with unit column stride; a view unless its memory order forbids."""
    flat = as_matrix(x)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _vendor_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` by PyTorch, whose product takes the bias in."""
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _launch_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, dropout_p: float,
    activation: str, gated: bool, out: Tensor | None, hidden: Tensor | None,
) -> None:  # fmt: skip
    """Launch the product with its epilogue; it fills `out` and `hidden`, as far as they are given."""
    rows, inner = x.shape
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    any_out = out if out is not None else hidden
    assert any_out is not None
    config = configs.FORWARD.choose(x, gated, columns)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)
    with gpu.on_device_of(x):
        linear_act_kernel[grid](
            x, weight, any_out if bias is None else bias.contiguous(), any_out if residual is None else residual,
            any_out if seed is None else seed, any_out, any_out if hidden is None else hidden,
            *x.stride(), *weight.stride(), 0 if residual is None else residual.stride(0), rows, columns, inner,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            ACTIVATION=activation, GATED=gated, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            DROPOUT=seed is not None, STORE_HIDDEN=hidden is not None, STORE_OUT=out is not None,
            EVEN_N=columns % config.block_n == 0, EVEN_K=inner % config.block_k == 0,
            INPUT_PRECISION=gpu.input_precision(x),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=configs.GROUP_M,
            HALVINGS=config.halvings, num_warps=config.num_warps, num_stages=config.num_stages,
            **gpu.COMPILE_OPTIONS,
        )  # fmt: skip


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str,
    gated: bool, fused: bool | None, store_hidden: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``dropout(activation(x W^T + bias))`` of ``x [rows, in]``, and if asked for the pre-activation."""
    rows = x.shape[0]
    width = weight.shape[0]
    columns = width // 2 if gated else width
    if rows == 0 or columns == 0:
        out = x.new_empty((rows, columns))
        return out, x.new_empty((rows, width)) if store_hidden else None
    if configs.use_fused(fused, "ffn_forward", x, width, x.shape[1]):
        out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
        hidden = torch.empty((rows, width), dtype=x.dtype, device=x.device) if store_hidden else None
        _launch_product(x, weight, bias, None, seed, dropout_p, activation, gated, out, hidden)
        return out, hidden
    hidden = _vendor_product(x, weight, bias)
    # In place where nobody needs the pre-activation again.
    in_place = not (store_hidden or gated)
    out = hidden if in_place else torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    block_m, block_n, num_warps = configs.pointwise_block(columns)
    with gpu.on_device_of(x):
        activation_kernel[(triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))](
            hidden, hidden if seed is None else seed, out, rows, columns,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            ACTIVATION=activation, GATED=gated, DROPOUT=seed is not None, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return out, hidden if store_hidden else None


def pre_activation(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, fused: bool | None) -> Tensor:
    """The pre-activation again, by the way that the forward pass went, so that its bits are the same."""
    rows, width = x.shape[0], weight.shape[0]
    if rows == 0 or width == 0 or not configs.use_fused(fused, "ffn_forward", x, width, x.shape[1]):
        return _vendor_product(x, weight, bias)
    hidden = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    _launch_product(x, weight, bias, None, None, 0.0, "none", gated, None, hidden)
    return hidden


def output_forward(
    activated: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    dropout_p: float, fused: bool | None,
) -> Tensor:  # fmt: skip
    """``residual + dropout(activated W^T + bias)``, ``[rows, out]`` in the residual's dtype.

    With neither residual nor dropout there is no epilogue, and the vendor's product does it all.
    """
    rows, columns = activated.shape[0], weight.shape[0]
    if residual is None and seed is None:
        return _vendor_product(activated, weight, bias)
    dtype = activated.dtype if residual is None else residual.dtype
    flat_r = None if residual is None else as_rows(residual)
    if rows == 0 or columns == 0:
        return torch.empty((rows, columns), dtype=dtype, device=activated.device)
    if configs.use_fused(fused, "ffn_output", activated, columns, activated.shape[1]):
        out = torch.empty((rows, columns), dtype=dtype, device=activated.device)
        _launch_product(activated, weight, bias, flat_r, seed, dropout_p, "none", False, out, None)
        return out
    product = _vendor_product(activated, weight, bias)
    out = product if dtype == product.dtype else torch.empty((rows, columns), dtype=dtype, device=product.device)
    block_m, block_n, num_warps = configs.pointwise_block(columns)
    with gpu.on_device_of(product):
        dropout_add_kernel[(triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))](
            product, product if flat_r is None else flat_r, product if seed is None else seed, out,
            0 if flat_r is None else flat_r.stride(0), rows, columns,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            HAS_RESIDUAL=flat_r is not None, DROPOUT=seed is not None, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return out


def ffn_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, residual: Tensor | None,
    seed: Tensor | None, out_seed: Tensor | None, dropout_p: float, out_dropout_p: float, activation: str,
    gated: bool, fused: bool | None, store_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Both products: the output, the pre-activation (if asked for) and the dropped-out activation."""
    activated, hidden = linear_act_forward(
        as_matrix(x), weight1, bias1, seed, dropout_p, activation, gated, fused, store_hidden
    )
    out = output_forward(activated, weight2, bias2, residual, out_seed, out_dropout_p, fused)
    return out.view(*x.shape[:-1], weight2.shape[0]), hidden, activated
