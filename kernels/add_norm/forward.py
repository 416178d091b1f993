"""add_norm forward: a kernel for rows that fit in registers, one for wider rows, and their launcher."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common import dropout
from ..common.blocks import dropout_keep
from ..common.plan import as_rows, launch, row_stride
from .arguments import Options, Tensors, stores_sum, sum_dtype
from .blocks import (
    check_width,
    first_chunk,
    load_columns,
    load_sum,
    load_weight,
    reciprocal_deviation,
    row_shape,
    smallest_item,
    store_block,
    unit_of,
)


@triton.jit(do_not_specialize=["stride_x", "stride_r", "rows", "width", "rows_per_program"])
def add_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, seed_ptr, out_ptr, also_ptr, sum_ptr, statistics_ptr,
    rows, rows_per_program, stride_x, stride_r, width, eps, dropout_threshold, keep_scale,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FLOAT32_SUM: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program walks over rows_per_program neighbouring rows, BLOCK_M whole rows at a time, each CHUNKS pieces of
    # BLOCK_N columns in registers. It reads x and residual once and writes the result once, or once in each of two
    # dtypes (and the sum and one or two statistics per row where they are needed later); parameters are read once a
    # program. Pointers that are None are not there; `width` and strides are in units of UNIT elements.
    #   z = residual + dropout(x + x_bias)    out = (z - mean) * rstd * weight + bias    rstd = 1 / sqrt(var + eps)
    # The variance is the mean square of the centred row: no cancellation (Ba et al., 2016, equation 3). RMSNorm has
    # mean 0 instead (Zhang and Sennrich, 2019, equation 4).
    width = width * UNIT
    weights, biases, x_biases = (), (), ()
    for i in tl.static_range(CHUNKS):
        if weight_ptr is not None:
            weights = weights + (
                load_weight(weight_ptr, i * BLOCK_N, width, ZERO_CENTERED, not EVEN and i == CHUNKS - 1, BLOCK_N),
            )
        if bias_ptr is not None:
            biases = biases + (load_columns(bias_ptr, i * BLOCK_N, width, not EVEN and i == CHUNKS - 1, BLOCK_N),)
        if x_bias_ptr is not None:
            x_biases = x_biases + (load_columns(x_bias_ptr, i * BLOCK_N, width, not EVEN and i == CHUNKS - 1, BLOCK_N),)
    last_ok = ((CHUNKS - 1) * BLOCK_N + tl.arange(0, BLOCK_N) < width)[None, :]
    ROWS: tl.constexpr = BLOCK_M > 1
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        row_ok = (offs_m < last)[:, None]
        x_ptrs = first_chunk(x_ptr, offs_m, stride_x, UNIT, BLOCK_N)
        row, total, squares = (), None, None
        for i in tl.static_range(CHUNKS):
            keep, x_bias, r_ptrs = None, None, None
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), offs_m, i * BLOCK_N, dropout_threshold, BLOCK_N)
            if x_bias_ptr is not None:
                x_bias = x_biases[i]
            if residual_ptr is not None:
                r_ptrs = first_chunk(residual_ptr, offs_m, stride_r, UNIT, BLOCK_N) + i * BLOCK_N
            z = load_sum(
                x_ptrs + i * BLOCK_N,
                r_ptrs,
                x_bias,
                keep,
                keep_scale,
                row_ok,
                last_ok,
                FLOAT32_SUM,
                ROWS,
                not EVEN and i == CHUNKS - 1,
            )
            if sum_ptr is not None:
                ptrs = first_chunk(sum_ptr, offs_m, width, 1, BLOCK_N) + i * BLOCK_N
                store_block(ptrs, z, row_ok, last_ok, ROWS, not EVEN and i == CHUNKS - 1)
            row = row + (z,)  # [BM, BN]
            term = z * z if RMS else z
            total = term if i == 0 else total + term
        if RMS:
            rstd = reciprocal_deviation(tl.sum(total, 1) / width, eps)
        else:
            mean = tl.sum(total, 1) / width
            centred = ()
            for i in tl.static_range(CHUNKS):
                z = row[i] - mean[:, None]
                if not EVEN and i == CHUNKS - 1:
                    z = tl.where(last_ok, z, 0.0)
                centred = centred + (z,)
                squares = z * z if i == 0 else squares + z * z
            row = centred
            rstd = reciprocal_deviation(tl.sum(squares, 1) / width, eps)
        out_ptrs = first_chunk(out_ptr, offs_m, width, 1, BLOCK_N)
        for i in tl.static_range(CHUNKS):
            out = row[i] * rstd[:, None]
            if weight_ptr is not None:
                out *= weights[i]
            if bias_ptr is not None:
                out += biases[i]
            store_block(out_ptrs + i * BLOCK_N, out, row_ok, last_ok, ROWS, not EVEN and i == CHUNKS - 1)
            if also_ptr is not None:
                ptrs = first_chunk(also_ptr, offs_m, width, 1, BLOCK_N) + i * BLOCK_N
                store_block(ptrs, out, row_ok, last_ok, ROWS, not EVEN and i == CHUNKS - 1)
        if statistics_ptr is not None:
            tl.store(statistics_ptr + offs_m, rstd, mask=offs_m < last)
            if not RMS:
                tl.store(statistics_ptr + rows + offs_m, mean, mask=offs_m < last)


@triton.jit(do_not_specialize=["stride_x", "stride_r", "rows", "width"])
def add_norm_wide_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, seed_ptr, out_ptr, also_ptr, sum_ptr, statistics_ptr,
    rows, stride_x, stride_r, width, eps, dropout_threshold, keep_scale,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FLOAT32_SUM: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The same for rows that registers do not hold. One program takes one row and walks over its columns twice: once
    # for the statistics, once for the result, when it reads the row again, from the L2 cache (the sum where that is
    # stored, else x and residual). Each lane keeps the mean and the squared deviations of its own columns (Welford,
    # "Note on a method for calculating corrected sums of squares", 1962); in the end they are merged (Chan et al.,
    # "Updating formulae and a pairwise algorithm for computing sample variances", 1979): no cancellation.
    width = width * UNIT
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row_ok = (offs_m < rows)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    x_ptrs = first_chunk(x_ptr, offs_m, stride_x, UNIT, BLOCK_N)
    out_ptrs = first_chunk(out_ptr, offs_m, width, 1, BLOCK_N)
    lane_mean = tl.zeros((1, BLOCK_N), tl.float32)
    squares = tl.zeros((1, BLOCK_N), tl.float32)
    seen = 0.0
    for start in range(0, width, BLOCK_N):
        column_ok = start + columns < width
        keep, x_bias, r_ptrs = None, None, None
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, start, dropout_threshold, BLOCK_N)
        if x_bias_ptr is not None:
            x_bias = load_columns(x_bias_ptr, start, width, not EVEN, BLOCK_N)
        if residual_ptr is not None:
            r_ptrs = first_chunk(residual_ptr, offs_m, stride_r, UNIT, BLOCK_N) + start
        z = load_sum(x_ptrs + start, r_ptrs, x_bias, keep, keep_scale, row_ok, column_ok, FLOAT32_SUM, False, not EVEN)
        if sum_ptr is not None:
            store_block(first_chunk(sum_ptr, offs_m, width, 1, BLOCK_N) + start, z, row_ok, column_ok, False, not EVEN)
        if RMS:
            squares += tl.where(column_ok, z * z, 0.0) if not EVEN else z * z
        else:
            seen += 1.0
            deviation = z - lane_mean
            if not EVEN:
                deviation = tl.where(column_ok, deviation, 0.0)
            lane_mean += deviation / seen
            squares += deviation * (z - lane_mean)
    mean = tl.zeros((1,), tl.float32)
    if not RMS:
        count = tl.where(columns < width - (seen - 1.0) * BLOCK_N, seen, seen - 1.0)
        mean = tl.sum(lane_mean * count, 1) / width
        apart = lane_mean - mean[:, None]
        squares += count * apart * apart
    rstd = reciprocal_deviation(tl.sum(squares, 1) / width, eps)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + offs_m, rstd)
        if not RMS:
            tl.store(statistics_ptr + rows + offs_m, mean)
    tl.debug_barrier()  # the sum may be read back by other threads than wrote it
    for start in range(0, width, BLOCK_N):
        column_ok = start + columns < width
        if sum_ptr is not None:
            ptrs = first_chunk(sum_ptr, offs_m, width, 1, BLOCK_N) + start
            z = load_sum(ptrs, None, None, None, 1.0, row_ok, column_ok, True, False, not EVEN)
        else:
            keep, x_bias, r_ptrs = None, None, None
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), offs_m, start, dropout_threshold, BLOCK_N)
            if x_bias_ptr is not None:
                x_bias = load_columns(x_bias_ptr, start, width, not EVEN, BLOCK_N)
            if residual_ptr is not None:
                r_ptrs = first_chunk(residual_ptr, offs_m, stride_r, UNIT, BLOCK_N) + start
            z = load_sum(
                x_ptrs + start, r_ptrs, x_bias, keep, keep_scale, row_ok, column_ok, FLOAT32_SUM, False, not EVEN
            )
        out = (z - mean[:, None]) * rstd[:, None]
        if weight_ptr is not None:
            out *= load_weight(weight_ptr, start, width, ZERO_CENTERED, not EVEN, BLOCK_N)
        if bias_ptr is not None:
            out += load_columns(bias_ptr, start, width, not EVEN, BLOCK_N)
        store_block(out_ptrs + start, out, row_ok, column_ok, False, not EVEN)
        if also_ptr is not None:
            ptrs = first_chunk(also_ptr, offs_m, width, 1, BLOCK_N) + start
            store_block(ptrs, out, row_ok, column_ok, False, not EVEN)


# With more than a plain sum in flight registers hold less of a row.
MAX_WIDTH_IN_REGISTERS = 16384
MAX_WIDTH_WITH_DROPOUT = 8192
_WIDE_BLOCK, _WIDE_WARPS = 4096, 16
_PROGRAMS_PER_UNIT = 8  # fill every unit with warps; with more rows than that each program takes more of them


Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The output, the sum, statistics of the rows and the second copy of the output."""


def add_norm_forward(like: Tensors, options: Options, needs: tuple[bool, ...]) -> Callable[..., Results]:
    """A function of the tensors of a call that launches a kernel: the output, and where they are needed the sum, the
    reciprocal deviations of all rows, followed by their means (of LayerNorm), and a second copy of the output."""
    check_width(like.x)
    x, index = like.x, like.x.device.index
    width, of_sum = x.shape[-1], sum_dtype(x, options)
    of_out, of_also = options.out_dtype or x.dtype, options.also_dtype
    store_sum, per_row = stores_sum(like, options, needs), 0 if not needs else 1 if options.rms else 2
    plain = all(t is None or t.is_contiguous() for t in like[:2])
    as_x, sum_as_out = plain and of_out == x.dtype, of_sum == of_out
    strides = (row_stride(x), 0 if like.residual is None else row_stride(like.residual))
    unit = unit_of(width, *strides)
    fixed = (
        *(stride // unit for stride in strides), width // unit, options.eps, dropout.threshold(options.dropout_p),
        dropout.keep_scale(options.dropout_p),
    )  # fmt: skip
    switches = {
        "RMS": options.rms, "ZERO_CENTERED": options.zero_centered, "FLOAT32_SUM": options.float32_sum, "UNIT": unit,
    }  # fmt: skip
    simple = like.seed is None and like.x_bias is None
    wide = width > (MAX_WIDTH_IN_REGISTERS if simple else MAX_WIDTH_WITH_DROPOUT)
    warp = gpu.lanes(index)
    if wide:
        go = launch(
            add_norm_wide_forward_kernel, index, *fixed, **switches, EVEN=width % _WIDE_BLOCK == 0,
            BLOCK_N=_WIDE_BLOCK, num_warps=_WIDE_WARPS * 32 // warp,
        )  # fmt: skip
        block_m, most = 1, 1
    else:
        shape = row_shape(width, smallest_item(x, like.residual, of_out, of_also), warp)
        go = launch(
            add_norm_forward_kernel, index, *fixed, **switches, EVEN=width == shape.columns, CHUNKS=shape.chunks,
            BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, num_warps=shape.num_warps,
        )  # fmt: skip
        block_m, most = shape.block_m, _PROGRAMS_PER_UNIT * gpu.compute_units(index)

    def run(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
        seed: Tensor | None,
    ) -> Results:  # fmt: skip
        out = torch.empty_like(x) if as_x else x.new_empty(x.shape, dtype=of_out)
        also = None if of_also is None else x.new_empty(x.shape, dtype=of_also)
        total = None
        if store_sum:
            total = torch.empty_like(out) if sum_as_out else x.new_empty(x.shape, dtype=of_sum)
        rows = x.numel() // width
        statistics = None
        if per_row:
            statistics = x.new_empty(per_row * rows, dtype=torch.float32)
        if not plain:
            x, residual = as_rows(x), None if residual is None else as_rows(residual)
        tensors = (x, residual, weight, bias, x_bias, seed, out, also, total, statistics)
        if rows and wide:
            go(rows, 1, *tensors, rows)
        elif rows:
            rows_per_program = -(-rows // (most * block_m)) * block_m
            go(-(-rows // rows_per_program), 1, *tensors, rows, rows_per_program)
        return out, total, statistics, also

    return run
