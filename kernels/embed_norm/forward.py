"""embed_norm forward: one kernel and its launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..add_norm.blocks import reciprocal_deviation
from ..common import device as gpu
from ..common import dropout
from ..common.blocks import dropout_keep
from ..common.plan import launch
from .arguments import Options, Tables
from .blocks import (
    as_read,
    held_rows,
    layout,
    row_chunk,
    sharing,
    sum_chunk,
    tokens_of,
)
from .eager import require_ids_in_range


@triton.jit(do_not_specialize=["rows", "length", "parts", "parts_per_program", "tiles", "counts"])
def embed_norm_forward_kernel(
    tables, out_ptr, statistics_ptr, rows, length, parts, parts_per_program, tiles,
    counts, width, eps, dropout_threshold, keep_scale, RMS: tl.constexpr, HELD: tl.constexpr,
    HELD_TYPES: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # One program takes BLOCK_M neighbouring positions and walks over some sequences; a token's whole row is in
    # registers, in CHUNKS pieces. It reads each token's word row once and writes its result once; rows of positions,
    # of two types, weight and bias are read once a program. The summed embeddings never reach memory.
    #   z = word + type + position    out = dropout((z - mean) * rstd * weight + bias)    rstd = 1 / sqrt(var + eps)
    # The variance is the mean square of the centred row: no cancellation (Ba et al., 2016, equation 3); RMSNorm has
    # no mean (Zhang and Sennrich, 2019). A token with an id out of range reads nothing and becomes NaN.
    column = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_ok = column < length
    held = held_rows(tables, counts, column, column_ok, width, HELD, HELD_TYPES, CHUNKS, C, EVEN)
    first = (tl.program_id(0) // tiles) * parts_per_program
    for part in range(first, tl.minimum(first + parts_per_program, parts)):
        row = tl.cast(part, tl.int64) * length + column
        row_ok = column_ok & (row < rows)
        token = tokens_of(tables, counts, row, row_ok, column)
        z = ()
        total = tl.zeros((BLOCK_M, C), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            piece = sum_chunk(tables, token, held, chunk, width, HELD, HELD_TYPES, C, EVEN)
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
        rstd = reciprocal_deviation(tl.sum(squares, 1) / width, eps)
        for chunk in tl.static_range(CHUNKS):
            out = centred[chunk] * rstd[:, None]
            if tables.norm_weight is not None:
                w = held[3][chunk] if HELD else row_chunk(tables.norm_weight, chunk, width, C, EVEN)
                out *= w.to(tl.float32)
            if tables.norm_bias is not None:
                b = held[4][chunk] if HELD else row_chunk(tables.norm_bias, chunk, width, C, EVEN)
                out += b.to(tl.float32)
            if tables.seed is not None:
                keep = dropout_keep(tl.load(tables.seed), row, chunk * C, dropout_threshold, C)
                out = tl.where(keep, out * keep_scale, 0.0)
            out = tl.where(token[3][:, None], out, float("nan"))
            columns = chunk * C + tl.arange(0, C)
            inside = row_ok[:, None] if EVEN else row_ok[:, None] & (columns < width)[None, :]
            tl.store(out_ptr + row[:, None] * width + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
        if statistics_ptr is not None:
            tl.store(statistics_ptr + row, rstd, mask=row_ok)
            if not RMS:
                tl.store(statistics_ptr + rows + row, mean, mask=row_ok)


_PROGRAMS_PER_UNIT = 8


def embed_norm_forward(
    like: Tables, options: Options, needs: tuple[bool, ...]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function of the tensors of a call that launches the kernel: the output, and where gradients are needed the
    reciprocal deviations of all tokens, followed by their means (of LayerNorm)."""
    index, width = like.word.device.index, like.word.shape[1]
    (plain, counts, constants), dtype = layout(like), torch.float32 if options.wide else like.word.dtype
    go = launch(
        embed_norm_forward_kernel, index, counts, width, options.eps, dropout.threshold(options.dropout_p),
        dropout.keep_scale(options.dropout_p), RMS=options.rms, **constants,
    )  # fmt: skip
    share = sharing(like, _PROGRAMS_PER_UNIT * gpu.compute_units(index), constants["BLOCK_M"])
    per_token = 0 if not needs else 1 if options.rms else 2

    def run(*tensors: Any) -> tuple[Tensor, Tensor | None]:
        tables = Tables(*tensors) if plain else as_read(Tables(*tensors))
        if options.check_ids:
            require_ids_in_range(tables)
        ids, word = tables.ids, tables.word
        out = word.new_empty((*ids.shape, width), dtype=dtype)
        rows, statistics = ids.numel(), None
        if per_token:
            statistics = word.new_empty(per_token * rows, dtype=torch.float32)
        if rows:
            programs, numbers = share(ids)
            go(programs, 1, tables, out, statistics, *numbers)
        return out, statistics

    return run
