"""What the forward and the backward kernels of embed_norm share: tokens, their rows, the tiling of a width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common import device as gpu
from .arguments import Tables


@triton.jit
def tokens_of(tables, counts, row, row_ok, column):
    """Word, position and type of some tokens, and which of them exist with all their ids in range."""
    word = tl.load(tables.ids + row, mask=row_ok, other=0).to(tl.int64)
    ok = row_ok & (word >= 0) & (word < counts[0])
    position = column.to(tl.int64)
    if tables.position_ids is not None:
        position = tl.load(tables.position_ids + row, mask=row_ok, other=0).to(tl.int64)
        ok = ok & (position >= 0) & (position < counts[1])
    type_ = position * 0
    if tables.type_ids is not None:
        type_ = tl.load(tables.type_ids + row, mask=row_ok, other=0).to(tl.int64)
        ok = ok & (type_ >= 0) & (type_ < counts[2])
    return word, position, type_, ok


@triton.jit
def row_chunk(ptr, chunk, width, C: tl.constexpr, EVEN: tl.constexpr):
    """C columns of one row, ``[1, C]``."""
    columns = chunk * C + tl.arange(0, C)
    if EVEN:
        return tl.load(ptr + columns)[None, :]
    return tl.load(ptr + columns, mask=columns < width, other=0.0)[None, :]


@triton.jit
def row_chunks(ptr, width, CHUNKS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr):
    """A whole row as a tuple of chunks; nothing of None."""
    row = ()
    if ptr is not None:
        for chunk in tl.static_range(CHUNKS):
            row = row + (row_chunk(ptr, chunk, width, C, EVEN),)
    return row


@triton.jit
def chunk_of_rows(ptr, rows, ok, chunk, stride, width, C: tl.constexpr, EVEN: tl.constexpr):
    """C columns of some rows, ``[len(rows), C]``, 0 where `ok` says no."""
    columns = chunk * C + tl.arange(0, C)
    inside = ok[:, None] if EVEN else ok[:, None] & (columns < width)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def held_rows(
    tables, counts, column, column_ok, width,
    HELD: tl.constexpr, HELD_TYPES: tl.constexpr, CHUNKS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What a program reads once and keeps: the rows of its positions, those of the first two types, weight and bias."""
    positions, second_type = (), ()
    if HELD and tables.position is not None and tables.position_ids is None:
        for chunk in tl.static_range(CHUNKS):
            rows = chunk_of_rows(tables.position, column.to(tl.int64), column_ok, chunk, width, width, C, EVEN)
            positions = positions + (rows,)
    if HELD_TYPES and tables.type_ids is not None:
        second_type = row_chunks(tables.types + (counts[2] - 1) * width, width, CHUNKS, C, EVEN)
    first_type = row_chunks(tables.types if HELD_TYPES else None, width, CHUNKS, C, EVEN)
    weight = row_chunks(tables.norm_weight if HELD else None, width, CHUNKS, C, EVEN)
    bias = row_chunks(tables.norm_bias if HELD else None, width, CHUNKS, C, EVEN)
    return positions, first_type, second_type, weight, bias


@triton.jit
def sum_chunk(
    tables, token, held, chunk, width, HELD: tl.constexpr, HELD_TYPES: tl.constexpr, C: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """C columns of the tokens' summed embeddings, float32 ``[BM, C]``."""
    word, position, type_, ok = token
    z = chunk_of_rows(tables.word, word, ok, chunk, width, width, C, EVEN).to(tl.float32)
    if HELD_TYPES:
        first = held[1][chunk].to(tl.float32)
        if tables.type_ids is not None:
            z += tl.where(type_[:, None] == 0, first, held[2][chunk].to(tl.float32))
        else:
            z += first
    elif tables.types is not None:
        z += chunk_of_rows(tables.types, type_, ok, chunk, width, width, C, EVEN).to(tl.float32)
    if tables.position is not None:
        if HELD and tables.position_ids is None:
            z += held[0][chunk].to(tl.float32)
        else:
            z += chunk_of_rows(tables.position, position, ok, chunk, width, width, C, EVEN).to(tl.float32)
    return z


_MAX_WIDTH = 16384
_HELD_WIDTH = 4096
"""Up to here a program keeps in registers what all its tokens read; wider rows leave no room: it is read again."""


def layout(like: Tables) -> tuple[bool, tuple[int, ...], dict[str, Any]]:
    """Whether kernels read the tensors as they are, the number of rows of the tables of words, positions and types, and
    the constants of kernels that take whole rows, BLOCK_M of CHUNKS times C columns at a time.

    These are the fewest columns beyond the width, of these the fewest chunks. A thread has 8 neighbouring elements of a
    chunk, which are 16 bytes in half precision, as long as that leaves it no more than 32 of a row.
    """
    width = like.word.shape[1]
    if width > _MAX_WIDTH:
        checks.fail_value("word_weight", f"a width of at most {_MAX_WIDTH} on the kernels", like.word)
    plain = all(a is b for a, b in zip(like, as_read(like), strict=True))
    counts = tuple([0 if t is None else t.shape[0] for t in like[:3]])
    sizes = [max(16, gpu.power_of_2(width)) >> shift for shift in range(4)]
    chunk = min((c for c in sizes if c >= 16), key=lambda c: (-(-width // c) * c, -c))
    chunks, held = -(-width // chunk), width <= _HELD_WIDTH
    few = like.types is not None and (counts[2] <= 2 or like.type_ids is None)
    return plain, counts, {
        "BLOCK_M": max(1, 1024 // chunk), "CHUNKS": chunks, "C": chunk, "EVEN": chunk * chunks == width, "HELD": held,
        "HELD_TYPES": held and few, "num_warps": max(4, min(chunk // 256, 16)) * (2 if chunks > 2 else 1),
    }  # fmt: skip


def sharing(like: Tables, most: int, block_m: int) -> Callable[[Tensor], tuple[int, tuple[int, ...]]]:
    """A function of ids that says how programs share them: how many, some `most` or fewer where there are few tokens,
    and the kernels' arguments ``rows, length, parts, parts_per_program, tiles``.

    A token's number is ``part * length + column``: a program takes `block_m` columns and walks over some parts. Where
    positions count from 0 these are the positions and the sequences, so that a position's row is read once a program;
    else any rectangle will do.
    """
    counted = like.position is not None and like.position_ids is None

    def share(ids: Tensor) -> tuple[int, tuple[int, ...]]:
        rows = ids.numel()
        length = ids.shape[-1] if counted else min(most * block_m, rows)
        parts, tiles = -(-rows // length), -(-length // block_m)
        parts_per_program = -(-parts // max(1, most // tiles))
        return tiles * -(-parts // parts_per_program), (rows, length, parts, parts_per_program, tiles)

    return share


def as_read(tables: Tables) -> Tables:
    """The tensors as kernels read them: contiguous, and all ids of one shape."""
    shape = tables.ids.shape
    of_ids = [None if t is None else t if t.shape == shape else t.expand(shape) for t in tables[5:8]]
    found: list[Any] = [None if t is None else t.contiguous() for t in (*tables[:5], *of_ids, tables.seed)]
    return Tables(*found)
