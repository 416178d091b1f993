"""What needs a value for each pair of query and key: a mask's gradient, a relative bias's, the softmax weights.

The fast path keeps none of that; here it is computed again, block by block, and summed before it is stored.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.blocks import dropout_keep
from .arguments import Options, Tensors
from .blocks import (
    block_probabilities,
    block_scores,
    head_of,
    key_head,
    load_checked,
    load_rows,
    load_statistics,
    operand,
    sequence_of,
)
from .configs import PLANES, Config
from .launching import Call, sequences

Given = namedtuple(
    "Given", "t dout_ptr statistics_ptr delta_ptr strides strides_mask totals len_q len_k inner stride_mn"
)
"""What both kernels read; without `dout_ptr` for the softmax weights."""


@triton.jit
def _block(g, b, h, row0, column0, ALIGNED: tl.constexpr, N, S: tl.constexpr):
    """``Z P``, or the gradient of the scores, ``P (Z dO V^T - delta)``, of one block; 0 where nothing is seen.

    ALIGNED: it lies inside one block of the block mask.
    """
    t = g.t
    at = sequence_of(b, t, g.totals, g.len_q, g.len_k, S)
    # A block that is outside the sequence or the window, or dead in the block mask, costs nothing more.
    live = (row0 < at.len_q) & (column0 < at.len_k) & (column0 + S.BLOCK_N > 0)
    if S.LEFT:
        live = live & (column0 + S.BLOCK_N > row0 + at.offset - N.left)
    if S.RIGHT:
        live = live & (column0 < row0 + S.BLOCK_M + at.offset + N.right)
    if S.SPARSE:
        map_ptr = t.block_map + b * N.map_stride_b + h * N.map_stride_h
        if ALIGNED:
            if live:
                kind = map_ptr + row0 // S.SPARSE * N.map_stride_m + column0 // S.SPARSE * N.map_stride_n
                live = tl.load(kind) > 0
    found = tl.full((S.BLOCK_M, S.BLOCK_N), 0.0, tl.float32)
    if live:
        head = head_of(at, h, 0, False, t, g.strides_mask, g.stride_mn, g.totals[0], N, S)
        rows = row0 + tl.arange(0, S.BLOCK_M)
        columns = column0 + tl.arange(0, S.BLOCK_N)
        in_q = rows < at.len_q
        in_k = (columns >= 0) & (columns < at.len_k)
        q = operand(t.query, 0, at, h, at.first_q, g.strides, g.inner, S)
        k = operand(t.key, 1, at, key_head(h, N, S), at.first_k, g.strides, g.inner, S)
        q_block = load_rows(q, 0, rows, in_q, True, S.HEAD_DIM, S)
        k_block = load_rows(k, 0, columns, in_k, True, S.HEAD_DIM, S)
        products = tl.dot(q_block, tl.trans(k_block), input_precision=S.PRECISION)
        scores, _ = block_scores(products, rows[:, None], columns[None, :], 0, head, True, False, S)
        if S.SPARSE:
            inside = in_q[:, None] & in_k[None, :]
            kinds = (rows // S.SPARSE * N.map_stride_m)[:, None] + (columns // S.SPARSE * N.map_stride_n)[None, :]
            kinds = tl.load(map_ptr + kinds, mask=inside, other=0)
            in_tile = (rows % S.SPARSE)[:, None] * S.SPARSE + (columns % S.SPARSE)[None, :]
            in_tile += (kinds - 2).to(tl.int64) * (S.SPARSE * S.SPARSE)
            seen = (tl.load(t.tiles + in_tile, mask=kinds > 1, other=0) != 0) | (kinds == 1)
            scores = tl.where(seen, scores, float("-inf"))
        flat = head.first_row + rows
        row_max, rest = load_statistics(g.statistics_ptr, flat, in_q, True, S)
        found = block_probabilities(scores, row_max[:, None], rest[:, None], head.scale, S)
        keep = None
        if S.DROPOUT:
            keep = dropout_keep(head.seed, flat, column0, head.threshold, S.BLOCK_N)
        if g.dout_ptr is None:
            if S.DROPOUT:
                found = tl.where(keep, found * head.keep_scale, 0.0)
        else:
            v = operand(t.value, 2, at, key_head(h, N, S), at.first_k, g.strides, g.inner, S)
            dout = operand(g.dout_ptr, 4, at, h, at.first_q, g.strides, g.inner, S)
            v_block = load_rows(v, 0, columns, in_k, True, S.VALUE_DIM, S)
            dout_block = load_rows(dout, 0, rows, in_q, True, S.VALUE_DIM, S)
            dp = tl.dot(dout_block, tl.trans(v_block), input_precision=S.PRECISION)
            if S.DROPOUT:
                dp = tl.where(keep, dp * head.keep_scale, 0.0)
            found = found * (dp - load_checked(g.delta_ptr, flat, in_q, 0.0, True)[:, None])
    return found


@triton.jit(do_not_specialize=["plane", "strides", "strides_mask", "totals", "len_q", "len_k", "N", "factor"])
def attention_plane_kernel(
    tensors, dout_ptr, statistics_ptr, delta_ptr, out_ptr, plane, strides, strides_mask, totals, len_q, len_k,
    inner, stride_mn, N, factor, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program computes one block of a contiguous tensor [batch, heads, Lq, Lk], any of whose dimensions may be 1,
    # which stands for a sum over it: the gradient of an additive mask (the scores' own gradient, summed over what the
    # mask was broadcast over), or the softmax weights. Each block is the work of one program, so the sums need no
    # atomics.
    batch, out_batch, out_heads, first_row, row_count = plane
    t = Tensors(*tensors)
    given = Given(t, dout_ptr, statistics_ptr, delta_ptr, strides, strides_mask, totals, len_q, len_k, inner, stride_mn)
    len_k *= S.KEY_UNIT
    all_m = tl.cdiv(row_count, S.BLOCK_M)
    all_n = tl.cdiv(len_k, S.BLOCK_N)
    blocks_m = 1 if SUM_ROWS else all_m
    blocks_n = 1 if SUM_COLUMNS else all_n
    out_n = tl.program_id(0) % blocks_n
    out_m = tl.program_id(0) // blocks_n % blocks_m
    out_h = tl.program_id(0) // blocks_n // blocks_m % out_heads
    out_b = tl.program_id(0) // blocks_n // blocks_m // out_heads
    sum_n = all_n if SUM_COLUMNS else 1
    sum_m = all_m if SUM_ROWS else 1
    sum_h = N.nhead // out_heads
    total = tl.full((S.BLOCK_M, S.BLOCK_N), 0.0, tl.float32)
    for step in range(batch // out_batch * sum_h * sum_m * sum_n):
        column0 = (out_n + step % sum_n) * S.BLOCK_N
        row0 = first_row + (out_m + step // sum_n % sum_m) * S.BLOCK_M
        h = (out_h + step // sum_n // sum_m % sum_h).to(tl.int64)
        b = (out_b + step // sum_n // sum_m // sum_h).to(tl.int64)
        total += _block(given, b, h, row0, column0, True, N, S)
    total *= factor
    rows = out_m * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    columns = out_n * S.BLOCK_N + tl.arange(0, S.BLOCK_N)
    out_ptr += (out_b.to(tl.int64) * out_heads + out_h) * (1 if SUM_ROWS else row_count) * (1 if SUM_COLUMNS else len_k)
    if SUM_ROWS and SUM_COLUMNS:
        tl.store(out_ptr, tl.sum(total).to(out_ptr.dtype.element_ty))
    elif SUM_ROWS:
        tl.store(out_ptr + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < len_k)
    elif SUM_COLUMNS:
        tl.store(out_ptr + rows, tl.sum(total, 1).to(out_ptr.dtype.element_ty), mask=rows < row_count)
    else:
        inside = (rows < row_count)[:, None] & (columns < len_k)[None, :]
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * len_k + columns[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["sequences", "reach", "strides", "strides_mask", "totals", "len_q", "len_k", "N"])
def attention_diagonals_kernel(
    tensors, dout_ptr, statistics_ptr, delta_ptr, out_ptr, sequences, reach, strides, strides_mask, totals, len_q,
    len_k, inner, stride_mn, N, BLOCK_T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program sums the gradient of one head's scores along BLOCK_T diagonals, that is over all pairs of query and
    # key at each of BLOCK_T distances from -reach on. For some queries it computes the block of keys that holds those
    # distances, in which the diagonals are rows shifted against each other, aligns them, and adds the rows up.
    t = Tensors(*tensors)
    given = Given(t, dout_ptr, statistics_ptr, delta_ptr, strides, strides_mask, totals, len_q, len_k, inner, stride_mn)
    chunks = tl.cdiv(2 * reach + 1, BLOCK_T)
    chunk = tl.program_id(0) % chunks
    h = (tl.program_id(0) // chunks).to(tl.int64)
    distance0 = chunk * BLOCK_T - reach
    offs_m = tl.arange(0, S.BLOCK_M)
    offs_t = tl.arange(0, BLOCK_T)
    all_m = tl.cdiv(len_q, S.BLOCK_M)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for step in range(sequences * all_m):
        row0 = step % all_m * S.BLOCK_M
        b = (step // all_m).to(tl.int64)
        start = row0 + distance0 + sequence_of(b, t, totals, len_q, len_k, S).offset
        column0 = start - (start & 7)  # dropout's random numbers come eight columns at a time
        block = _block(given, b, h, row0, column0, False, N, S)
        shifted = offs_m[:, None] + offs_t[None, :] + (start & 7)
        total += tl.sum(tl.gather(block, shifted, 1), 0)
    entry = chunk * BLOCK_T + offs_t
    tl.store(out_ptr + h * (2 * reach + 1) + entry, total, mask=entry < 2 * reach + 1)


def _plane(like: Any, call: Call, sizes: Sequence[int], factor: float, sums: Sequence[bool]) -> Callable[..., None]:
    """A function that fills a tensor by `attention_plane_kernel`, with sums over rows, over columns."""
    config = PLANES.choose(like.query, call.switches, sizes[0])
    go = call.launch(attention_plane_kernel, config, factor, SUM_ROWS=sums[0], SUM_COLUMNS=sums[1])

    def run(out: Tensor, given: Any, changing: Any, max_len_k: int, first_row: int, row_count: int) -> None:
        batch, nhead = out.shape[:2]
        blocks_m = 1 if sums[0] else -(-row_count // config.block_m)
        blocks_n = 1 if sums[1] else -(-max_len_k // config.block_n)
        plane = (sequences(given[0], call.switches.SEQUENCES == "packed"), batch, nhead, first_row, row_count)
        if out.numel():
            go(batch * nhead * blocks_m * blocks_n, 1, *given, out, plane, *changing)

    return run


def mask_gradient(like: Any, call: Call, options: Options, sizes: Sequence[int]) -> Callable[..., Tensor]:
    """A function that gives the gradient of a floating mask, of its shape and dtype."""
    sums = [n == 1 for n in like.attn_mask.shape[2:]]
    fill = _plane(like, call, sizes, 1.0, sums)

    def run(given: Any, changing: Any, max_len_q: int, max_len_k: int) -> Tensor:
        mask = given[0][3]
        shape, dtype = mask.shape, mask.dtype
        if True in sums:  # small: each sequence and head has its own, and they are summed afterwards
            shape = (sequences(given[0], options.packed), call.numbers.nhead, *shape[2:])
            dtype = torch.float32
        out = mask.new_empty(shape, dtype=dtype)
        fill(out, given, changing, max_len_k, 0, max_len_q)
        return out.sum_to_size(mask.shape).to(mask.dtype) if True in sums else out

    return run


def softmax_weights(like: Tensors, options: Options, sizes: Sequence[int]) -> Callable[..., Tensor]:
    """A function that gives the softmax weights of some queries, float32 ``[B, H, rows, Lk]`` or averaged
    ``[B, rows, Lk]``, from the forward pass's statistics; after dropout if the call has any."""
    call = Call(like, options, sizes)
    heads = 1 if options.average else call.numbers.nhead
    fill = _plane(like, call, sizes, heads / call.numbers.nhead, (False, False))

    def run(tensors: Any, statistics: Tensor, max_len_q: int, max_len_k: int, first_row: int, row_count: int) -> Tensor:
        shape = (sequences(tensors, options.packed), heads, row_count, max_len_k)
        out = tensors[0].new_empty(shape, dtype=torch.float32)
        changing = call.changing(tensors, max_len_q, max_len_k)
        fill(out, (tensors, None, statistics, None), changing, max_len_k, first_row, row_count)
        return out.squeeze(1) if options.average else out

    return run


_DIAGONALS = 32
"""Distances of a program; with 16 queries and up to 7 columns for alignment they fit into a block of 64 keys."""


def relative_gradient(call: Call, options: Options) -> Callable[..., Tensor]:
    """A function that gives the gradient of a relative bias, of its shape and dtype."""
    go, nhead = call.launch(attention_diagonals_kernel, Config(16, 64, 4, 1), BLOCK_T=_DIAGONALS), call.numbers.nhead

    def run(given: Any, changing: Any, max_len_q: int, max_len_k: int) -> Tensor:
        bias, reach = given[0][4], max(max_len_q, max_len_k) - 1  # no distance is larger
        out = bias.new_empty((nhead, 2 * reach + 1), dtype=torch.float32)
        many = sequences(given[0], options.packed)
        go(nhead * -(-(2 * reach + 1) // _DIAGONALS), 1, *given, out, many, reach, *changing)
        past = reach - bias.shape[1] // 2
        if past > 0:  # distances past the table's ends count for its ends
            kept = out[:, past:-past].clone()
            kept[:, 0] += out[:, :past].sum(1)
            kept[:, -1] += out[:, -past:].sum(1)
            out = kept
        elif past < 0:
            out = torch.nn.functional.pad(out, (-past, -past))
        return out.sum_to_size(bias.shape).to(bias.dtype)

    return run
