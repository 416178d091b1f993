"""embed_norm backward: the rows' gradient, its sums over the tokens of a table's row, and their launchers."""

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
from ..common.column_sums import BLOCK_N, BLOCK_P, add_up_columns
from ..common.plan import as_rows, launch, row_stride
from .arguments import Options, Tables
from .blocks import (
    as_read,
    chunk_of_rows,
    held_rows,
    layout,
    row_chunk,
    sharing,
    sum_chunk,
    tokens_of,
)


@triton.jit(do_not_specialize=["rows", "length", "parts", "parts_per_program", "tiles", "counts"])
def embed_norm_backward_kernel(
    tables, dout_ptr, statistics_ptr, dz_ptr, partial_ptr, rows, length, parts, parts_per_program, tiles,
    counts, stride_do, width, dropout_threshold, keep_scale, RMS: tl.constexpr, HELD: tl.constexpr,
    HELD_TYPES: tl.constexpr, NORM_SUMS: tl.constexpr, TYPE_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # The programs of the forward pass again. One reads each of its tokens' dout once and, instead of a saved sum, the
    # rows of the tables again; it writes the gradient of the summed embeddings once, and keeps its share of the
    # gradients of weight and bias (NORM_SUMS) and of up to two types (TYPE_SUMS) in registers until the end, when they
    # become one row of `partial`.
    #   xhat = (z - mean) * rstd    g = dropout(dout) * weight
    #   dz = rstd * (g - mean(g) - xhat * mean(g * xhat))    (Ba et al., 2016; RMSNorm has no mean and no mean(g))
    #   dweight = sum of dropout(dout) * xhat    dbias = sum of dropout(dout)    dtype[t] = sum of dz over type t
    # A token with an id out of range gives 0 to all.
    column = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_ok = column < length
    held = held_rows(tables, counts, column, column_ok, width, HELD, HELD_TYPES, CHUNKS, C, EVEN)
    SUMS: tl.constexpr = NORM_SUMS + TYPE_SUMS
    sums = ()  # of all kinds for each chunk
    for _ in tl.static_range(CHUNKS * SUMS):
        sums = sums + (tl.zeros((BLOCK_M, C), tl.float32),)
    first = (tl.program_id(0) // tiles) * parts_per_program
    for part in range(first, tl.minimum(first + parts_per_program, parts)):
        row = tl.cast(part, tl.int64) * length + column
        row_ok = column_ok & (row < rows)
        token = tokens_of(tables, counts, row, row_ok, column)
        type_, ok = token[2], token[3]
        rstd = tl.load(statistics_ptr + row, mask=ok, other=0.0)[:, None]
        mean = 0.0 if RMS else tl.load(statistics_ptr + rows + row, mask=ok, other=0.0)[:, None]
        normed, grads, norms, new_sums = (), (), (), ()
        sum_g = tl.zeros((BLOCK_M, C), tl.float32)
        sum_gx = tl.zeros((BLOCK_M, C), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            xhat = (sum_chunk(tables, token, held, chunk, width, HELD, HELD_TYPES, C, EVEN) - mean) * rstd
            g = chunk_of_rows(dout_ptr, row, ok, chunk, stride_do, width, C, EVEN).to(tl.float32)
            if tables.seed is not None:
                keep = dropout_keep(tl.load(tables.seed), row, chunk * C, dropout_threshold, C)
                g = tl.where(keep, g * keep_scale, 0.0)
            if NORM_SUMS > 0:
                norms = norms + ((sums[chunk * SUMS] + g * xhat, sums[chunk * SUMS + 1] + g),)
            if tables.norm_weight is not None:
                w = held[3][chunk] if HELD else row_chunk(tables.norm_weight, chunk, width, C, EVEN)
                g *= w.to(tl.float32)
            sum_g += g
            sum_gx += g * xhat
            normed = normed + (xhat,)
            grads = grads + (g,)
        mean_gx = (tl.sum(sum_gx, 1) / width)[:, None]
        mean_g = 0.0 if RMS else (tl.sum(sum_g, 1) / width)[:, None]
        for chunk in tl.static_range(CHUNKS):
            dz = (grads[chunk] - normed[chunk] * mean_gx - mean_g) * rstd
            columns = chunk * C + tl.arange(0, C)
            inside = row_ok[:, None] if EVEN else row_ok[:, None] & (columns < width)[None, :]
            tl.store(dz_ptr + row[:, None] * width + columns[None, :], dz.to(dz_ptr.dtype.element_ty), mask=inside)
            if NORM_SUMS > 0:
                new_sums = new_sums + norms[chunk]
            for t in tl.static_range(TYPE_SUMS):
                of_type = tl.where(type_[:, None] == t, dz, 0.0) if TYPE_SUMS > 1 else dz
                new_sums = new_sums + (sums[chunk * SUMS + NORM_SUMS + t] + of_type,)
        sums = new_sums
    for i in tl.static_range(CHUNKS * SUMS):
        columns = (i // SUMS) * C + tl.arange(0, C)
        partial = partial_ptr + (tl.program_id(0).to(tl.int64) * SUMS + i % SUMS) * width
        tl.store(partial + columns, tl.sum(sums[i], 0), mask=columns < width)


@triton.jit(do_not_specialize=["rows", "length", "parts", "parts_per_program", "tiles", "counts"])
def embed_norm_columns_kernel(
    tables, dout_ptr, statistics_ptr, partial_ptr, rows, length, parts, parts_per_program, tiles,
    counts, stride_do, width, dropout_threshold, keep_scale,
    RMS: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # For rows so wide that a program's registers cannot hold the sums beside them: one program takes C columns of some
    # tokens, reads dout and the rows of the tables once more, and writes its share of dweight and dbias once.
    chunk = tl.program_id(1)
    column = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    dweight = tl.zeros((BLOCK_M, C), tl.float32)
    dbias = tl.zeros((BLOCK_M, C), tl.float32)
    first = (tl.program_id(0) // tiles) * parts_per_program
    for part in range(first, tl.minimum(first + parts_per_program, parts)):
        row = tl.cast(part, tl.int64) * length + column
        token = tokens_of(tables, counts, row, (column < length) & (row < rows), column)
        ok = token[3]
        rstd = tl.load(statistics_ptr + row, mask=ok, other=0.0)[:, None]
        mean = 0.0 if RMS else tl.load(statistics_ptr + rows + row, mask=ok, other=0.0)[:, None]
        xhat = (sum_chunk(tables, token, ((), (), ()), chunk, width, False, False, C, EVEN) - mean) * rstd
        dout = chunk_of_rows(dout_ptr, row, ok, chunk, stride_do, width, C, EVEN).to(tl.float32)
        if tables.seed is not None:
            keep = dropout_keep(tl.load(tables.seed), row, chunk * C, dropout_threshold, C)
            dout = tl.where(keep, dout * keep_scale, 0.0)
        dweight += dout * xhat
        dbias += dout
    columns = chunk * C + tl.arange(0, C)
    sums = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * width + columns
    tl.store(sums, tl.sum(dweight, 0), mask=columns < width)
    tl.store(sums + width, tl.sum(dbias, 0), mask=columns < width)


@triton.jit(do_not_specialize=["tokens", "padding"])
def segment_sums_kernel(
    sorted_ptr, order_ptr, dz_ptr, out_ptr, partial_ptr, tokens, table_rows, padding, width,
    STRETCH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # With the tokens sorted by the row they read, one program walks over STRETCH of them in order and adds up BLOCK_N
    # columns of their gradients, each read once. A segment of equal ids that lies within the stretch is written to its
    # row of the table's gradient; what a stretch has of a segment that others have too goes to `partial`: at its front
    # (0), or at its end if the segment begins here (1).
    stretch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < width
    first = stretch * STRETCH
    last = tl.minimum(first + STRETCH, tokens)
    partial = partial_ptr + stretch * 2 * width + columns
    total = tl.zeros((BLOCK_N,), tl.float32)
    began_before = tl.where(first > 0, 1, 0)
    for start in range(first, last):
        i = tl.cast(start, tl.int64)
        table_row = tl.load(sorted_ptr + i).to(tl.int64)
        begins = (i == 0) | (tl.load(sorted_ptr + tl.maximum(i - 1, 0)).to(tl.int64) != table_row)
        ends = (i + 1 == tokens) | (tl.load(sorted_ptr + tl.minimum(i + 1, tokens - 1)).to(tl.int64) != table_row)
        gradient = tl.load(dz_ptr + tl.load(order_ptr + i) * width + columns, mask=column_ok, other=0.0).to(tl.float32)
        total = tl.where(begins, gradient, total + gradient)
        began_before = tl.where(begins, 0, began_before)
        whole, cut = ends & (began_before == 0), (i + 1 == last) & (ends == 0)
        wanted = (table_row >= 0) & (table_row < table_rows) & (table_row != padding)
        row = out_ptr + table_row * width + columns
        tl.store(row, total.to(out_ptr.dtype.element_ty), mask=columns < tl.where(wanted & whole, width, 0))
        tl.store(partial, total, mask=columns < tl.where((ends | cut) & (began_before == 1), width, 0))
        tl.store(partial + width, total, mask=columns < tl.where(cut & (began_before == 0), width, 0))


@triton.jit(do_not_specialize=["tokens", "padding"])
def segment_joins_kernel(
    sorted_ptr, partial_ptr, out_ptr, tokens, table_rows, padding, width,
    STRETCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program joins the segment, if there is one, that begins in its stretch and goes on after it: it adds the
    # stretch's end and the fronts of the following ones, BLOCK_P at a time, and writes the table's row once.
    stretch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < width
    first, after = stretch * STRETCH, (stretch + 1) * STRETCH
    if after < tokens:
        table_row = tl.load(sorted_ptr + after - 1).to(tl.int64)
        before = tl.load(sorted_ptr + tl.maximum(first - 1, 0)).to(tl.int64)
        begins_here = (tl.load(sorted_ptr + first).to(tl.int64) != table_row) | (first == 0) | (before != table_row)
        wanted = (table_row >= 0) & (table_row < table_rows) & (table_row != padding)
        goes_on = wanted & begins_here & (tl.load(sorted_ptr + after).to(tl.int64) == table_row)
        if goes_on:
            total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
            next_ = stretch + 1
            while goes_on:
                others = next_ + tl.arange(0, BLOCK_P)
                there = others * STRETCH < tokens
                fronts = tl.load(sorted_ptr + others * STRETCH, mask=there, other=0).to(tl.int64)
                same = there & (fronts == table_row)
                ptrs = partial_ptr + others[:, None] * 2 * width + columns[None, :]
                total += tl.load(ptrs, mask=same[:, None] & column_ok[None, :], other=0.0)
                next_ += BLOCK_P
                goes_on = tl.sum(same.to(tl.int32), 0) == BLOCK_P
            end = tl.load(partial_ptr + (stretch * 2 + 1) * width + columns, mask=column_ok, other=0.0)
            row = out_ptr + table_row * width + columns
            tl.store(row, (end + tl.sum(total, 0)).to(out_ptr.dtype.element_ty), mask=column_ok)


@triton.jit(do_not_specialize=["rows", "length", "sequences", "positions"])
def embed_norm_sums_kernel(
    dz_ptr, dposition_ptr, partial_ptrs, out_ptrs, rows, length, sequences, positions, width, offsets, strides, widths,
    JOBS: tl.constexpr,
):  # fmt: skip
    # One program adds up BLOCK_N columns of the gradients of a position over the sequences, each read once; a position
    # past the sequences gets 0. On the side the programs sum the rows of partial matrices.
    if dposition_ptr is not None:
        position = tl.program_id(0) // tl.cdiv(width, BLOCK_N)
        columns = tl.program_id(0) % tl.cdiv(width, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = columns < tl.where(position < positions, width, 0)
        total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        for start in range(0, tl.where(position < length, sequences, 0), BLOCK_P):
            sequence = start + tl.arange(0, BLOCK_P)
            row = (sequence.to(tl.int64) * length + position)[:, None]
            inside = (sequence < sequences)[:, None] & column_ok[None, :]
            total += tl.load(dz_ptr + row * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        out = dposition_ptr + position.to(tl.int64) * width + columns
        tl.store(out, tl.sum(total, 0).to(dposition_ptr.dtype.element_ty), mask=column_ok)
    add_up_columns(partial_ptrs, out_ptrs, rows, offsets, strides, widths, JOBS)


_STRETCH, _BLOCK_P, _BLOCK_N = 32, 16, 256


def segment_sums(like: Any, padding: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of a table, ``dz [tokens, width]`` and ids that launches both kernels: the gradient of the table, for
    each row the sum of `dz` over the tokens whose id it is.

    The stable sort makes the order of the additions that of the tokens, whatever the GPU does; nothing waits for it.
    """
    (table_rows, width), index = like.shape, like.device.index
    block_n = min(_BLOCK_N, max(16, gpu.power_of_2(width)))
    fixed, blocks = (table_rows, padding, width), triton.cdiv(width, block_n)
    add = launch(segment_sums_kernel, index, *fixed, STRETCH=_STRETCH, BLOCK_N=block_n, num_warps=1)
    join = launch(segment_joins_kernel, index, *fixed, STRETCH=_STRETCH, BLOCK_P=_BLOCK_P, BLOCK_N=block_n, num_warps=4)

    def run(table: Tensor, dz: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(table)
        in_order, order = torch.sort(ids.view(-1), stable=True)
        tokens = in_order.shape[0]
        stretches = -(-tokens // _STRETCH)
        partial = dz.new_empty(stretches * 2 * width, dtype=torch.float32)
        add(stretches, blocks, in_order, order, dz, out, partial, tokens)
        if stretches > 1:
            join(stretches - 1, blocks, in_order, partial, out, tokens)
        return out

    return run


_PROGRAMS_PER_UNIT = 2
_COLUMNS = 1024  # at a time, of the sums for wide rows


def embed_norm_backward(
    dout: Tensor, like: Tables, options: Options, needs: Sequence[bool]
) -> Callable[..., Sequence[Tensor | None]]:
    """A function of upstream gradient, tables and statistics that launches the kernels: the gradients of the five
    tables as far as `needs` says."""
    need_word, need_position, need_type, need_weight, need_bias = needs
    index, width, (plain, counts, constants) = like.word.device.index, like.word.shape[1], layout(like)
    rowwise, held, types = dout.is_contiguous(), constants["HELD"], 0
    if need_type and held:  # types whose gradients a program sums in registers, beside those of weight and bias
        types = 1 if like.type_ids is None else counts[2] if counts[2] <= 2 else 0
    norms = 2 if need_weight or need_bias else 0
    columns = (norms + types) * width
    fixed = (
        counts, row_stride(dout), width, dropout.threshold(options.dropout_p),
        dropout.keep_scale(options.dropout_p),
    )  # fmt: skip
    go = launch(
        embed_norm_backward_kernel, index, *fixed, RMS=options.rms, NORM_SUMS=norms if held else 0, TYPE_SUMS=types,
        **constants,
    )  # fmt: skip
    share = sharing(like, _PROGRAMS_PER_UNIT * gpu.compute_units(index), constants["BLOCK_M"])
    sum_columns = launch(
        embed_norm_columns_kernel, index, *fixed, RMS=options.rms, BLOCK_M=constants["BLOCK_M"], C=_COLUMNS,
        EVEN=width % _COLUMNS == 0,
    )  # fmt: skip
    counted = need_position and like.position_ids is None
    gathered = (need_word, need_position and not counted, need_type and not types)
    segments = [(i, segment_sums(like[i], options.padding_idx if i == 0 else -1)) for i in range(3) if gathered[i]]
    # Sums of partial rows: place of the gradient, first column, columns.
    jobs = [(3, 0, width)] * need_weight + [(4, width, width)] * need_bias
    jobs += [(2, norms * width, types * width)] * (types > 0)
    places, offsets, widths = zip(*jobs, strict=True) if jobs else ((), (), ())
    finish = launch(
        embed_norm_sums_kernel, index, counts[1], width, offsets, (columns,) * len(jobs), widths, JOBS=len(jobs)
    )
    blocks = [-(-w // BLOCK_N.value) for w in (width, *widths)]
    finishers = max(counts[1] * blocks[0] if counted else 0, sum(blocks[1:]))

    def run(grads: Sequence[Tensor], saved: Sequence[Any]) -> Sequence[Tensor | None]:
        tables: Any = Tables(*saved[:-1]) if plain else as_read(Tables(*saved[:-1]))
        (dout,), ids, statistics = grads, tables.ids, saved[-1]
        if ids.numel() == 0:
            return [torch.zeros_like(t) if need else None for t, need in zip(tables, needs, strict=False)]
        dout = dout if rowwise else as_rows(dout)
        dz = torch.empty_like(dout, memory_format=torch.contiguous_format)
        programs, numbers = share(ids)
        partial = dz.new_empty(programs * columns, dtype=torch.float32) if columns else None
        go(programs, 1, tables, dout, statistics, dz, partial, *numbers)
        if norms and not held:
            sum_columns(programs, -(-width // _COLUMNS), tables, dout, statistics, partial, *numbers)
        found: list[Tensor | None] = [None] * 5
        for i, add_up in segments:
            of_tokens = tables[5 + i]
            found[i] = add_up(tables[i], dz, torch.zeros_like(ids) if of_tokens is None else of_tokens)
        for i in places:
            found[i] = torch.zeros_like(tables[i]) if i == 2 and types < counts[2] else torch.empty_like(tables[i])
        if counted:
            found[1] = torch.empty_like(tables.position)
        if finishers:
            length, outs = ids.shape[-1], tuple([found[i] for i in places])
            finish(
                finishers, 1, dz, found[1] if counted else None, (partial,) * len(outs), outs,
                (programs,) * len(outs), length, ids.numel() // length,
            )  # fmt: skip
        return found

    return run
