"""embed_norm forward: one kernel and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks, dropout
from ..common import device as gpu
from ..common.blocks import dropout_keep
from .blocks import (
    MAX_WIDTH,
    grid,
    held_rows,
    lookup_arguments,
    row_chunk,
    row_chunks,
    statistics_tensor,
    sum_chunk,
    tiling,
    tokens_of,
)
from .eager import Options, Tables


@triton.jit(do_not_specialize=["rows", "length", "parts", "parts_per_program", "tiles", "positions"])
def embed_norm_forward_kernel(
    word_ptr, position_ptr, type_ptr, ids_ptr, position_ids_ptr, type_ids_ptr, weight_ptr, bias_ptr, seed_ptr,
    out_ptr, mean_ptr, rstd_ptr, vocabulary, positions, types, rows, length, parts, parts_per_program, tiles,
    width, eps, dropout_threshold, keep_scale,
    POSITION: tl.constexpr, HAS_POSITION_IDS: tl.constexpr, TYPE: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, RMS: tl.constexpr,
    STORE_STATISTICS: tl.constexpr, HELD: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # One program takes BLOCK_M neighbouring positions and walks over some sequences; a token's whole row is in
    # registers, in CHUNKS pieces. It reads each token's word row once and writes its result once; rows of positions,
    # of two types, weight and bias are read once a program. The summed embeddings never reach memory.
    #   z = word + type + position    out = dropout((z - mean) * rstd * weight + bias)    rstd = 1 / sqrt(var + eps)
    # The variance is the mean square of the centred row: no cancellation (Ba et al., 2016, equation 3); RMSNorm has
    # no mean (Zhang and Sennrich, 2019). A token with an id out of range reads nothing and becomes NaN.
    column = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_ok = column < length
    held = held_rows(
        position_ptr, type_ptr, column, column_ok, types, width, POSITION, TYPE, HAS_TYPE_IDS, CHUNKS, C, EVEN
    )
    weight, bias = (), ()
    if HAS_WEIGHT and HELD:
        weight = row_chunks(weight_ptr, width, CHUNKS, C, EVEN)
    if HAS_BIAS and HELD:
        bias = row_chunks(bias_ptr, width, CHUNKS, C, EVEN)
    first = (tl.program_id(0) // tiles) * parts_per_program
    for part in range(first, tl.minimum(first + parts_per_program, parts)):
        row = tl.cast(part, tl.int64) * length + column
        row_ok = column_ok & (row < rows)
        word, position, type_, ok = tokens_of(
            row, row_ok, column, ids_ptr, position_ids_ptr, type_ids_ptr, vocabulary, positions, types,
            POSITION, HAS_POSITION_IDS, TYPE, HAS_TYPE_IDS,
        )  # fmt: skip
        z = ()
        total = tl.zeros((BLOCK_M, C), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            piece = sum_chunk(
                word_ptr, position_ptr, type_ptr, word, position, type_, ok, held, chunk, width,
                POSITION, TYPE, HAS_TYPE_IDS, C, EVEN,
            )  # fmt: skip
            z = z + (piece,)
            total += piece
        mean = tl.sum(total, 1) / width
        squares = tl.zeros((BLOCK_M, C), tl.float32)
        centred = ()
        for chunk in tl.static_range(CHUNKS):
            piece = z[chunk]
            if not RMS:
                piece = piece - mean[:, None]
                if not EVEN:
                    piece = tl.where((chunk * C + tl.arange(0, C) < width)[None, :], piece, 0.0)
            centred = centred + (piece,)
            squares += piece * piece
        variance = tl.sum(squares, 1) / width + eps
        rstd = tl.where(variance == 0.0, 0.0, tl.math.rsqrt(variance))  # keeps a NaN
        for chunk in tl.static_range(CHUNKS):
            out = centred[chunk] * rstd[:, None]
            if HAS_WEIGHT:
                w = weight[chunk] if HELD else row_chunk(weight_ptr, chunk, width, C, EVEN)
                out *= w.to(tl.float32)
            if HAS_BIAS:
                b = bias[chunk] if HELD else row_chunk(bias_ptr, chunk, width, C, EVEN)
                out += b.to(tl.float32)
            if DROPOUT:
                keep = dropout_keep(tl.load(seed_ptr), row, chunk * C, dropout_threshold, C)
                out = tl.where(keep, out * keep_scale, 0.0)
            out = tl.where(ok[:, None], out, float("nan"))
            columns = chunk * C + tl.arange(0, C)
            inside = row_ok[:, None] if EVEN else row_ok[:, None] & (columns < width)[None, :]
            tl.store(out_ptr + row[:, None] * width + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
        if STORE_STATISTICS:
            tl.store(rstd_ptr + row, rstd, mask=row_ok)
            if not RMS:
                tl.store(mean_ptr + row, mean, mask=row_ok)


_PROGRAMS_PER_UNIT = 8


def embed_norm_forward(
    tables: Tables, options: Options, store_statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the kernel: the output, and where asked for the means (none for "rms") and reciprocal deviations."""
    word = tables.word
    width = word.shape[1]
    if width > MAX_WIDTH:
        checks.fail_value("word_weight", f"a width of at most {MAX_WIDTH} on the kernels", word)
    dtype = torch.float32 if options.wide else word.dtype
    out = torch.empty((*tables.ids.shape, width), dtype=dtype, device=word.device)
    mean = statistics_tensor(tables) if store_statistics and not options.rms else None
    rstd = statistics_tensor(tables) if store_statistics else None
    if out.numel() == 0:
        return out, mean, rstd
    tile = tiling(width)
    share = grid(tables, tile, _PROGRAMS_PER_UNIT)
    pointers, counts, switches = lookup_arguments(tables, tile, out)
    with gpu.on_device_of(word):
        embed_norm_forward_kernel[(share.programs,)](
            *pointers, *(out if t is None else t.contiguous() for t in (tables.norm_weight, tables.norm_bias)),
            out if tables.seed is None else tables.seed, out, out if mean is None else mean,
            out if rstd is None else rstd, *counts, *share, width, options.eps,
            dropout.threshold(options.dropout_p), dropout.keep_scale(options.dropout_p), **switches,
            HAS_WEIGHT=tables.norm_weight is not None, HAS_BIAS=tables.norm_bias is not None,
            DROPOUT=tables.seed is not None, RMS=options.rms, STORE_STATISTICS=store_statistics, HELD=tile.held,
            num_warps=tile.num_warps, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return out, mean, rstd
