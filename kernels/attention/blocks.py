"""What the attention kernels share: where a sequence lies, what its queries see, and the scores of one block."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ..common.blocks import load_block

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


Switches = namedtuple(
    "Switches",
    "SEQUENCES LEFT RIGHT BOTTOM_RIGHT MASK MASK_ROWS RELATIVE ALIBI SOFTCAP ADDED SPARSE GROUPED DROPOUT PRECISION "
    "WIDE UNIT KEY_UNIT HEAD_DIM VALUE_DIM BLOCK_D BLOCK_DV BLOCK_M BLOCK_N",
    defaults=(0, 0),
)
"""What a kernel is compiled for; an option that is off leaves no code.

SEQUENCES: "dense", "lengths" (padded, each with its length) or "packed". LEFT, RIGHT: queries do not see all keys
before, after their own position. MASK: "none", "bool" or "float"; MASK_ROWS: it differs between queries. ADDED: scores
are more than products (softcap, or anything added); then they are natural, not base-2, logarithms until the
exponential, since adding to them may be all there is. SPARSE: size of the blocks of a block mask, or 0. GROUPED:
several query heads share a key head. WIDE: offsets inside one sequence and head need 64 bits. UNIT: strides of batches
and heads, and of a result's rows, are counted in so many elements (16, 8 or 1); KEY_UNIT: so are the mask's strides and
the number of keys (16 or 1).
"""

Numbers = namedtuple(
    "Numbers",
    "nhead group left right reach softmax_scale softcap keep_scale threshold relative_stride slope_stride_b "
    "slope_stride_h map_stride_b map_stride_h map_stride_m map_stride_n of_query_b of_query_h of_query_m of_key_b "
    "of_key_h of_key_n",
)
"""The numbers that a plan knows: query heads and how many share a key head, window, largest distance of the relative
bias, dropout, strides of small tensors, of the block mask's map and of its lists."""

Operand = namedtuple("Operand", "ptr stride stride_d")
"""The rows that one sequence and head have in a tensor ``[B, H, L, D]``: the first, strides of rows and columns."""

Located = namedtuple("Located", "number batch first_q first_k len_q len_k offset")
"""A sequence: its number, its index in the tensors (a packed batch is one row of tokens), first rows there, lengths,
and the position of its first query among its keys."""

Head = namedtuple(
    "Head",
    "h len_q len_k offset first_row left right scale softcap slope relative reach mask stride_mm stride_mn seed "
    "threshold keep_scale list map map_stride tiles",
)
"""One sequence and query head: number of its first query among the rows of all heads, what its scores are made of
besides products, and the blocks that the program visits under a block mask."""


@triton.jit
def _rows(seqlens_ptr, b, total, length, S: tl.constexpr):
    """First row and length of sequence `b`. Lengths are clamped, so bad values cause no access outside the tensors."""
    first = tl.cast(0, tl.int64)
    if S.SEQUENCES == "packed":
        first = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), total).to(tl.int64)
        end = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b + 1), 0), total).to(tl.int64)
        length = tl.minimum(tl.maximum(end - first, 0), length).to(tl.int32)
    elif seqlens_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), length).to(tl.int32)
    return first, length


@triton.jit
def sequence_of(b, t, totals, len_q, len_k, S: tl.constexpr):
    """Sequence `b`; `len_k`, of the longest, is in units."""
    first_q, len_q = _rows(t.seqlens_q, b, totals[0], len_q, S)
    first_k, len_k = _rows(t.seqlens_k, b, totals[1], len_k * S.KEY_UNIT, S)
    batch = b
    if S.SEQUENCES == "packed":
        batch = b * 0
    offset = 0
    if S.BOTTOM_RIGHT:
        offset = len_k - len_q
    return Located(b, batch, first_q, first_k, len_q, len_k, offset)


@triton.jit
def head_of(at, h, position, KEYS: tl.constexpr, t, strides_mask, stride_mn, total_q, N, S: tl.constexpr):
    """Head `h` of a sequence, for a program whose block of queries, or KEYS, begins at `position`."""
    b = at.number
    slope = 0.0
    mask = 0  # not None, which Triton 3.6 cannot return inside a tuple
    relative = 0
    seed = 0
    list_ptr = 0
    map_ptr = 0
    map_stride = 0
    tiles = 0
    if S.MASK != "none":
        mask = t.attn_mask + (b * strides_mask[0] + h * strides_mask[1]) * S.KEY_UNIT
    if S.RELATIVE:
        relative = t.relative_bias + h * N.relative_stride
    if S.ALIBI:
        slope = tl.load(t.alibi_slopes + b * N.slope_stride_b + h * N.slope_stride_h).to(tl.float32)
    if S.DROPOUT:
        seed = tl.load(t.seed)
    if S.SPARSE:
        block = position // S.SPARSE
        map_ptr = t.block_map + b * N.map_stride_b + h * N.map_stride_h
        tiles = t.tiles
        if KEYS:
            list_ptr = t.blocks_of_key + b * N.of_key_b + h * N.of_key_h + block * N.of_key_n
            map_ptr += block * N.map_stride_n
            map_stride = N.map_stride_m
        else:
            list_ptr = t.blocks_of_query + b * N.of_query_b + h * N.of_query_h + block * N.of_query_m
            map_ptr += block * N.map_stride_m
            map_stride = N.map_stride_n
    return Head(
        h, at.len_q, at.len_k, at.offset, (at.batch * N.nhead + h) * total_q + at.first_q, N.left, N.right,
        N.softmax_scale, N.softcap, slope, relative, N.reach, mask, strides_mask[2] * S.KEY_UNIT, stride_mn, seed,
        N.threshold, N.keep_scale, list_ptr, map_ptr, map_stride, tiles,
    )  # fmt: skip


@triton.jit
def operand(ptr, INDEX: tl.constexpr, at, h, first, strides, inner, S: tl.constexpr):
    """The rows from `first` on of the operand INDEX of query, key, value, out and dout; `strides` are in units."""
    ptr += at.batch * strides[2 * INDEX] * S.UNIT
    ptr += h * strides[2 * INDEX + 1] * S.UNIT
    ptr += first * inner[2 * INDEX]
    return Operand(ptr, inner[2 * INDEX], inner[2 * INDEX + 1])


@triton.jit
def result(ptr, at, h, first, strides, S: tl.constexpr):
    """The same of a tensor to write, whose rows are contiguous."""
    ptr += at.batch * strides[0] * S.UNIT
    ptr += h * strides[1] * S.UNIT
    ptr += first * strides[2] * S.UNIT
    return Operand(ptr, strides[2] * S.UNIT, 1)


@triton.jit
def key_head(h, N, S: tl.constexpr):
    """The key head that serves query head `h`."""
    return h // N.group if S.GROUPED else h


@triton.jit
def block_of_queries(t, strides, strides_mask, totals, len_q, len_k, inner, stride_mn, N, S: tl.constexpr):
    """Which block of queries, sequence and head a program takes, and the operands query, key and value."""
    blocks = tl.cdiv(len_q, S.BLOCK_M)
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    h = (program % N.nhead).to(tl.int64)
    at = sequence_of((program // N.nhead).to(tl.int64), t, totals, len_q, len_k, S)
    head = head_of(at, h, block * S.BLOCK_M, False, t, strides_mask, stride_mn, totals[0], N, S)
    key_h = key_head(h, N, S)
    q = operand(t.query, 0, at, h, at.first_q, strides, inner, S)
    k = operand(t.key, 1, at, key_h, at.first_k, strides, inner, S)
    v = operand(t.value, 2, at, key_h, at.first_k, strides, inner, S)
    return block, at, head, q, k, v


@triton.jit
def _pointers(x, start, rows, dims, S: tl.constexpr):
    if S.WIDE:
        rows = rows.to(tl.int64)
        dims = dims.to(tl.int64)
    return x.ptr + tl.cast(start, tl.int64) * x.stride + (rows[:, None] * x.stride + dims[None, :] * x.stride_d)


@triton.jit
def load_rows(x, start, rows, inside, CHECK: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr):
    """The block ``[start + rows, DIM]`` of an operand, zero outside; a check that is off costs nothing."""
    BLOCK: tl.constexpr = S.BLOCK_D if DIM == S.HEAD_DIM else S.BLOCK_DV
    dims = tl.arange(0, BLOCK)
    return load_block(_pointers(x, start, rows, dims, S), inside[:, None], (dims < DIM)[None, :], CHECK, DIM != BLOCK)


@triton.jit
def store_rows(x, rows, inside, value, DIM: tl.constexpr, S: tl.constexpr):
    """Write a block ``[rows, DIM]`` in the dtype of its tensor."""
    dims = tl.arange(0, S.BLOCK_D if DIM == S.HEAD_DIM else S.BLOCK_DV)
    value = value.to(x.ptr.dtype.element_ty)
    tl.store(_pointers(x, 0, rows, dims, S), value, mask=inside[:, None] & (dims < DIM)[None, :])


@triton.jit
def load_checked(ptr, offsets, inside, other, CHECK: tl.constexpr):
    """Load where `inside`; a check that is off costs nothing."""
    if CHECK:
        return tl.load(ptr + offsets, mask=inside, other=other)
    else:
        return tl.load(ptr + offsets)


@triton.jit
def parts(
    first, count, length, other, offset, before, after, head,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Beginnings and ends of the three parts in which a program visits the blocks that its block sees.

    Positions ``first ... first + count`` of `length` see those of `other` from ``p + offset - before`` to
    ``p + offset + after``: queries see keys so, and keys are seen by queries likewise, with the sides exchanged. Part 1
    needs no check of bounds and window; with RAGGED it is empty for a block that is not whole. The parts 0 (only with
    BEFORE) and 2 lie before and after it. Under a block mask the parts 1 and 2 are the full and the partly filled
    blocks of the program's list, and all is checked.
    """
    if S.SPARSE:
        full = tl.load(head.list) * S.SPARSE
        live = full + tl.load(head.list + 1) * S.SPARSE
        if first >= length:
            full = 0
            live = 0
        return 0, 0, 0, full, full, live
    else:
        low = 0
        plain_low = 0
        high = other
        plain_high = other
        last = first + count - 1
        if BEFORE:
            low = tl.maximum(first + offset - before, 0) // BLOCK * BLOCK
            plain_low = tl.maximum(tl.cdiv(tl.maximum(last + offset - before, 0), BLOCK) * BLOCK, low)
        if AFTER:
            high = tl.minimum(other, last + offset + after + 1)
            plain_high = tl.minimum(other, first + offset + after + 1)
        plain_high = tl.maximum(tl.maximum(plain_high, 0) // BLOCK * BLOCK, plain_low)
        if RAGGED:
            if first + count > length:
                plain_high = plain_low
        if S.SEQUENCES != "dense":
            if first >= length:
                high = 0
                plain_high = 0
        return low, tl.minimum(plain_low, high), plain_low, plain_high, plain_high, high


@triton.jit
def parts_of_keys(row0, head, S: tl.constexpr):
    """`parts` of the keys that a block of queries sees."""
    return parts(
        row0, S.BLOCK_M, head.len_q, head.len_k, head.offset, head.left, head.right, head, S.LEFT, S.RIGHT,
        S.MASK_ROWS, S.BLOCK_N, S,
    )  # fmt: skip


@triton.jit
def block_at(position, head, TILED: tl.constexpr, S: tl.constexpr):
    """Where a block to visit begins, and the tile of the block mask that says which of its elements are seen."""
    tiles = head.tiles
    if S.SPARSE:
        block = tl.load(head.list + 2 + position // S.SPARSE)
        if TILED:
            kind = tl.load(head.map + block.to(tl.int64) * head.map_stride)
            tiles += (kind - 2).to(tl.int64) * (S.SPARSE * S.SPARSE)
        position = block * S.SPARSE + position % S.SPARSE
    return position, tiles


@triton.jit
def _tanh(x):
    # Near 0 the quotient would lose what makes x different from 0; the series is exact to float32 there.
    x2 = x * x
    near = x * (1.0 - x2 * (0.33333334 - x2 * (0.13333334 - x2 * 0.05396825)))
    return tl.where(tl.abs(x) < 0.15, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def block_scores(products, rows, columns, tiles, head, CHECK: tl.constexpr, TILED: tl.constexpr, S: tl.constexpr):
    """Scores of a block from its products query . key, -inf where a key is not seen, and softcap's derivative.

    `rows` and `columns` are positions of queries and keys, shaped to broadcast over the block, so the transposed block
    of the dK/dV kernel is the same function. Without CHECK the caller promises that the whole block is in bounds and
    within the window. TILED: the block mask has a tile for it.
    """
    distance = columns - rows - head.offset
    scores = products
    damping = 1.0
    if S.ADDED:
        scores = products * head.scale
    if S.SOFTCAP:
        t = _tanh(scores / head.softcap)
        damping = 1.0 - t * t
        scores = t * head.softcap
    if S.ALIBI:
        scores -= head.slope * tl.abs(distance).to(tl.float32)
    if S.RELATIVE:
        entry = tl.minimum(tl.maximum(distance, -head.reach), head.reach) + head.reach
        scores += tl.load(head.relative + entry).to(tl.float32)
    # One comparison serves both ends: a negative position is a large unsigned one.
    inside = columns.to(tl.uint32, bitcast=True) < head.len_k.to(tl.uint32, bitcast=True)
    if S.MASK != "none":
        at = (columns.to(tl.int64) if S.WIDE else columns) * head.stride_mn
        on_mask = inside
        if S.MASK_ROWS:
            at += (rows.to(tl.int64) if S.WIDE else rows) * head.stride_mm
            on_mask = on_mask & (rows < head.len_q)
        masked = load_checked(head.mask, at, on_mask, 0, CHECK)
        if S.MASK == "float":
            scores += masked.to(tl.float32)
        else:
            scores = tl.where(masked != 0, scores, float("-inf"))
    if CHECK:
        keep = inside
        if S.LEFT:
            keep = keep & (distance >= -head.left)
        if S.RIGHT:
            keep = keep & (distance <= head.right)
        if TILED:
            keep = keep & (tl.load(tiles + (rows % S.SPARSE) * S.SPARSE + columns % S.SPARSE) != 0)
        scores = tl.where(keep, scores, float("-inf"))
    return scores, damping


@triton.jit
def keys_at(position, q_block, k, rows, head, PART: tl.constexpr, S: tl.constexpr):
    """One step over the keys: where their block begins, which of them there are, the block, its scores ``[BM, BN]``
    with `rows` of queries, and softcap's derivative."""
    CHECK: tl.constexpr = PART != 1 or S.SPARSE > 0
    TILED: tl.constexpr = PART == 2 and S.SPARSE > 0
    offs_n = tl.arange(0, S.BLOCK_N)
    start, tiles = block_at(position, head, TILED, S)
    columns = start + offs_n
    inside = columns < head.len_k
    k_block = load_rows(k, start, offs_n, inside, CHECK, S.HEAD_DIM, S)
    products = tl.dot(q_block, tl.trans(k_block), input_precision=S.PRECISION)
    scores, damping = block_scores(products, rows[:, None], columns[None, :], tiles, head, CHECK, TILED, S)
    return start, inside, k_block, scores, damping


@triton.jit
def load_statistics(statistics_ptr, rows, inside, CHECK: tl.constexpr, S: tl.constexpr):
    """What the forward pass left of each row: (maximum, rest) of its log-sum-exp, the rest to base 2.

    What is added to scores may be so large for a whole row that their sum would swallow the rest, so there the two are
    kept apart; else the maximum is 0 and the rest everything. For a row with nothing to attend to, and past the end,
    the rest is +inf, which makes each probability exp2(-inf) = 0.
    """
    if S.ADDED:
        row_max = load_checked(statistics_ptr, 2 * rows, inside, 0.0, CHECK)
        rest = load_checked(statistics_ptr, 2 * rows + 1, inside, float("inf"), CHECK)
    else:
        rest = load_checked(statistics_ptr, rows, inside, float("inf"), CHECK)
        row_max = tl.zeros_like(rest)
    return row_max, rest


@triton.jit
def block_probabilities(scores, row_max, rest, scale, S: tl.constexpr):
    """``softmax`` of a block from what `load_statistics` gave, shaped to broadcast over it."""
    if S.ADDED:
        return tl.exp2((scores - row_max) * LOG2E - rest)
    else:
        return tl.exp2(scores * (scale * LOG2E) - rest)
