"""What the forward and the backward kernels of embed_norm share: tokens, their rows, the tiling of a width."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from .eager import Tables


@triton.jit
def tokens_of(
    row, row_ok, column, ids_ptr, position_ids_ptr, type_ids_ptr, vocabulary, positions, types,
    POSITION: tl.constexpr, HAS_POSITION_IDS: tl.constexpr, TYPE: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
):  # fmt: skip
    """Word, position and type of some tokens, and which of them exist with all their ids in range."""
    word = tl.load(ids_ptr + row, mask=row_ok, other=0).to(tl.int64)
    ok = row_ok & (word >= 0) & (word < vocabulary)
    position = column.to(tl.int64)
    if HAS_POSITION_IDS and POSITION != "none":
        position = tl.load(position_ids_ptr + row, mask=row_ok, other=0).to(tl.int64)
        ok = ok & (position >= 0) & (position < positions)
    type_ = position * 0
    if HAS_TYPE_IDS and TYPE != "none":
        type_ = tl.load(type_ids_ptr + row, mask=row_ok, other=0).to(tl.int64)
        ok = ok & (type_ >= 0) & (type_ < types)
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
    """A whole row as a tuple of chunks."""
    row = ()
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
    position_ptr, type_ptr, column, column_ok, types, width,
    POSITION: tl.constexpr, TYPE: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
    CHUNKS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What a program reads once and keeps: the rows of its positions, and those of the first two types."""
    held_position, first_type, second_type = (), (), ()
    if POSITION == "held":
        for chunk in tl.static_range(CHUNKS):
            position = chunk_of_rows(position_ptr, column.to(tl.int64), column_ok, chunk, width, width, C, EVEN)
            held_position = held_position + (position,)
    if TYPE == "held":
        first_type = row_chunks(type_ptr, width, CHUNKS, C, EVEN)
        if HAS_TYPE_IDS:
            second_type = row_chunks(type_ptr + (types - 1) * width, width, CHUNKS, C, EVEN)
    return held_position, first_type, second_type


@triton.jit
def sum_chunk(
    word_ptr, position_ptr, type_ptr, word, position, type_, ok, held, chunk: tl.constexpr, width,
    POSITION: tl.constexpr, TYPE: tl.constexpr, HAS_TYPE_IDS: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """C columns of the tokens' summed embeddings, float32 ``[BM, C]``."""
    z = chunk_of_rows(word_ptr, word, ok, chunk, width, width, C, EVEN).to(tl.float32)
    if TYPE == "held":
        first = held[1][chunk].to(tl.float32)
        if HAS_TYPE_IDS:
            z += tl.where(type_[:, None] == 0, first, held[2][chunk].to(tl.float32))
        else:
            z += first
    elif TYPE == "gather":
        z += chunk_of_rows(type_ptr, type_, ok, chunk, width, width, C, EVEN).to(tl.float32)
    if POSITION == "held":
        z += held[0][chunk].to(tl.float32)
    elif POSITION == "gather":
        z += chunk_of_rows(position_ptr, position, ok, chunk, width, width, C, EVEN).to(tl.float32)
    return z


MAX_WIDTH = 16384
_HELD_WIDTH = 4096
"""Up to here a program keeps in registers what all its tokens read; wider rows leave no room: it is read again."""


class Tiling(NamedTuple):
    """How rows of a width lie in registers: `block_m` rows of `chunks` times `chunk` columns."""

    block_m: int
    chunk: int
    chunks: int
    num_warps: int
    even: bool
    held: bool


def tiling(width: int) -> Tiling:
    """The fewest columns beyond `width`, of these the fewest chunks; a thread has 8 neighbouring elements of a chunk,
    which are 16 bytes in half precision, as long as that leaves it no more than 32 of a row."""
    sizes = [max(16, gpu.power_of_2(width)) >> shift for shift in range(4)]
    chunk = min((c for c in sizes if c >= 16), key=lambda c: (-(-width // c) * c, -c))
    chunks = -(-width // chunk)
    num_warps = max(4, min(chunk // 256, 16)) * (2 if chunks > 2 else 1)
    block_m = max(1, 1024 // chunk)
    return Tiling(block_m, chunk, chunks, num_warps, chunk * chunks == width, width <= _HELD_WIDTH)


class Grid(NamedTuple):
    """How programs share the tokens. A token's number is ``part * length + column``: a program takes `block_m` columns
    and walks over some parts. Where positions count from 0 these are the positions and the sequences, so that a
    position's row is read once a program; else any rectangle will do."""

    rows: int
    length: int
    parts: int
    parts_per_program: int
    tiles: int

    @property
    def programs(self) -> int:
        """The number of programs."""
        return self.tiles * -(-self.parts // self.parts_per_program)


def grid(tables: Tables, tile: Tiling, programs_per_unit: int) -> Grid:
    """About `programs_per_unit` programs for each of the GPU's units, or fewer where there are few tokens."""
    rows, length = tables.ids.numel(), tables.ids.shape[-1]
    most = programs_per_unit * gpu.compute_units(tables.word.device.index)
    if tables.position is None or tables.position_ids is not None:
        length = min(most * tile.block_m, rows)
    parts, tiles = -(-rows // length), -(-length // tile.block_m)
    return Grid(rows, length, parts, -(-parts // max(1, most // tiles)), tiles)


def lookup_arguments(tables: Tables, tile: Tiling, stand_in: Tensor) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """What every kernel is given of the tables: pointers, row counts and switches."""

    def pointer(t: Tensor | None) -> Tensor:
        return stand_in if t is None else t.contiguous()

    def ids(t: Tensor | None) -> Tensor:
        return (tables.ids if t is None else t.expand(tables.ids.shape)).contiguous().view(-1)

    types = 0 if tables.type is None else tables.type.shape[0]
    kept = {True: "held", False: "gather"}
    own = tables.position_ids is None
    position = "none" if tables.position is None else kept[tile.held and own]
    type_ = "none" if tables.type is None else kept[tile.held and (types <= 2 or tables.type_ids is None)]
    pointers = [
        pointer(tables.word), pointer(tables.position), pointer(tables.type),
        ids(tables.ids), ids(tables.position_ids), ids(tables.type_ids),
    ]  # fmt: skip
    counts = [tables.word.shape[0], 0 if tables.position is None else tables.position.shape[0], types]
    switches = {
        "POSITION": position, "HAS_POSITION_IDS": not own, "TYPE": type_, "HAS_TYPE_IDS": tables.type_ids is not None,
        "BLOCK_M": tile.block_m, "CHUNKS": tile.chunks, "C": tile.chunk, "EVEN": tile.even,
    }  # fmt: skip
    return pointers, counts, switches


def as_rows(x: Tensor) -> Tensor:
    """`x` as ``[rows, width]`` with unit column stride; a view unless its memory order forbids."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def statistics_tensor(tables: Tables) -> Tensor:
    """One float32 number a token."""
    return torch.empty(tables.ids.numel(), dtype=torch.float32, device=tables.word.device)
