"""The feed-forward block's backward kernels: a product with the activation's derivative in its epilogue, the same
epilogue alone, the output dropout's pass, and their launchers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common import dropout
from ..common.blocks import dropout_keep
from ..common.column_sums import Job
from ..common.plan import as_rows, launch, once, row_stride
from . import configs
from .arguments import Options, Saved
from .blocks import activation_and_slope, column_parts, product_block, tile_position
from .forward import linear_act_forward


@triton.jit
def _hidden_gradient_block(
    grad, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, offs_m, offs_n, inside, first_row, first_column, columns,
    dropout_threshold, keep_scale, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """From the gradient of the dropped-out activation to that of the pre-activation, which is written and returned
    (gated: both halves), zero outside; the activation again, for the second weight's gradient. What is None is left
    out."""
    # From the block's first row on offsets fit 32 bits, which halves the registers they take.
    width = 2 * columns if GATED else columns
    row = tl.arange(0, grad.shape[0])[:, None]
    at = row * width + offs_n[None, :]
    hidden, up = grad, grad
    if hidden_ptr is not None:
        hidden_ptrs = hidden_ptr + first_row * width + at
        hidden = tl.load(hidden_ptrs, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(hidden_ptrs + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = activation_and_slope(hidden, ACTIVATION)
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, first_column, dropout_threshold, grad.shape[1])
    if activated_ptr is not None:
        activated = value
        if GATED:
            activated *= up
        if seed_ptr is not None:
            activated = tl.where(keep, activated * keep_scale, 0.0)
        activated_ptrs = activated_ptr + first_row * columns + (row * columns + offs_n[None, :])
        tl.store(activated_ptrs, activated.to(activated_ptr.dtype.element_ty), mask=inside)
    if seed_ptr is not None:
        grad = tl.where(keep, grad * keep_scale, 0.0)
    grad = tl.where(inside, grad, 0.0)
    dup = grad * value
    dhidden = grad * slope
    if GATED:
        dhidden *= up
    if dhidden_ptr is not None:
        dhidden_ptrs = dhidden_ptr + first_row * width + at
        tl.store(dhidden_ptrs, dhidden.to(dhidden_ptr.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(dhidden_ptrs + columns, dup.to(dhidden_ptr.dtype.element_ty), mask=inside)
    return dhidden, dup


@triton.jit
def _store_sums(partial_ptr, program, dhidden, dup, offs_n, columns, GATED: tl.constexpr):
    """A program's share of the bias's gradient, one row of `partial`; nothing where that is None."""
    if partial_ptr is not None:
        ptrs = partial_ptr + tl.cast(program, tl.int64) * (2 * columns if GATED else columns) + offs_n
        tl.store(ptrs, tl.sum(dhidden, 0), mask=offs_n < columns)
        if GATED:
            tl.store(ptrs + columns, tl.sum(dup, 0), mask=offs_n < columns)


@triton.jit(do_not_specialize=["rows", "seed_ptr"])
def hidden_gradient_kernel(
    dout_ptr, weight_ptr, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, partial_ptr, rows,
    stride_dm, stride_wk, stride_wn, inner, columns, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    # One program computes a block of dhidden = dropout(dout W2) * activation'(hidden): it reads its block of the saved
    # pre-activation once and writes the gradient once; the activation's own gradient never reaches memory.
    # Gated, hidden = (gate, up): dgate = g up activation'(gate), dup = g activation(gate) with the same g.
    # The block's sums over its rows, its share of the bias's gradient, are one row of `partial`.
    pid_m, pid_n = tile_position(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    grad, _ = product_block(
        dout_ptr, weight_ptr, offs_m, offs_n, rows, columns, inner, stride_dm, stride_wk, stride_wn,
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
            (pid_m * BLOCK_M).to(tl.int64), first_column, columns, dropout_threshold, keep_scale, ACTIVATION, GATED,
        )  # fmt: skip
        _store_sums(partial_ptr, pid_m, dhidden, dup, offs_n, columns, GATED)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "seed_ptr"])
def epilogue_gradient_kernel(
    grad_ptr, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, partial_ptr, rows, rows_per_program,
    stride_gm, columns, dropout_threshold, keep_scale,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The same from a gradient that is there already, the vendor's product or the upstream one: one program walks over
    # rows_per_program rows of BLOCK_N columns, reads gradient and pre-activation once (the latter where there was an
    # activation), writes the gradient once and its sums over rows at the end.
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums2 = sums
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        inside = (offs_m < last)[:, None] & (offs_n < columns)[None, :]
        grad = sums * 0.0
        if grad_ptr is not None:
            grad_ptrs = grad_ptr + offs_m[:, None] * stride_gm + offs_n[None, :]
            grad = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
        dhidden, dup = _hidden_gradient_block(
            grad, hidden_ptr, seed_ptr, dhidden_ptr, activated_ptr, offs_m, offs_n, inside, start,
            tl.program_id(1) * BLOCK_N, columns, dropout_threshold, keep_scale, ACTIVATION, GATED,
        )  # fmt: skip
        if partial_ptr is not None:
            sums += dhidden
            if GATED:
                sums2 += dup
    _store_sums(partial_ptr, tl.program_id(0), sums, sums2, offs_n, columns, GATED)


_PROGRAMS_PER_UNIT = 8
_LEAST_ROWS = 32
"""Of a program, so that partial sums stay a small part of the traffic."""


def _epilogue_gradient(
    dout: Tensor, weight2: Tensor | None, seed: Tensor | None, options: Options, dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> Callable[..., tuple[Any, Any, Any]]:  # fmt: skip
    """A function of ``dout [rows, out]``, weight2, hidden, seed, bias and jobs: of ``dropout(activation(hidden))`` the
    gradients of `hidden` (in `dtype`) and bias, and the activation again, each as far as `needs` says.

    `dout` is the gradient of the product of the activation and weight2, or without weight2 of the activation itself.
    """
    need_dhidden, need_dbias, need_activated = needs
    index, gated, inner = dout.device.index, options.gated, dout.shape[1]
    columns = inner if weight2 is None else weight2.shape[1]
    width = 2 * columns if gated else columns
    fixed: dict[str, Any] = {"ACTIVATION": options.activation, "GATED": gated}
    numbers = (columns, dropout.threshold(options.dropout_p), dropout.keep_scale(options.dropout_p))
    multiplies, fused = weight2 is not None and need_dhidden, False
    if multiplies and columns and inner:
        fused = configs.use_fused(options.fused, "ffn_backward", dout, columns, inner)
    if fused and weight2 is not None:
        config = configs.BACKWARD.choose(dout, gated or seed is not None or need_activated, columns)
        block_m, across = config.block_m, triton.cdiv(columns, config.block_n)
        strides = (row_stride(dout), *weight2.stride(), inner)
        go = launch(
            hidden_gradient_kernel, index, *strides, *numbers, **fixed, **configs.constants(config, dout, columns)
        )
    else:
        block_m, block_n, num_warps = configs.pointwise_block(columns)
        across = triton.cdiv(columns, block_n)
        most = block_m * max(1, _PROGRAMS_PER_UNIT * gpu.compute_units(index) // max(across, 1))
        go = launch(
            epilogue_gradient_kernel, index, columns if multiplies else row_stride(dout), *numbers, **fixed,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip

    def run(dout: Any, weight2: Any, hidden: Any, seed: Any, bias: Any, jobs: list[Job]) -> tuple[Any, Any, Any]:
        rows = dout.shape[0]
        grad = dhidden = activated = dbias = partial = None
        if need_dhidden:
            grad = torch.mm(dout, weight2) if multiplies and not fused else dout
            in_place = multiplies and not fused and not gated
            dhidden = grad if in_place else dout.new_empty((rows, width), dtype=dtype)
        if need_activated:
            activated = dout.new_empty((rows, columns), dtype=dtype)
        rows_per_program = block_m if fused else max(_LEAST_ROWS, -(-rows // most) * block_m)
        programs = -(-rows // rows_per_program) if columns else 0
        if need_dbias:
            dbias = torch.empty_like(bias) if programs else torch.zeros_like(bias)
            if programs:
                partial = dout.new_empty((programs, width), dtype=torch.float32)
                jobs.append(Job(partial, 0, programs, dbias))
        if programs and fused:
            go(programs * across, 1, dout, weight2, hidden, seed, dhidden, activated, partial, rows)
        elif programs:
            go(programs, across, grad, hidden, seed, dhidden, activated, partial, rows, rows_per_program)
        return dhidden, dbias, activated

    return run


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight1, bias1, weight2 and bias2."""


def ffn_backward(
    dout: Tensor, like: Saved, options: Options, needs: Sequence[bool], accumulate: bool = False
) -> Callable[..., Gradients]:
    """A function of dout, what was saved, a list of jobs and, with `accumulate`, a tensor that the gradient of x is
    added to: the gradients as far as needed, those of the biases filled by jobs that it adds.

    What of the pre-activation and the activation was not saved is computed again. Without weight2 that of linear_act.
    """
    need_x, need_weight1, need_bias1, need_weight2, need_bias2 = needs
    need_hidden, need_activated = need_x or need_weight1 or need_bias1, need_weight2 and like.activated is None
    dtype, wanted = like.x.dtype, (need_hidden, need_bias1, need_activated)
    gated, fused = options.gated, options.fused
    of_output = Options(options.out_dropout_p, activation="none")
    wanted2 = (True, need_bias2, False)
    drop = once(lambda g, w, h, seed, *rest: _epilogue_gradient(g, w, seed, of_output, dtype, wanted2))
    gradient = once(lambda g, w, h, seed, *rest: _epilogue_gradient(g, w, seed, options, dtype, wanted))
    again = once(lambda x, w, b, s: linear_act_forward(x, w, b, s, 0.0, "none", gated, fused, True, store_out=False))

    def run(dout: Tensor, saved: Sequence[Any], jobs: list[Job], added_to: Any = None) -> Gradients:
        x, weight1, bias1, weight2, bias2, hidden, activated, seed, out_seed = saved
        dx = dweight1 = dbias1 = dweight2 = dbias2 = None
        dout = as_rows(dout)
        if out_seed is not None:
            dout, dbias2, _ = drop(dout, None, None, out_seed, bias2, jobs)
        else:
            dbias2 = torch.sum(dout, 0, dtype=bias2.dtype) if need_bias2 else None
            dout = dout if dout.dtype is dtype else dout.to(dtype)
        if need_hidden or need_activated:
            if hidden is None:
                _, hidden = again(x, weight1, bias1, None)
            dhidden, dbias1, made = gradient(dout, weight2, hidden, seed, bias1, jobs)
            activated = made if need_activated else activated
        if need_x:
            dx = torch.addmm(as_rows(added_to), dhidden, weight1) if accumulate else torch.mm(dhidden, weight1)
            dx = dx.view(x.shape)
        if need_weight1:
            dweight1 = torch.mm(dhidden.t(), as_rows(x))
        if need_weight2:
            dweight2 = torch.mm(dout.t(), activated)
        return dx, dweight1, dbias1, dweight2, dbias2

    return run
