"""Attention forward: the flash algorithm, and its launcher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.blocks import dropout_keep
from .arguments import Options, Tensors
from .blocks import LN2, LOG2E, block_of_queries, keys_at, load_rows, parts_of_keys, result, store_rows
from .configs import FORWARD
from .launching import Call, sequences


@triton.jit
def _visit_keys(acc, row_max, row_sum, q, k, v, rows, head, ends, PART: tl.constexpr, S: tl.constexpr):
    """Online softmax over one part of the keys."""
    CHECK: tl.constexpr = PART != 1 or S.SPARSE > 0
    factor = head.scale * LOG2E
    for position in range(ends[2 * PART], ends[2 * PART + 1], S.BLOCK_N):
        start, inside, _, scores, _ = keys_at(position, q, k, rows, head, PART, S)
        # A row that has met no key to see has maximum -inf: subtracting 0 instead keeps exp2 at 0, not NaN.
        if S.ADDED:
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2((scores - shift[:, None]) * LOG2E)
            correction = tl.exp2((row_max - shift) * LOG2E)
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
            shift = tl.where(new_max == float("-inf"), 0.0, new_max) if CHECK or S.MASK != "none" else new_max
            p = tl.exp2(scores * factor - shift[:, None])
            correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        if S.DROPOUT:  # the softmax's denominator counts the dropped keys too
            keep = dropout_keep(head.seed, head.first_row + rows, start, head.threshold, S.BLOCK_N)
            p = tl.where(keep, p * head.keep_scale, 0.0)
        v_block = load_rows(v, start, tl.arange(0, S.BLOCK_N), inside, CHECK, S.VALUE_DIM, S)  # [BN, BDV]
        acc = tl.dot(p.to(v_block.dtype), v_block, acc, input_precision=S.PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["strides_out", "strides", "strides_mask", "totals", "len_q", "len_k", "N"])
def attention_forward_kernel(
    tensors, out_ptr, lse_ptr, statistics_ptr, strides_out, strides, strides_mask, totals, len_q, len_k,
    inner, stride_mn, N, S: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_M rows of softmax(scale * Q K^T + mask) V for one head. It reads its queries once and
    # every key and value they see once, and writes the output, and of each row the log-sum-exp where it is needed
    # later; the scores never leave the chip. Online softmax: Dao et al., "FlashAttention" (2022), algorithm 1, with the
    # division by the row sum delayed to the end (FlashAttention-2, section 3.1).
    t = Tensors(*tensors)
    block, at, head, q, k, v = block_of_queries(t, strides, strides_mask, totals, len_q, len_k, inner, stride_mn, N, S)
    rows = block * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    q_block = load_rows(q, 0, rows, rows < at.len_q, True, S.HEAD_DIM, S)
    acc = tl.full((S.BLOCK_M, S.BLOCK_DV), 0.0, tl.float32)
    row_max = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.full((S.BLOCK_M,), 0.0, tl.float32)
    ends = parts_of_keys(block * S.BLOCK_M, head, S)
    for part in tl.static_range(0 if S.LEFT and not S.SPARSE else 1, 3):
        acc, row_max, row_sum = _visit_keys(acc, row_max, row_sum, q_block, k, v, rows, head, ends, part, S)

    empty = row_sum == 0.0  # no key seen: output 0, log-sum-exp -inf
    stored = rows < len_q
    if S.SEQUENCES == "packed":
        stored = rows < at.len_q
    elif S.SEQUENCES == "lengths":
        empty = empty | (rows >= at.len_q)
    row_sum = tl.where(empty, 1.0, row_sum)
    out = tl.where(empty[:, None], 0.0, acc) / row_sum[:, None]
    store_rows(result(out_ptr, at, head.h, at.first_q, strides_out, S), rows, stored, out, S.VALUE_DIM, S)
    # For the backward pass, see load_statistics; and for the caller in natural logarithms.
    flat = head.first_row + rows
    rest = tl.log2(row_sum)
    if statistics_ptr is not None:
        if S.ADDED:
            tl.store(statistics_ptr + 2 * flat, tl.where(empty, 0.0, row_max), mask=stored)
            tl.store(statistics_ptr + 2 * flat + 1, tl.where(empty, float("inf"), rest), mask=stored)
        else:
            tl.store(statistics_ptr + flat, tl.where(empty, float("inf"), row_max + rest), mask=stored)
    if lse_ptr is not None:
        lse = row_max + rest * LN2 if S.ADDED else (row_max + rest) * LN2
        tl.store(lse_ptr + flat, tl.where(empty, float("-inf"), lse), mask=stored)


Results = tuple[Tensor, Tensor | None, Tensor | None]


def attention_forward(
    like: Tensors, options: Options, sizes: Sequence[int], needs: Sequence[bool]
) -> Callable[..., Results]:
    """A function of the tensors of a call and the longest lengths that launches the kernel: the output, the log-sum-exp
    in float32 if asked for, and with `needs` what the backward pass needs of it (see `Saved`)."""
    call = Call(like, options, sizes)
    config = FORWARD.choose(like.query, call.switches, sizes[0])
    go = call.launch(attention_forward_kernel, config)
    block_m, nhead, value_dim, packed = config.block_m, call.numbers.nhead, call.switches.VALUE_DIM, options.packed
    per_row = 0 if not needs else 2 if call.switches.ADDED else 1

    def run(*arguments: Any) -> Results:
        tensors, max_len_q, max_len_k = arguments[:-2], arguments[-2], arguments[-1]
        query = tensors[0]
        out, strides_out = call.new_result(query, value_dim)
        shape, lse, statistics = call.rows_of(query), None, None
        if per_row:
            statistics = query.new_empty(per_row * math.prod(shape), dtype=torch.float32)
        if options.return_lse:
            lse = query.new_empty(shape, dtype=torch.float32)
        programs = -(-max_len_q // block_m) * nhead * sequences(tensors, packed)
        if programs:
            changing = call.changing(tensors, max_len_q, max_len_k)
            go(programs, 1, tensors, out, lse, statistics, strides_out, *changing)
        return out, lse, statistics

    return run
