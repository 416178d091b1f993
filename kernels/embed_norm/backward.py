"""embed_norm backward: the rows' gradient, its sums over the tokens of a table's row, and their launchers."""

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
from .blocks import (
    as_rows,
    chunk_of_rows,
    grid,
    held_rows,
    lookup_arguments,
    row_chunk,
    row_chunks,
    sum_chunk,
    tiling,
    tokens_of,
)
from .eager import Options, Tables


@triton.jit
def output_gradient(
    dout_ptr, seed_ptr, row, ok, chunk, stride, width, dropout_threshold, keep_scale,
    DROPOUT: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """C columns of dropout(dout), float32 ``[BM, C]``."""
    dout = chunk_of_rows(dout_ptr, row, ok, chunk, stride, width, C, EVEN).to(tl.float32)
    if DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), row, chunk * C, dropout_threshold, C)
        dout = tl.where(keep, dout * keep_scale, 0.0)
    return dout


@triton.jit(do_not_specialize=["rows", "length", "parts", "parts_per_program", "tiles", "positions"])
def embed_norm_backward_kernel(
    word_ptr, position_ptr, type_ptr, ids_ptr, position_ids_ptr, type_ids_ptr, weight_ptr, seed_ptr,
    dout_ptr, mean_ptr, rstd_ptr, dz_ptr, partial_ptr, vocabulary, positions, types,
    rows, length, parts, parts_per_program, tiles, stride_do, width, dropout_threshold, keep_scale,
    POSITION: tl.constexpr, HAS_POSITION_IDS: tl.constexpr, TYPE: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, RMS: tl.constexpr, HELD: tl.constexpr,
    NORM_SUMS: tl.constexpr, TYPE_SUMS: tl.constexpr,
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
    held = held_rows(
        position_ptr, type_ptr, column, column_ok, types, width, POSITION, TYPE, HAS_TYPE_IDS, CHUNKS, C, EVEN
    )
    weight = ()
    if HAS_WEIGHT and HELD:
        weight = row_chunks(weight_ptr, width, CHUNKS, C, EVEN)
    dweight, dbias, dfirst, dsecond = (), (), (), ()
    for _ in tl.static_range(CHUNKS):
        if NORM_SUMS:
            dweight = dweight + (tl.zeros((BLOCK_M, C), tl.float32),)
            dbias = dbias + (tl.zeros((BLOCK_M, C), tl.float32),)
        if TYPE_SUMS >= 1:
            dfirst = dfirst + (tl.zeros((BLOCK_M, C), tl.float32),)
        if TYPE_SUMS == 2:
            dsecond = dsecond + (tl.zeros((BLOCK_M, C), tl.float32),)
    first = (tl.program_id(0) // tiles) * parts_per_program
    for part in range(first, tl.minimum(first + parts_per_program, parts)):
        row = tl.cast(part, tl.int64) * length + column
        row_ok = column_ok & (row < rows)
        word, position, type_, ok = tokens_of(
            row, row_ok, column, ids_ptr, position_ids_ptr, type_ids_ptr, vocabulary, positions, types,
            POSITION, HAS_POSITION_IDS, TYPE, HAS_TYPE_IDS,
        )  # fmt: skip
        rstd = tl.load(rstd_ptr + row, mask=ok, other=0.0)[:, None]
        if not RMS:
            mean = tl.load(mean_ptr + row, mask=ok, other=0.0)[:, None]
        normed, grads, new_dweight, new_dbias = (), (), (), ()
        sum_g = tl.zeros((BLOCK_M, C), tl.float32)
        sum_gx = tl.zeros((BLOCK_M, C), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            xhat = sum_chunk(
                word_ptr, position_ptr, type_ptr, word, position, type_, ok, held, chunk, width,
                POSITION, TYPE, HAS_TYPE_IDS, C, EVEN,
            )  # fmt: skip
            if not RMS:
                xhat = xhat - mean
            xhat = xhat * rstd
            g = output_gradient(
                dout_ptr, seed_ptr, row, ok, chunk, stride_do, width, dropout_threshold, keep_scale, DROPOUT, C, EVEN
            )
            if NORM_SUMS:
                new_dweight = new_dweight + (dweight[chunk] + g * xhat,)
                new_dbias = new_dbias + (dbias[chunk] + g,)
            if HAS_WEIGHT:
                w = weight[chunk] if HELD else row_chunk(weight_ptr, chunk, width, C, EVEN)
                g *= w.to(tl.float32)
            sum_g += g
            sum_gx += g * xhat
            normed = normed + (xhat,)
            grads = grads + (g,)
        dweight, dbias = new_dweight, new_dbias
        mean_gx = (tl.sum(sum_gx, 1) / width)[:, None]
        if not RMS:
            mean_g = (tl.sum(sum_g, 1) / width)[:, None]
        new_dfirst, new_dsecond = (), ()
        for chunk in tl.static_range(CHUNKS):
            dz = grads[chunk] - normed[chunk] * mean_gx
            if not RMS:
                dz = dz - mean_g
            dz = dz * rstd
            columns = chunk * C + tl.arange(0, C)
            inside = row_ok[:, None] if EVEN else row_ok[:, None] & (columns < width)[None, :]
            tl.store(dz_ptr + row[:, None] * width + columns[None, :], dz.to(dz_ptr.dtype.element_ty), mask=inside)
            if TYPE_SUMS == 1:
                new_dfirst = new_dfirst + (dfirst[chunk] + dz,)
            if TYPE_SUMS == 2:
                new_dfirst = new_dfirst + (dfirst[chunk] + tl.where(type_[:, None] == 0, dz, 0.0),)
                new_dsecond = new_dsecond + (dsecond[chunk] + tl.where(type_[:, None] == 0, 0.0, dz),)
        dfirst, dsecond = new_dfirst, new_dsecond
    sums = partial_ptr + tl.program_id(0).to(tl.int64) * ((2 if NORM_SUMS else 0) + TYPE_SUMS) * width
    if NORM_SUMS:
        store_sums(sums, dweight, width, CHUNKS, C, EVEN)
        store_sums(sums + width, dbias, width, CHUNKS, C, EVEN)
        sums += 2 * width
    if TYPE_SUMS >= 1:
        store_sums(sums, dfirst, width, CHUNKS, C, EVEN)
    if TYPE_SUMS == 2:
        store_sums(sums + width, dsecond, width, CHUNKS, C, EVEN)


@triton.jit
def store_sums(ptr, blocks, width, CHUNKS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr):
    """The sums over the rows of a program's tokens, as one row."""
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * C + tl.arange(0, C)
        if EVEN:
            tl.store(ptr + columns, tl.sum(blocks[chunk], 0))
        else:
            tl.store(ptr + columns, tl.sum(blocks[chunk], 0), mask=columns < width)


@triton.jit(do_not_specialize=["rows", "length", "parts", "parts_per_program", "tiles", "positions"])
def embed_norm_columns_kernel(
    word_ptr, position_ptr, type_ptr, ids_ptr, position_ids_ptr, type_ids_ptr, seed_ptr,
    dout_ptr, mean_ptr, rstd_ptr, partial_ptr, vocabulary, positions, types,
    rows, length, parts, parts_per_program, tiles, stride_do, width, dropout_threshold, keep_scale,
    POSITION: tl.constexpr, HAS_POSITION_IDS: tl.constexpr, TYPE: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
    DROPOUT: tl.constexpr, RMS: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
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
        word, position, type_, ok = tokens_of(
            row, (column < length) & (row < rows), column, ids_ptr, position_ids_ptr, type_ids_ptr,
            vocabulary, positions, types, POSITION, HAS_POSITION_IDS, TYPE, HAS_TYPE_IDS,
        )  # fmt: skip
        xhat = chunk_of_rows(word_ptr, word, ok, chunk, width, width, C, EVEN).to(tl.float32)
        if TYPE != "none":
            xhat += chunk_of_rows(type_ptr, type_, ok, chunk, width, width, C, EVEN).to(tl.float32)
        if POSITION != "none":
            xhat += chunk_of_rows(position_ptr, position, ok, chunk, width, width, C, EVEN).to(tl.float32)
        if not RMS:
            xhat -= tl.load(mean_ptr + row, mask=ok, other=0.0)[:, None]
        xhat *= tl.load(rstd_ptr + row, mask=ok, other=0.0)[:, None]
        dout = output_gradient(
            dout_ptr, seed_ptr, row, ok, chunk, stride_do, width, dropout_threshold, keep_scale, DROPOUT, C, EVEN
        )
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
        begins_here = (tl.load(sorted_ptr + first).to(tl.int64) != table_row) | (first == 0)
        begins_here = begins_here | (tl.load(sorted_ptr + tl.maximum(first - 1, 0)).to(tl.int64) != table_row)
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


_STRETCH = 32
_BLOCK_P = 16
_BLOCK_N = 256


def segment_sums(dz: Tensor, ids: Tensor, table_rows: int, dtype: torch.dtype, padding: int = -1) -> Tensor:
    """Launch both kernels: for each row of a table the sum of ``dz [tokens, width]`` over the tokens whose id it is.

    The stable sort makes the order of the additions that of the tokens, whatever the GPU does; nothing waits for it.
    """
    tokens, width = dz.shape
    out = torch.zeros((table_rows, width), dtype=dtype, device=dz.device)
    if dz.numel() == 0:
        return out
    in_order, order = torch.sort(ids, stable=True)
    stretches = triton.cdiv(tokens, _STRETCH)
    partial = torch.empty((stretches, 2, width), dtype=torch.float32, device=dz.device)
    block_n = min(_BLOCK_N, max(16, gpu.power_of_2(width)))
    programs = (stretches, triton.cdiv(width, block_n))
    with gpu.on_device_of(dz):
        segment_sums_kernel[programs](
            in_order, order, dz, out, partial, tokens, table_rows, padding, width,
            STRETCH=_STRETCH, BLOCK_N=block_n, num_warps=1, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
        if stretches > 1:
            segment_joins_kernel[(stretches - 1, programs[1])](
                in_order, partial, out, tokens, table_rows, padding, width,
                STRETCH=_STRETCH, BLOCK_P=_BLOCK_P, BLOCK_N=block_n, num_warps=4, **gpu.COMPILE_OPTIONS,
            )  # fmt: skip
    return out


_PROGRAMS_PER_UNIT = 2
_COLUMNS_TILE = (16, 64)
"""Tokens and columns at a time of the sums for wide rows."""


def embed_norm_backward(
    dout: Tensor, mean: Tensor | None, rstd: Tensor, tables: Tables, options: Options, needs: Sequence[bool],
    sums: ColumnSums,
) -> list[Tensor | None]:  # fmt: skip
    """Launch the kernels: the gradients of the five tables as far as `needs` says; some are filled by `sums.launch`."""
    word, width, length = tables.word, tables.word.shape[1], tables.ids.shape[-1]
    dtype, device = word.dtype, word.device
    flat_do = as_rows(dout)
    grads: list[Tensor | None] = [None] * 5
    tensors = (tables.word, tables.position, tables.type, tables.norm_weight, tables.norm_bias)
    if dout.numel() == 0:
        return [torch.zeros_like(t) if want and t is not None else None for t, want in zip(tensors, needs, strict=True)]
    dz = torch.empty(flat_do.shape, dtype=dout.dtype, device=device)
    tile = tiling(width)
    share = grid(tables, tile, _PROGRAMS_PER_UNIT)
    pointers, counts, switches = lookup_arguments(tables, tile, dz)
    types = counts[2] if needs[2] and tile.held and (counts[2] <= 2 or tables.type_ids is None) else 0
    types = min(types, 1) if tables.type_ids is None else types
    norm = 2 if needs[3] or needs[4] else 0
    held_norm = norm if tile.held else 0
    partial = torch.empty((share.programs, held_norm + types, width), dtype=torch.float32, device=device)
    seed, mean = dz if tables.seed is None else tables.seed, rstd if mean is None else mean
    numbers = (dropout.threshold(options.dropout_p), dropout.keep_scale(options.dropout_p))
    weight = dz if tables.norm_weight is None else tables.norm_weight.contiguous()
    common = {"DROPOUT": tables.seed is not None, "RMS": options.rms, **gpu.COMPILE_OPTIONS}
    with gpu.on_device_of(word):
        embed_norm_backward_kernel[(share.programs,)](
            *pointers, weight, seed, flat_do, mean, rstd, dz, partial, *counts, *share, flat_do.stride(0), width,
            *numbers, **switches, **common, HAS_WEIGHT=tables.norm_weight is not None, HELD=tile.held,
            NORM_SUMS=held_norm > 0, TYPE_SUMS=types, num_warps=tile.num_warps,
        )  # fmt: skip
        norm_partial = partial
        if norm > held_norm:
            tile = tile._replace(block_m=_COLUMNS_TILE[0], chunk=_COLUMNS_TILE[1], even=width % _COLUMNS_TILE[1] == 0)
            share = grid(tables, tile, 1)
            norm_partial = torch.empty((share.programs, 2, width), dtype=torch.float32, device=device)
            switches |= {"BLOCK_M": tile.block_m, "C": tile.chunk, "EVEN": tile.even}
            del switches["CHUNKS"]
            embed_norm_columns_kernel[(share.programs, triton.cdiv(width, tile.chunk))](
                *pointers, seed, flat_do, mean, rstd, norm_partial, *counts, *share, flat_do.stride(0), width,
                *numbers, **switches, **common,
            )  # fmt: skip
    if needs[3]:
        grads[3] = sums.add(norm_partial[:, 0], dtype)
    if needs[4]:
        grads[4] = sums.add(norm_partial[:, 1], dtype)
    if needs[0]:
        grads[0] = segment_sums(dz, pointers[3], counts[0], dtype, options.padding_idx)
    if needs[1] and tables.position_ids is not None:
        grads[1] = segment_sums(dz, pointers[4], counts[1], dtype)
    elif needs[1]:
        grads[1] = dposition = torch.empty((counts[1], width), dtype=dtype, device=device)
        dposition[length:].zero_()
        sums.add(dz.view(-1, length * width), dtype, dposition[:length].view(-1))
    if types:
        grads[2] = dtype_rows = torch.empty((counts[2], width), dtype=dtype, device=device)
        dtype_rows[types:].zero_()
        for i in range(types):
            sums.add(partial[:, held_norm + i], dtype, dtype_rows[i])
    elif needs[2]:
        ids = pointers[5] if tables.type_ids is not None else torch.zeros_like(pointers[3])
        grads[2] = segment_sums(dz, ids, counts[2], dtype)
    return grads
