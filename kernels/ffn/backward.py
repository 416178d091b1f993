"""The feed-forward block's backward kernels: a product with the activation's derivative in its epilogue, the same
epilogue alone, the output dropout's pass, and their launchers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common import dropout
from ..common.blocks import dropout_keep
from ..common.column_sums import ColumnSums
from . import configs
from .blocks import activation_and_slope, column_parts, product_block, tile_position
from .eager import as_matrix
from .forward import as_rows, pre_activation


@triton.jit
def _hidden_gradient_block(
    grad, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, offs_m, offs_n, inside, first_row, first_column, columns,
    dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, STORE_ACTIVATED: tl.constexpr,
    STORE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """From the gradient of the dropped-out activation to that of the pre-activation, which is written and returned
    (gated: both halves), zero outside; maybe the activation again, for the second weight's gradient."""
    # From the block's first row on offsets fit 32 bits, which halves the registers they take.
    width = 2 * columns if GATED else columns
    row = tl.arange(0, grad.shape[0])[:, None]
    at = row * width + offs_n[None, :]
    hidden_ptr += first_row * width
    dhidden_ptr += first_row * width
    activated_ptr += first_row * columns
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = activation_and_slope(hidden, ACTIVATION)
    up = value
    if GATED:
        up = tl.load(hidden_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, first_column, dropout_threshold, grad.shape[1])
    if STORE_ACTIVATED:
        activated = value
        if GATED:
            activated *= up
        if DROPOUT:
            activated = tl.where(keep, activated * keep_scale, 0.0)
        tl.store(activated_ptr + row * columns + offs_n[None, :], activated.to(activated_ptr.dtype.element_ty), inside)
    if DROPOUT:
        grad = tl.where(keep, grad * keep_scale, 0.0)
    grad = tl.where(inside, grad, 0.0)
    dup = grad * value
    dhidden = grad * slope
    if GATED:
        dhidden *= up
    if STORE_GRADIENT:
        tl.store(dhidden_ptr + at, dhidden.to(dhidden_ptr.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(dhidden_ptr + at + columns, dup.to(dhidden_ptr.dtype.element_ty), mask=inside)
    return dhidden, dup


@triton.jit(do_not_specialize=["rows", "seed_ptr"])
def hidden_gradient_kernel(
    dout_ptr, weight_ptr, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, partial_ptr,
    stride_dm, stride_dk, stride_wk, stride_wn, rows, columns, inner, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, STORE_ACTIVATED: tl.constexpr,
    SUMS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HALVINGS: tl.constexpr,
):  # fmt: skip
    # One program computes a block of dhidden = dropout(dout W2) * activation'(hidden): it reads its block of the saved
    # pre-activation once and writes the gradient once; the activation's own gradient never reaches memory.
    # Gated, hidden = (gate, up): dgate = g up activation'(gate), dup = g activation(gate) with the same g.
    # The block's sums over its rows, its share of the bias's gradient, are one row of `partial`.
    pid_m, pid_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    grad, _ = product_block(
        dout_ptr, weight_ptr, offs_m, offs_n, rows, columns, inner, stride_dm, stride_dk, stride_wk, stride_wn,
        False, EVEN_N, EVEN_K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # [BM, BN]  # fmt: skip
    parts = column_parts(grad, HALVINGS)
    PART_N: tl.constexpr = BLOCK_N // 2**HALVINGS
    for part in tl.static_range(2**HALVINGS):
        first_column = pid_n * BLOCK_N + part * PART_N
        offs_n = first_column + tl.arange(0, PART_N)
        inside = (offs_m < rows)[:, None]
        if not EVEN_N:
            inside = inside & (offs_n < columns)[None, :]
        dhidden, dup = _hidden_gradient_block(
            parts[part], hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, offs_m, offs_n, inside,
            (pid_m * BLOCK_M).to(tl.int64), first_column, columns, dropout_threshold, keep_scale,
            ACTIVATION, GATED, DROPOUT, STORE_ACTIVATED, True,
        )  # fmt: skip
        if SUMS:
            sum_ptrs = partial_ptr + pid_m.to(tl.int64) * (2 * columns if GATED else columns) + offs_n
            tl.store(sum_ptrs, tl.sum(dhidden, 0), mask=offs_n < columns)
            if GATED:
                tl.store(sum_ptrs + columns, tl.sum(dup, 0), mask=offs_n < columns)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "seed_ptr"])
def activation_gradient_kernel(
    grad_ptr, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, partial_ptr,
    stride_gm, rows, columns, rows_per_program, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, DROPOUT: tl.constexpr, STORE_ACTIVATED: tl.constexpr,
    STORE_GRADIENT: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The same from a product that the vendor computed: one program walks over rows_per_program rows of BLOCK_N columns,
    # reads the product and the pre-activation once, writes the gradient once and its sums over rows at the end.
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = offs_n < columns
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums2 = sums
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = (offs_m < last)[:, None] & column_ok[None, :]
        grad = sums * 0.0
        if STORE_GRADIENT:
            grad_ptrs = grad_ptr + offs_m[:, None] * stride_gm + offs_n[None, :]
            grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
        dhidden, dup = _hidden_gradient_block(
            grad, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, offs_m, offs_n, inside, start,
            tl.program_id(1) * BLOCK_N, columns, dropout_threshold, keep_scale,
            ACTIVATION, GATED, DROPOUT, STORE_ACTIVATED, STORE_GRADIENT,
        )  # fmt: skip
        if SUMS:
            sums += dhidden
            if GATED:
                sums2 += dup
    if SUMS:
        sum_ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * columns if GATED else columns) + offs_n
        tl.store(sum_ptrs, tl.sum(sums, 0), mask=column_ok)
        if GATED:
            tl.store(sum_ptrs + columns, tl.sum(sums2, 0), mask=column_ok)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "seed_ptr"])
def output_gradient_kernel(
    dout_ptr, seed_ptr, dropped_ptr, partial_ptr,
    stride_dm, rows, columns, rows_per_program, dropout_threshold, keep_scale,
    SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The gradient of the second product from that of residual + dropout(product): one program walks over
    # rows_per_program rows of BLOCK_N columns, reads dout once, writes dropout(dout) once and its sums over rows, a
    # share of the second bias's gradient, at the end.
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = offs_n < columns
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = (offs_m < last)[:, None] & column_ok[None, :]
        grad = tl.load(dout_ptr + offs_m[:, None] * stride_dm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        keep = dropout_keep(tl.load(seed_ptr), offs_m, tl.program_id(1) * BLOCK_N, dropout_threshold, BLOCK_N)
        grad = tl.where(keep, grad * keep_scale, 0.0)
        ptrs = dropped_ptr + offs_m[:, None] * columns + offs_n[None, :]
        tl.store(ptrs, grad.to(dropped_ptr.dtype.element_ty), mask=inside)
        if SUMS:
            sums += grad
    if SUMS:
        ptrs = partial_ptr + tl.program_id(0).to(tl.int64) * columns + offs_n
        tl.store(ptrs, tl.sum(sums, 0), mask=column_ok)


_PROGRAMS_PER_UNIT = 8
_LEAST_ROWS = 32
"""Of a program, so that partial sums stay a small part of the traffic."""


def _walk(x: Tensor, columns: int) -> tuple[int, int, int, int, tuple[int, int]]:
    """How a pointwise kernel with sums is spread: block, warps, rows of a program and the grid."""
    rows = x.shape[0]
    block_m, block_n, num_warps = configs.pointwise_block(columns)
    across = triton.cdiv(columns, block_n)
    most = max(1, _PROGRAMS_PER_UNIT * gpu.compute_units(x.device.index) // across)
    rows_per_program = max(_LEAST_ROWS, triton.cdiv(triton.cdiv(rows, most), block_m) * block_m)
    return block_m, block_n, num_warps, rows_per_program, (triton.cdiv(rows, rows_per_program), across)


def output_gradient(
    dout: Tensor, seed: Tensor, dropout_p: float, dtype: torch.dtype, sums: ColumnSums, needs_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """``dropout(dout)`` of ``dout [rows, out]`` in `dtype`, and the second bias's gradient, filled by `sums`."""
    dout = as_rows(dout)
    rows, columns = dout.shape
    dropped = torch.empty((rows, columns), dtype=dtype, device=dout.device)
    if dropped.numel() == 0:
        return dropped, dropped.sum(0) if needs_dbias else None
    block_m, block_n, num_warps, rows_per_program, grid = _walk(dout, columns)
    partial = dropped
    if needs_dbias:
        partial = torch.empty((grid[0], columns), dtype=torch.float32, device=dout.device)
    with gpu.on_device_of(dout):
        output_gradient_kernel[grid](
            dout, seed, dropped, partial, dout.stride(0), rows, columns, rows_per_program,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            SUMS=needs_dbias, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return dropped, sums.add(partial, dtype) if needs_dbias else None


def activation_gradient(
    grad: Tensor | None, hidden: Tensor, seed: Tensor | None, dropout_p: float, activation: str, gated: bool,
    sums: ColumnSums, needs_dbias: bool, needs_activated: bool, in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The pre-activation's gradient from the activation's, ``[rows, hidden]``, the first bias's gradient (filled by
    `sums`) and the activation again, each as far as needed; without `grad` the last alone."""
    rows, width = hidden.shape
    columns = width // 2 if gated else width
    flat = None if grad is None else as_rows(grad)
    activated = torch.empty((rows, columns), dtype=hidden.dtype, device=hidden.device) if needs_activated else None
    dhidden = None
    if flat is not None:
        dhidden = flat if in_place and not gated else torch.empty_like(hidden)
    if rows == 0 or columns == 0:
        return dhidden, hidden.sum(0) if needs_dbias else None, activated
    block_m, block_n, num_warps, rows_per_program, grid = _walk(hidden, columns)
    partial = hidden
    if needs_dbias:
        partial = torch.empty((grid[0], width), dtype=torch.float32, device=hidden.device)
    with gpu.on_device_of(hidden):
        activation_gradient_kernel[grid](
            hidden if flat is None else flat, hidden, hidden if seed is None else seed,
            hidden if dhidden is None else dhidden, hidden if activated is None else activated, partial,
            0 if flat is None else flat.stride(0), rows, columns, rows_per_program,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            ACTIVATION=activation, GATED=gated, DROPOUT=seed is not None, STORE_ACTIVATED=needs_activated,
            STORE_GRADIENT=dhidden is not None, SUMS=needs_dbias, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return dhidden, sums.add(partial, hidden.dtype) if needs_dbias else None, activated


def hidden_gradient(
    dout: Tensor, weight2: Tensor, hidden: Tensor, seed: Tensor | None, dropout_p: float, activation: str, gated: bool,
    fused: bool | None, sums: ColumnSums, needs_dbias: bool, needs_activated: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The pre-activation's gradient from ``dout [rows, out]``, the first bias's gradient (filled by `sums`) and the
    activation again, the last two as far as needed."""
    rows, inner = dout.shape
    width = hidden.shape[1]
    columns = weight2.shape[1]
    if rows == 0 or columns == 0 or not configs.use_fused(fused, "ffn_backward", dout, columns, inner):
        grad = torch.mm(dout, weight2)
        result = activation_gradient(
            grad, hidden, seed, dropout_p, activation, gated, sums, needs_dbias, needs_activated, in_place=True
        )
        assert result[0] is not None
        return result[0], result[1], result[2]
    dhidden = torch.empty_like(hidden)
    activated = torch.empty((rows, columns), dtype=hidden.dtype, device=hidden.device) if needs_activated else None
    config = configs.BACKWARD.choose(dout, gated or seed is not None or needs_activated, columns)
    blocks_m = triton.cdiv(rows, config.block_m)
    partial = dhidden
    if needs_dbias:
        partial = torch.empty((blocks_m, width), dtype=torch.float32, device=dout.device)
    with gpu.on_device_of(dout):
        hidden_gradient_kernel[(blocks_m * triton.cdiv(columns, config.block_n),)](
            dout, weight2, hidden, dhidden if seed is None else seed, dhidden,
            dhidden if activated is None else activated, partial, *dout.stride(), *weight2.stride(),
            rows, columns, inner, dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            ACTIVATION=activation, GATED=gated, DROPOUT=seed is not None, STORE_ACTIVATED=needs_activated,
            SUMS=needs_dbias, EVEN_N=columns % config.block_n == 0, EVEN_K=inner % config.block_k == 0,
            INPUT_PRECISION=gpu.input_precision(dout),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=configs.GROUP_M,
            HALVINGS=config.halvings, num_warps=config.num_warps, num_stages=config.num_stages,
            **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return dhidden, sums.add(partial, dout.dtype) if needs_dbias else None, activated


def ffn_backward(
    dout: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, hidden: Tensor | None,
    activated: Tensor | None, seed: Tensor | None, out_seed: Tensor | None, dropout_p: float, out_dropout_p: float,
    activation: str, gated: bool, fused: bool | None, needs: Sequence[bool], sums: ColumnSums,
    accumulate: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dweight1, dbias1, dweight2 and dbias2, each only if `needs` says so; the biases' are filled by `sums`.

    What of `hidden` and `activated` was not saved is computed again. dx is added to `accumulate` where that is given.
    """
    needs_hidden, needs_activated = any(needs[:3]), needs[3] and activated is None
    flat_x, flat_do = as_matrix(x), as_matrix(dout)
    dx = dweight1 = dbias1 = dweight2 = dbias2 = None
    if out_seed is not None:
        flat_do, dbias2 = output_gradient(flat_do, out_seed, out_dropout_p, x.dtype, sums, needs[4])
    else:
        dbias2 = flat_do.sum(0, dtype=x.dtype) if needs[4] else None
        flat_do = flat_do.to(x.dtype)
    if hidden is None and (needs_hidden or needs_activated):
        hidden = pre_activation(flat_x, weight1, bias1, gated, fused)
    if needs_hidden:
        assert hidden is not None
        dhidden, dbias1, again = hidden_gradient(
            flat_do, weight2, hidden, seed, dropout_p, activation, gated, fused, sums, needs[2], needs_activated
        )
        if needs[0]:
            dx = input_gradient(dhidden, weight1, accumulate).view(x.shape)
        dweight1 = torch.mm(dhidden.t(), flat_x) if needs[1] else None
        activated = again if needs_activated else activated
    elif needs_activated:
        assert hidden is not None
        _, _, activated = activation_gradient(None, hidden, seed, dropout_p, activation, gated, sums, False, True)
    if needs[3]:
        assert activated is not None
        dweight2 = torch.mm(flat_do.t(), activated)
    return dx, dweight1, dbias1, dweight2, dbias2


def input_gradient(dhidden: Tensor, weight1: Tensor, accumulate: Tensor | None) -> Tensor:
    """``dhidden W1``, by the vendor's product, which adds `accumulate` ``[..., d_model]`` where it is given."""
    if accumulate is None:
        return torch.mm(dhidden, weight1)
    return torch.addmm(as_matrix(accumulate), dhidden, weight1)
