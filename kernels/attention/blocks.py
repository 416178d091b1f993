"""What the attention kernels share: where a sequence lies, what its queries see, and the scores of one block."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Switches(NamedTuple):
    """What a kernel is compiled for; an option that is off leaves no code."""

    SEQUENCES: str
    """``"dense"``, ``"lengths"`` (padded, each with its length) or ``"packed"``."""
    LEFT: bool
    """Whether queries do not see all keys before their own position."""
    RIGHT: bool
    BOTTOM_RIGHT: bool
    MASK: str
    """``"none"``, ``"bool"`` or ``"float"``."""
    MASK_ROWS: bool
    """Whether the mask differs between queries."""
    RELATIVE: bool
    ALIBI: bool
    SOFTCAP: bool
    ADDED: bool
    """Whether scores are more than products: softcap or anything added. Then they are natural, not base-2, logarithms
    until the exponential, since adding to them may be all there is."""
    SPARSE: int
    """Size of the blocks of a block mask; 0: none."""
    GROUPED: bool
    """Whether several query heads share a key head."""
    DROPOUT: bool
    FLOAT8: bool
    """Whether inputs are float8, with scales. Values and probabilities are multiplied in float16, which holds both."""
    PRECISION: str
    WIDE: bool
    """Whether offsets inside one sequence and head need 64 bits."""
    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int = 0
    BLOCK_N: int = 0


@triton.jit
def sequence(seqlens_ptr, b, total, length, S: tl.constexpr):
    """First row and length of sequence `b`. A length that lies is cut, so that nothing outside is touched."""
    first = tl.cast(0, tl.int64)
    if S.SEQUENCES == "packed":
        first = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), total).to(tl.int64)
        end = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b + 1), 0), total).to(tl.int64)
        length = tl.minimum(tl.maximum(end - first, 0), length).to(tl.int32)
    elif S.SEQUENCES == "lengths":
        length = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), length).to(tl.int32)
    return first, length


@triton.jit
def both_sequences(b, seqlens_q_ptr, seqlens_k_ptr, rows_of, len_q, len_k, window, S: tl.constexpr):
    """Sequence `b`: its index in the tensors (a packed batch is one row of tokens), its first query and its first key,
    and what limits what its queries see: lengths, position of the first query among the keys, window."""
    total_q, total_k = rows_of
    left, right, offset, _ = window
    first_q, len_q = sequence(seqlens_q_ptr, b, total_q, len_q, S)
    first_k, len_k = sequence(seqlens_k_ptr, b, total_k, len_k, S)
    own = b
    if S.SEQUENCES == "packed":
        own = b * 0
    if S.BOTTOM_RIGHT:
        offset += len_k - len_q
    return own, first_q, first_k, (len_q, len_k, offset, left, right)


@triton.jit
def terms_of(b, h, mask_ptr, relative_ptr, slopes_ptr, strides_mask, strides_added, window, numbers, S: tl.constexpr):
    """What the scores of one sequence and head are made of besides products."""
    softmax_scale, softcap, _ = numbers
    stride_mb, stride_mh, stride_mm, stride_mn = strides_mask
    stride_rh, stride_sb, stride_sh = strides_added
    slope = 0.0
    mask = 0  # not None, which Triton 3.6 cannot return inside a tuple
    relative = 0
    if S.MASK != "none":
        mask = mask_ptr + b * stride_mb + h * stride_mh
    if S.RELATIVE:
        relative = relative_ptr + h * stride_rh
    if S.ALIBI:
        slope = tl.load(slopes_ptr + b * stride_sb + h * stride_sh)
    return softmax_scale, softcap, slope, relative, window[3], mask, stride_mm, stride_mn


@triton.jit
def live_blocks(list_ptr, ptr_of_map, stride_map, tiles_ptr, inside, S: tl.constexpr):
    """Under a block mask: what `live_block` needs, and how far full and all live blocks of a row reach, in elements."""
    full = tl.load(list_ptr) * S.SPARSE
    live = full + tl.load(list_ptr + 1) * S.SPARSE
    if not inside:
        full = 0
        live = 0
    return (list_ptr, ptr_of_map, stride_map, tiles_ptr), full, live


@triton.jit
def tile(rows, stride_row, dims, stride_dim, S: tl.constexpr):
    """Offsets of the block ``[rows, dims]``."""
    if S.WIDE:
        rows = rows.to(tl.int64)
        dims = dims.to(tl.int64)
    return rows[:, None] * stride_row + dims[None, :] * stride_dim


@triton.jit
def load_tile(ptrs, inside, dims, CHECK: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block ``[rows, dims]``, zero outside; a check that is off costs nothing."""
    if CHECK and DIM != BLOCK:
        return tl.load(ptrs, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
    elif CHECK:
        return tl.load(ptrs, mask=inside[:, None], other=0.0)
    elif DIM != BLOCK:
        return tl.load(ptrs, mask=(dims < DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def visible_range(
    first, count, other, offset, before, after, ragged,
    HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What positions ``first ... first + count`` see of `other` positions: those from ``p + offset - before`` to
    ``p + offset + after``. Queries see keys so, and keys are seen by queries likewise, with the sides exchanged.

    Returns where to begin, where blocks need no check, where they need one again, and where to end. With `ragged` each
    block needs one.
    """
    low = 0
    plain_low = 0
    high = other
    plain_high = other
    last = first + count - 1
    if HAS_BEFORE:
        low = tl.maximum(first + offset - before, 0) // BLOCK * BLOCK
        plain_low = tl.maximum(tl.cdiv(tl.maximum(last + offset - before, 0), BLOCK) * BLOCK, low)
    if HAS_AFTER:
        high = tl.minimum(other, last + offset + after + 1)
        plain_high = tl.minimum(other, first + offset + after + 1)
    plain_high = tl.maximum(tl.maximum(plain_high, 0) // BLOCK * BLOCK, plain_low)
    if ragged:
        plain_high = plain_low
    return low, plain_low, plain_high, high


@triton.jit
def visible_keys(row0, limits, S: tl.constexpr):
    """`visible_range` of a block of queries."""
    len_q, len_k, offset, left, right = limits
    ragged = False
    if S.MASK_ROWS:
        ragged = row0 + S.BLOCK_M > len_q
    low, plain_low, plain_high, high = visible_range(
        row0, S.BLOCK_M, len_k, offset, left, right, ragged, S.LEFT, S.RIGHT, S.BLOCK_N
    )
    if S.SEQUENCES != "dense":
        if row0 >= len_q:
            high = 0
            plain_high = 0
    return low, plain_low, plain_high, high


@triton.jit
def _tanh(x):
    # Near 0 the quotient would lose what makes x different from 0; the series is exact to float32 there.
    x2 = x * x
    near = x * (1.0 - x2 * (0.33333334 - x2 * (0.13333334 - x2 * 0.05396825)))
    return tl.where(tl.abs(x) < 0.15, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def block_scores(
    products, rows, columns, tiles_ptr, terms, limits, CHECK: tl.constexpr, TILED: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Scores of a block from its products query . key, -inf where a key is not seen, and softcap's derivative.

    `rows` and `columns` are positions of queries and keys, shaped to broadcast over the block, so the transposed block
    of the dK/dV kernel is the same function. Without CHECK the caller promises that the whole block is in bounds and
    within the window. TILED: the block mask has a tile for it.
    """
    scale, softcap, slope, relative_ptr, reach, mask_ptr, stride_mm, stride_mn = terms
    len_q, len_k, offset, left, right = limits
    distance = columns - rows - offset
    scores = products
    damping = 1.0
    if S.ADDED:
        scores = products * scale
    if S.SOFTCAP:
        t = _tanh(scores / softcap)
        damping = 1.0 - t * t
        scores = t * softcap
    if S.ALIBI:
        scores -= slope * tl.abs(distance).to(tl.float32)
    if S.RELATIVE:
        entry = tl.minimum(tl.maximum(distance, -reach), reach) + reach
        scores += tl.load(relative_ptr + entry).to(tl.float32)
    # One comparison serves both ends: a negative position is a large unsigned one.
    inside = columns.to(tl.uint32, bitcast=True) < len_k.to(tl.uint32, bitcast=True)
    if S.MASK != "none":
        at = (columns.to(tl.int64) if S.WIDE else columns) * stride_mn
        on_mask = inside
        if S.MASK_ROWS:
            at += (rows.to(tl.int64) if S.WIDE else rows) * stride_mm
            on_mask = on_mask & (rows < len_q)
        if S.MASK == "float":
            if CHECK:
                scores += tl.load(mask_ptr + at, mask=on_mask, other=0.0).to(tl.float32)
            else:
                scores += tl.load(mask_ptr + at).to(tl.float32)
        elif CHECK:
            scores = tl.where(tl.load(mask_ptr + at, mask=on_mask, other=0) != 0, scores, float("-inf"))
        else:
            scores = tl.where(tl.load(mask_ptr + at) != 0, scores, float("-inf"))
    if CHECK:
        keep = inside
        if S.LEFT:
            keep = keep & (distance >= -left)
        if S.RIGHT:
            keep = keep & (distance <= right)
        if TILED:
            keep = keep & (tl.load(tiles_ptr + (rows % S.SPARSE) * S.SPARSE + columns % S.SPARSE) != 0)
        scores = tl.where(keep, scores, float("-inf"))
    return scores, damping


@triton.jit
def load_row(ptr, rows, inside, other, CHECK: tl.constexpr):
    """Load a number for each row; a check that is off costs nothing."""
    if CHECK:
        return tl.load(ptr + rows, mask=inside, other=other)
    else:
        return tl.load(ptr + rows)


@triton.jit
def load_statistics(statistics_ptr, rows, inside, CHECK: tl.constexpr, S: tl.constexpr):
    """What the forward pass left of each row: (maximum, rest) of its log-sum-exp, the rest to base 2.

    What is added to scores may be so large for a whole row that their sum would swallow the rest, so there the two are
    kept apart; else the maximum is 0 and the rest everything. For a row with nothing to attend to, and past the end,
    the rest is +inf, which makes each probability exp2(-inf) = 0.
    """
    if S.ADDED:
        row_max = load_row(statistics_ptr, 2 * rows, inside, 0.0, CHECK)
        rest = load_row(statistics_ptr, 2 * rows + 1, inside, float("inf"), CHECK)
    else:
        rest = load_row(statistics_ptr, rows, inside, float("inf"), CHECK)
        row_max = tl.zeros_like(rest)
    return row_max, rest


@triton.jit
def block_probabilities(scores, row_max, rest, scale, S: tl.constexpr):
    """``softmax`` of a block from what `load_statistics` gave, shaped to broadcast over it."""
    if S.ADDED:
        return tl.exp2((scores - row_max) * LOG2E - rest)
    else:
        return tl.exp2(scores * (scale * LOG2E) - rest)


@triton.jit
def live_block(list_ptr, map_ptr, tiles_ptr, stride_map, position, TILED: tl.constexpr, S: tl.constexpr):
    """Under a block mask: where the `position`-th element of the live blocks lies, and the tile of its block."""
    block = tl.load(list_ptr + 2 + position // S.SPARSE)
    if TILED:
        kind = tl.load(map_ptr + block.to(tl.int64) * stride_map)
        tiles_ptr += (kind - 2).to(tl.int64) * (S.SPARSE * S.SPARSE)
    return block * S.SPARSE + position % S.SPARSE, tiles_ptr
