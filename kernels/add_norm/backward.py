"""add_norm backward: one pass over the rows, for wide rows a pass for their means before it, and the launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common import dropout
from ..common.blocks import dropout_keep, load_block
from ..common.column_sums import Job
from ..common.plan import as_rows, launch, row_stride
from .arguments import Options, Saved
from .blocks import (
    Shape,
    first_chunk,
    load_columns,
    load_sum,
    load_weight,
    row_shape,
    smallest_item,
    store_block,
    unit_of,
)


@triton.jit(do_not_specialize=["stride_do", "stride_ds", "stride_x", "stride_r", "rows", "width", "rows_per_program"])
def add_norm_backward_kernel(
    dout_ptr, dalso_ptr, dsum_ptr, x_ptr, residual_ptr, weight_ptr, x_bias_ptr, statistics_ptr, seed_ptr, means_ptr,
    dx_ptr, dz_ptr, partial_ptr,
    rows, rows_per_program, stride_do, stride_ds, stride_x, stride_r, width, dropout_threshold, keep_scale,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FLOAT32_SUM: tl.constexpr, RECOMPUTE: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, DX_BIAS: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program walks over rows_per_program neighbouring rows, BLOCK_M at a time, each CHUNKS pieces of BLOCK_N
    # columns in registers. It reads dout and the saved sum z once (with RECOMPUTE x and residual, and forms z again),
    # writes the gradients of residual (dz) and x, and keeps its share of the parameters' gradients in registers until
    # the end, when it writes them as one row of the partial matrix: nothing is shared between programs. Pointers that
    # are None are not there, and what only they need is not computed; `width` and strides are in units of UNIT.
    #   xhat = (z - mean) * rstd    g = dout * weight
    #   dz = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum      dx = dropout(dz)
    #   dweight = sum over rows of dout * xhat      dbias = sum over rows of dout     (Ba et al., 2016)
    #   dx_bias = sum over rows of dx.   RMSNorm: mean = 0 and no mean(g)     (Zhang and Sennrich, 2019)
    # Of an output in two dtypes, dout is the sum of both gradients. Where `means_ptr` is given, mean(g * xhat) and
    # mean(g) of each row are known, and a program takes only a part of the columns.
    width = width * UNIT
    PARTS: tl.constexpr = means_ptr is not None
    NEED_DZ: tl.constexpr = dz_ptr is not None or dx_ptr is not None or DX_BIAS
    NEED_XHAT: tl.constexpr = NEED_DZ or DWEIGHT
    ROWS: tl.constexpr = BLOCK_M > 1
    SUMS: tl.constexpr = DWEIGHT + DBIAS + DX_BIAS
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * (CHUNKS * BLOCK_N)
    weights, x_biases, column_oks, dweights, dbiases, dx_biases = (), (), (), (), (), ()
    for i in tl.static_range(CHUNKS):
        offset = column + i * BLOCK_N
        if weight_ptr is not None:
            weights = weights + (
                load_weight(weight_ptr, offset, width, ZERO_CENTERED, not EVEN and (PARTS or i == CHUNKS - 1), BLOCK_N),
            )
        if x_bias_ptr is not None:
            x_biases = x_biases + (
                load_columns(x_bias_ptr, offset, width, not EVEN and (PARTS or i == CHUNKS - 1), BLOCK_N),
            )
        column_oks = column_oks + ((offset + tl.arange(0, BLOCK_N) < width)[None, :],)
        dweights = dweights + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        dbiases = dbiases + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        dx_biases = dx_biases + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        row_ok = offs_m < last
        inside = row_ok[:, None]
        if NEED_XHAT:
            rstd = tl.load(statistics_ptr + offs_m, mask=row_ok, other=0.0)[:, None]
            if not RMS:
                shift = -tl.load(statistics_ptr + rows + offs_m, mask=row_ok, other=0.0)[:, None] * rstd
        sum_g, sum_gx = None, None
        keeps, xhats, gs, new_dweights, new_dbiases, new_dx_biases = (), (), (), (), (), ()
        for i in tl.static_range(CHUNKS):
            offset = column + i * BLOCK_N
            dout = load_gradient(
                dout_ptr, dalso_ptr, offs_m, stride_do, width, offset, inside, column_oks[i],
                UNIT, ROWS, not EVEN and (PARTS or i == CHUNKS - 1), BLOCK_N,
            )  # fmt: skip
            if NEED_XHAT:
                keep, x_bias, r_ptrs = None, None, None
                if RECOMPUTE and seed_ptr is not None:
                    keep = dropout_keep(tl.load(seed_ptr), offs_m, offset, dropout_threshold, BLOCK_N)
                    keeps = keeps + (keep,)
                if x_bias_ptr is not None:
                    x_bias = x_biases[i]
                if residual_ptr is not None:
                    r_ptrs = first_chunk(residual_ptr, offs_m, stride_r, UNIT, BLOCK_N) + offset
                x_ptrs = first_chunk(x_ptr, offs_m, stride_x, UNIT, BLOCK_N) + offset
                xhat = load_sum(
                    x_ptrs,
                    r_ptrs,
                    x_bias,
                    keep,
                    keep_scale,
                    inside,
                    column_oks[i],
                    FLOAT32_SUM,
                    ROWS,
                    not EVEN and (PARTS or i == CHUNKS - 1),
                )
                # One multiply-add; its error is that of the mean's own rounding.
                if RMS:
                    xhat *= rstd
                else:
                    xhat = xhat * rstd + shift
                xhats = xhats + (xhat,)
            # Outside the row dout is 0, and so is all that is summed.
            if DWEIGHT:
                new_dweights = new_dweights + (dweights[i] + dout * xhat,)
            if DBIAS:
                new_dbiases = new_dbiases + (dbiases[i] + dout,)
            if weight_ptr is not None:
                dout *= weights[i]
            gs = gs + (dout,)
            if NEED_DZ and not PARTS:
                sum_gx = dout * xhat if i == 0 else sum_gx + dout * xhat
                if not RMS:
                    sum_g = dout if i == 0 else sum_g + dout
        if DWEIGHT:
            dweights = new_dweights
        if DBIAS:
            dbiases = new_dbiases
        if NEED_DZ:
            # The factors of xhat and 1 in dz, so that an element costs two multiply-adds.
            if PARTS:
                minus_gx = -tl.load(means_ptr + offs_m, mask=row_ok, other=0.0)[:, None] * rstd
            else:
                minus_gx = -rstd * (tl.sum(sum_gx, 1)[:, None] / width)
            if not RMS:
                if PARTS:
                    minus_g = -tl.load(means_ptr + rows + offs_m, mask=row_ok, other=0.0)[:, None] * rstd
                else:
                    minus_g = -rstd * (tl.sum(sum_g, 1)[:, None] / width)
            for i in tl.static_range(CHUNKS):
                offset = column + i * BLOCK_N
                if RMS:
                    dz = gs[i] * rstd + xhats[i] * minus_gx
                else:
                    dz = gs[i] * rstd + (xhats[i] * minus_gx + minus_g)
                if dsum_ptr is not None:
                    ds_ptrs = first_chunk(dsum_ptr, offs_m, stride_ds, UNIT, BLOCK_N) + offset
                    dz += load_block(ds_ptrs, inside, column_oks[i], ROWS, not EVEN and (PARTS or i == CHUNKS - 1)).to(
                        tl.float32
                    )
                if dz_ptr is not None:
                    ptrs = first_chunk(dz_ptr, offs_m, width, 1, BLOCK_N) + offset
                    store_block(ptrs, dz, inside, column_oks[i], ROWS, not EVEN and (PARTS or i == CHUNKS - 1))
                if dx_ptr is not None or DX_BIAS:
                    if seed_ptr is not None:
                        if RECOMPUTE:
                            keep = keeps[i]
                        else:
                            keep = dropout_keep(tl.load(seed_ptr), offs_m, offset, dropout_threshold, BLOCK_N)
                        dz = tl.where(keep, dz * keep_scale, 0.0)
                    if dx_ptr is not None:
                        ptrs = first_chunk(dx_ptr, offs_m, width, 1, BLOCK_N) + offset
                        store_block(ptrs, dz, inside, column_oks[i], ROWS, not EVEN and (PARTS or i == CHUNKS - 1))
                    if DX_BIAS:
                        # Beyond the last row rstd is 0, so that nothing is added.
                        new_dx_biases = new_dx_biases + (dx_biases[i] + dz,)
            if DX_BIAS:
                dx_biases = new_dx_biases
    for i in tl.static_range(CHUNKS):
        offset = column + i * BLOCK_N
        if DWEIGHT:
            store_share(
                partial_ptr, program * SUMS, offset, width, dweights[i],
                not EVEN and (PARTS or i == CHUNKS - 1), BLOCK_N,
            )  # fmt: skip
        if DBIAS:
            store_share(
                partial_ptr, program * SUMS + DWEIGHT, offset, width, dbiases[i],
                not EVEN and (PARTS or i == CHUNKS - 1), BLOCK_N,
            )  # fmt: skip
        if DX_BIAS:
            store_share(
                partial_ptr, program * SUMS + DWEIGHT + DBIAS, offset, width, dx_biases[i],
                not EVEN and (PARTS or i == CHUNKS - 1), BLOCK_N,
            )  # fmt: skip


@triton.jit
def load_gradient(
    dout_ptr, dalso_ptr, rows, stride, width, first_column, row_ok, column_ok,
    UNIT: tl.constexpr, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A piece of the output's gradient in float32, with that of its second copy, whose rows are neighbours."""
    ptrs = first_chunk(dout_ptr, rows, stride, UNIT, BLOCK_N) + first_column
    dout = load_block(ptrs, row_ok, column_ok, CHECK_ROWS, CHECK_COLUMNS).to(tl.float32)
    if dalso_ptr is not None:
        ptrs = first_chunk(dalso_ptr, rows, width, 1, BLOCK_N) + first_column
        dout += load_block(ptrs, row_ok, column_ok, CHECK_ROWS, CHECK_COLUMNS).to(tl.float32)
    return dout


@triton.jit
def store_share(ptr, row, first_column, width, share, CHECK: tl.constexpr, BLOCK_N: tl.constexpr):
    """A piece of a row of the partial matrix, which has a row for each sum of a program."""
    offs_n = first_column + tl.arange(0, BLOCK_N)
    store_block(ptr + row * width + offs_n, tl.sum(share, 0), True, offs_n < width, False, CHECK)


@triton.jit(do_not_specialize=["stride_do", "stride_x", "stride_r", "rows", "width"])
def add_norm_row_means_kernel(
    dout_ptr, dalso_ptr, x_ptr, residual_ptr, weight_ptr, x_bias_ptr, statistics_ptr, seed_ptr, means_ptr, rows,
    stride_do, stride_x, stride_r, width, dropout_threshold, keep_scale,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FLOAT32_SUM: tl.constexpr, RECOMPUTE: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program walks over the columns of one row and writes mean(g) and mean(g * xhat), g = dout * weight: it reads
    # dout and the sum once. For rows that registers do not hold together with their parameters' gradients.
    width = width * UNIT
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    columns = tl.arange(0, BLOCK_N)[None, :]
    rstd = tl.load(statistics_ptr + offs_m)[:, None]
    if not RMS:
        mean = tl.load(statistics_ptr + rows + offs_m)[:, None]
    sum_g = tl.zeros((1, BLOCK_N), tl.float32)
    sum_gx = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_N):
        column_ok = start + columns < width
        g = load_gradient(
            dout_ptr, dalso_ptr, offs_m, stride_do, width, start, True, column_ok, UNIT, False, not EVEN, BLOCK_N
        )
        if weight_ptr is not None:
            g *= load_weight(weight_ptr, start, width, ZERO_CENTERED, not EVEN, BLOCK_N)
        keep, x_bias, r_ptrs = None, None, None
        if RECOMPUTE and seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, start, dropout_threshold, BLOCK_N)
        if x_bias_ptr is not None:
            x_bias = load_columns(x_bias_ptr, start, width, not EVEN, BLOCK_N)
        if residual_ptr is not None:
            r_ptrs = first_chunk(residual_ptr, offs_m, stride_r, UNIT, BLOCK_N) + start
        xhat = load_sum(
            first_chunk(x_ptr, offs_m, stride_x, UNIT, BLOCK_N) + start,
            r_ptrs, x_bias, keep, keep_scale, True, column_ok, FLOAT32_SUM, False, not EVEN,
        )  # fmt: skip
        if not RMS:
            xhat -= mean
            sum_g += g
        sum_gx += g * (xhat * rstd)
    tl.store(means_ptr + offs_m, tl.sum(sum_gx, 1) / width)
    if not RMS:
        tl.store(means_ptr + rows + offs_m, tl.sum(sum_g, 1) / width)


# Beyond it a row, its parameters and their gradients do not fit into registers; sooner with more of them.
MAX_WIDTH_IN_REGISTERS = 8192
MAX_WIDTH_WITH_X_BIAS = 4096
_WIDE_BLOCK, _WIDE_WARPS = 4096, 8  # of the pass for the means
# A program takes at least this many rows, so that the partial sums stay a small part of the traffic.
_LEAST_ROWS = 16
_WARPS_PER_UNIT = 16


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, residual, weight, bias and x_bias."""


def add_norm_backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor | None], options: Options, needs: Sequence[bool]
) -> Callable[..., Gradients]:
    """A function of `grads`, `saved` and a list of jobs that launches the pass over the rows: the gradients of x and
    residual (one tensor where they are equal), and those of weight, bias and x_bias, filled by jobs that it adds.

    `grads` are those of the output, the sum and, where there is one, the second copy of the output.
    """
    like, two = Saved(*saved), len(grads) > 2  # type: ignore[arg-type]
    dout, dsum, dalso = grads[0], grads[1], grads[2] if two else None
    if dout is None:
        dout, dalso = dalso, None
    x, index = like.x, like.x.device.index
    need_x, need_residual, need_weight, need_bias, need_x_bias = needs
    recompute = options.recompute and not (like.residual is like.x_bias is like.seed is None)
    dtype, dtype_z = options.dtype, torch.float32 if options.float32_residual else options.dtype
    alike = dtype == dtype_z
    shared = alike and need_x and need_residual and like.seed is None
    rowwise = all(t is None or t.is_contiguous() for t in (*grads, x, like.residual))
    as_dout = rowwise and (dout is None or dout.dtype == dtype)
    width, rows_like = x.shape[-1], (dout, dsum, x, like.residual)
    strides = [0 if t is None else row_stride(t) for t in rows_like]
    strides[0] = strides[0] or width  # there is no upstream gradient: zeros
    unit = unit_of(width, *strides)
    units = [stride // unit for stride in strides]
    warp, per_chunk = gpu.lanes(index), smallest_item(*rows_like, dalso, dtype)
    many = need_x_bias or (recompute and like.seed is not None)
    parts = width > (MAX_WIDTH_WITH_X_BIAS if many else MAX_WIDTH_IN_REGISTERS)
    # A part of a wide row: 16 elements a thread.
    shape = Shape(1, 4 * warp * (16 // per_chunk), per_chunk, 4) if parts else row_shape(width, per_chunk, warp)
    most = max(1, _WARPS_PER_UNIT // shape.num_warps) * gpu.compute_units(index)
    column_blocks = triton.cdiv(width, shape.columns) if parts else 1
    numbers = (dropout.threshold(options.dropout_p), dropout.keep_scale(options.dropout_p))
    switches = {
        "RMS": options.rms, "ZERO_CENTERED": options.zero_centered, "RECOMPUTE": recompute, "UNIT": unit,
        "FLOAT32_SUM": options.float32_sum or not recompute,  # a saved sum is as it was rounded
    }  # fmt: skip
    count = need_weight + need_bias + need_x_bias
    find_means = launch(
        add_norm_row_means_kernel, index, units[0], units[2], units[3], width // unit, *numbers, **switches,
        EVEN=width % _WIDE_BLOCK == 0, BLOCK_N=_WIDE_BLOCK, num_warps=_WIDE_WARPS * 32 // warp,
    )  # fmt: skip
    go = launch(
        add_norm_backward_kernel, index, *units, width // unit, *numbers, **switches,
        EVEN=width % shape.columns == 0, DWEIGHT=need_weight, DBIAS=need_bias, DX_BIAS=need_x_bias,
        CHUNKS=shape.chunks, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        num_warps=shape.num_warps,
    )  # fmt: skip

    def run(grads: Sequence[Any], saved: Sequence[Any], jobs: list[Job]) -> Gradients:
        dout, dsum, dalso = grads[0], grads[1], grads[2] if two else None
        x, residual, weight, bias, x_bias, statistics, seed = saved
        size = x.shape
        if dout is None:
            dout, dalso = x.new_zeros(size, dtype=dtype) if dalso is None else dalso, None
        dz = dx = partial = means = None
        if need_residual:
            dz = torch.empty_like(dout) if as_dout and alike else x.new_empty(size, dtype=dtype_z)
        if need_x and not shared:
            dx = torch.empty_like(dout) if as_dout else x.new_empty(size, dtype=dtype)
        dweight = torch.empty_like(weight) if need_weight else None  # type: ignore[arg-type]
        dbias = torch.empty_like(bias) if need_bias else None  # type: ignore[arg-type]
        dx_bias = torch.empty_like(x_bias) if need_x_bias else None  # type: ignore[arg-type]
        rows = x.numel() // width
        if rows == 0:
            found = [None if out is None else out.zero_() for out in (dweight, dbias, dx_bias)]
            return dz if shared else dx, dz, *found  # type: ignore[return-value]
        if not rowwise:
            dout, dsum, x, residual = (None if t is None else as_rows(t) for t in (dout, dsum, x, residual))
            dalso = None if dalso is None else as_rows(dalso).contiguous()
        rows_per_program = max(_LEAST_ROWS, -(-rows * column_blocks // (most * shape.block_m)) * shape.block_m)
        programs = -(-rows // rows_per_program)
        tensors = (x, residual, weight, x_bias if recompute else None, statistics, seed)
        if count:
            partial = x.new_empty((programs, count, width), dtype=torch.float32)
            offset = 0
            for out in (dweight, dbias, dx_bias):
                if out is not None:
                    jobs.append(Job(partial, offset, programs, out))
                    offset += width
        if parts:
            means = x.new_empty((1 if options.rms else 2) * rows, dtype=torch.float32)
            find_means(rows, 1, dout, dalso, *tensors, means, rows)
        go(programs, column_blocks, dout, dalso, dsum, *tensors, means, dx, dz, partial, rows, rows_per_program)
        return dz if shared else dx, dz, dweight, dbias, dx_bias

    return run
