"""Attention backward: dK and dV per key block, dQ per query block, and their launcher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import column_sums
from ..common.blocks import dropout_keep
from ..common.column_sums import Job, add_up_columns
from .arguments import Options, Saved, Tensors
from .blocks import (
    block_at,
    block_of_queries,
    block_probabilities,
    block_scores,
    head_of,
    keys_at,
    load_checked,
    load_rows,
    load_statistics,
    operand,
    parts,
    parts_of_keys,
    result,
    sequence_of,
    store_rows,
)
from .configs import DKDV, DQ
from .launching import Call, sequences
from .planes import mask_gradient, relative_gradient


@triton.jit
def _visit_queries(
    dk, dv, k, v, q, dout, statistics_ptr, delta_ptr, columns, column0, head, ends, PART: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Add one part of the queries to dK and dV; all blocks of scores are transposed, ``[BN, BM]``."""
    CHECK: tl.constexpr = PART != 1 or S.SPARSE > 0
    TILED: tl.constexpr = PART == 2 and S.SPARSE > 0
    offs_m = tl.arange(0, S.BLOCK_M)
    for position in range(ends[2 * PART], ends[2 * PART + 1], S.BLOCK_M):
        start, tiles = block_at(position, head, TILED, S)
        rows = start + offs_m
        inside = rows < head.len_q
        q_block = load_rows(q, start, offs_m, inside, CHECK, S.HEAD_DIM, S)  # [BM, BD]
        products = tl.dot(k, tl.trans(q_block), input_precision=S.PRECISION)
        scores, damping = block_scores(products, rows[None, :], columns[:, None], tiles, head, CHECK, TILED, S)
        row_max, rest = load_statistics(statistics_ptr, rows, inside, CHECK, S)
        p = block_probabilities(scores, row_max[None, :], rest[None, :], head.scale, S)
        dout_block = load_rows(dout, start, offs_m, inside, CHECK, S.VALUE_DIM, S)  # [BM, BDV]
        dp = tl.dot(v, tl.trans(dout_block), input_precision=S.PRECISION)
        dropped = p
        if S.DROPOUT:
            keep = tl.trans(dropout_keep(head.seed, head.first_row + rows, column0, head.threshold, S.BLOCK_N))
            dropped = tl.where(keep, p * head.keep_scale, 0.0)
            dp = tl.where(keep, dp * head.keep_scale, 0.0)
        dv = tl.dot(dropped.to(dout_block.dtype), dout_block, dv, input_precision=S.PRECISION)
        delta = load_checked(delta_ptr, rows, inside, 0.0, CHECK)
        ds = p * (dp - delta[None, :])
        if S.SOFTCAP:
            ds *= damping
        dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision=S.PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "strides_dk", "strides_dv", "partial_rows", "strides", "strides_mask", "totals", "len_q", "len_k", "N"
    ]
)  # fmt: skip
def attention_dkdv_kernel(
    tensors, dout_ptr, statistics_ptr, delta_ptr, dk_ptr, dv_ptr, partial_ptrs, sum_ptrs,
    strides_dk, strides_dv, partial_rows, strides, strides_mask, totals, len_q, len_k,
    inner, stride_mn, N, offsets, partial_strides, widths, JOBS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program computes dK and dV for BLOCK_N keys of one head: it reads its keys and values once and visits the
    # queries that see them, of every head that shares them, recomputing P from the log-sum-exp. With Z the dropout
    # factor (0 or 1 / (1 - p)):
    #   dV = (P Z)^T dO      dS = P (Z dO V^T - delta)      dK = scale * dS^T Q
    # (FlashAttention-2, algorithm 2; FlashAttention, appendix B.2 for dropout). No two programs share an output, so the
    # sums need no atomics and two runs give the same bits. Then the programs share the column sums that earlier kernels
    # left to be done, if any, which saves those a launch.
    t = Tensors(*tensors)
    blocks_n = tl.cdiv(len_k * S.KEY_UNIT, S.BLOCK_N)
    column0 = tl.program_id(0) % blocks_n * S.BLOCK_N
    program = tl.program_id(0) // blocks_n
    key_nhead = N.nhead // N.group
    key_h = (program % key_nhead).to(tl.int64)
    at = sequence_of((program // key_nhead).to(tl.int64), t, totals, len_q, len_k, S)
    columns = column0 + tl.arange(0, S.BLOCK_N)
    inside = columns < at.len_k
    k = operand(t.key, 1, at, key_h, at.first_k, strides, inner, S)
    v = operand(t.value, 2, at, key_h, at.first_k, strides, inner, S)
    k_block = load_rows(k, 0, columns, inside, True, S.HEAD_DIM, S)
    v_block = load_rows(v, 0, columns, inside, True, S.VALUE_DIM, S)
    dk = tl.full((S.BLOCK_N, S.BLOCK_D), 0.0, tl.float32)
    dv = tl.full((S.BLOCK_N, S.BLOCK_DV), 0.0, tl.float32)
    for member in range(N.group if S.GROUPED else 1):
        h = key_h * N.group + member
        head = head_of(at, h, column0, True, t, strides_mask, stride_mn, totals[0], N, S)
        q = operand(t.query, 0, at, h, at.first_q, strides, inner, S)
        dout = operand(dout_ptr, 4, at, h, at.first_q, strides, inner, S)
        # A block of keys past the end computes rubbish that is not stored, so it needs a check only for the mask.
        ends = parts(
            column0, S.BLOCK_N, at.len_k, at.len_q, -at.offset, N.right, N.left, head, S.RIGHT, S.LEFT,
            S.MASK != "none", S.BLOCK_M, S,
        )  # fmt: skip
        for part in tl.static_range(0 if S.RIGHT and not S.SPARSE else 1, 3):
            dk, dv = _visit_queries(
                dk, dv, k_block, v_block, q, dout, statistics_ptr + head.first_row * (2 if S.ADDED else 1),
                delta_ptr + head.first_row, columns, column0, head, ends, part, S,
            )  # fmt: skip

    stored = columns < len_k * S.KEY_UNIT
    if S.SEQUENCES == "packed":
        stored = inside
    elif S.SEQUENCES == "lengths":  # padding keys get a zero gradient
        dk = tl.where(inside[:, None], dk, 0.0)
        dv = tl.where(inside[:, None], dv, 0.0)
    dk *= N.softmax_scale
    store_rows(result(dk_ptr, at, key_h, at.first_k, strides_dk, S), columns, stored, dk, S.HEAD_DIM, S)
    store_rows(result(dv_ptr, at, key_h, at.first_k, strides_dv, S), columns, stored, dv, S.VALUE_DIM, S)
    if JOBS > 0:
        add_up_columns(partial_ptrs, sum_ptrs, partial_rows, offsets, partial_strides, widths, JOBS)


@triton.jit
def _visit_keys(
    dq, weight, q, dout, row_max, rest, delta, k, v, rows, head, ends, WEIGHTS: tl.constexpr, PART: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Add one part of the keys to dQ, and with WEIGHTS what dropout left of each row's weights to `weight`."""
    CHECK: tl.constexpr = PART != 1 or S.SPARSE > 0
    for position in range(ends[2 * PART], ends[2 * PART + 1], S.BLOCK_N):
        start, inside, k_block, scores, damping = keys_at(position, q, k, rows, head, PART, S)
        p = block_probabilities(scores, row_max[:, None], rest[:, None], head.scale, S)  # [BM, BN]
        v_block = load_rows(v, start, tl.arange(0, S.BLOCK_N), inside, CHECK, S.VALUE_DIM, S)  # [BN, BDV]
        dp = tl.dot(dout, tl.trans(v_block), input_precision=S.PRECISION)
        if S.DROPOUT:
            keep = dropout_keep(head.seed, head.first_row + rows, start, head.threshold, S.BLOCK_N)
            dp = tl.where(keep, dp * head.keep_scale, 0.0)
            if WEIGHTS:
                weight += tl.sum(tl.where(keep, p * head.keep_scale, 0.0), 1)
        ds = p * (dp - delta[:, None])
        if S.SOFTCAP:
            ds *= damping
        dq = tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision=S.PRECISION)
    return dq, weight


@triton.jit(do_not_specialize=["strides_dq", "strides", "strides_mask", "totals", "len_q", "len_k", "N"])
def attention_dq_kernel(
    tensors, out_ptr, dout_ptr, dlse_ptr, statistics_ptr, delta_ptr, dq_ptr, q_bias_ptr, v_bias_ptr,
    strides_dq, strides, strides_mask, totals, len_q, len_k, inner, stride_mn, N, S: tl.constexpr,
):  # fmt: skip
    # One program computes dQ = scale * dS K for BLOCK_M queries of one head, with dS as in the dK/dV kernel. It reads
    # its queries, O, dO and LSE once, and every key and value that they see once. The kernels after it need
    #   delta = rowsum(O * dO) - dLSE
    # which it leaves in memory, and without `dq_ptr` nothing else: the softmax's backward pass needs rowsum(P * dP),
    # which is that (FlashAttention-2, algorithm 2, line 4); a gradient of the log-sum-exp enters the scores as
    # +P * dLSE, so it joins with a minus.
    # With the last two pointers it also writes its share of the gradients of what was added to each query and to each
    # value, their projections' biases: the sum of dQ, and since a value's bias reaches a row of the output through all
    # its weights, the sum of dO times the sum of P Z. (A key's bias has no gradient: it moves all scores of a row
    # alike.)
    t = Tensors(*tensors)
    block, at, head, q, k, v = block_of_queries(t, strides, strides_mask, totals, len_q, len_k, inner, stride_mn, N, S)
    h = head.h
    rows = block * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    flat = head.first_row + rows
    inside = rows < at.len_q
    stored = inside if S.SEQUENCES == "packed" else rows < len_q
    dout = operand(dout_ptr, 4, at, h, at.first_q, strides, inner, S)
    dout_block = load_rows(dout, 0, rows, inside, True, S.VALUE_DIM, S)
    out = operand(out_ptr, 3, at, h, at.first_q, strides, inner, S)
    out_block = load_rows(out, 0, rows, inside, True, S.VALUE_DIM, S)
    delta = tl.sum(out_block.to(tl.float32) * dout_block.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + flat, mask=inside, other=0.0)
    tl.store(delta_ptr + flat, delta, mask=stored)
    if dq_ptr is not None:
        q_block = load_rows(q, 0, rows, inside, True, S.HEAD_DIM, S)
        row_max, rest = load_statistics(statistics_ptr, flat, inside, True, S)
        dq = tl.full((S.BLOCK_M, S.BLOCK_D), 0.0, tl.float32)
        weight = tl.full((S.BLOCK_M,), 0.0, tl.float32)
        WEIGHTS: tl.constexpr = q_bias_ptr is not None and S.DROPOUT
        ends = parts_of_keys(block * S.BLOCK_M, head, S)
        for part in tl.static_range(0 if S.LEFT and not S.SPARSE else 1, 3):
            dq, weight = _visit_keys(
                dq, weight, q_block, dout_block, row_max, rest, delta, k, v, rows, head, ends, WEIGHTS, part, S
            )
        if S.SEQUENCES == "lengths":  # padding queries get a zero gradient
            dq = tl.where(inside[:, None], dq, 0.0)
        dq *= N.softmax_scale
        if q_bias_ptr is not None:
            if not S.DROPOUT:
                weight = tl.where(rest < float("inf"), 1.0, 0.0)
            # One row of shares for each block of queries; of values one for each query head that shares a key head.
            offs_d = tl.arange(0, S.BLOCK_D)
            offs_dv = tl.arange(0, S.BLOCK_DV)
            row = at.number * tl.cdiv(len_q, S.BLOCK_M) + block
            valid_dq = tl.where(inside[:, None], dq, 0.0)  # rows past the end are rubbish without a check
            q_bias_ptrs = q_bias_ptr + (row * N.nhead + h) * S.HEAD_DIM + offs_d
            tl.store(q_bias_ptrs, tl.sum(valid_dq, 0), mask=offs_d < S.HEAD_DIM)
            row = row * N.group + h % N.group
            v_bias_ptrs = v_bias_ptr + (row * (N.nhead // N.group) + h // N.group) * S.VALUE_DIM + offs_dv
            tl.store(v_bias_ptrs, tl.sum(weight[:, None] * dout_block.to(tl.float32), 0), mask=offs_dv < S.VALUE_DIM)
        store_rows(result(dq_ptr, at, h, at.first_q, strides_dq, S), rows, stored, dq, S.HEAD_DIM, S)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of query, key, value, attn_mask and relative_bias."""


def attention_backward(
    grads: Sequence[Tensor | None], saved: Sequence[Any], options: Options, sizes: Sequence[int],
    needs: Sequence[bool], *, bias_sums: bool = False,
) -> Callable[..., Gradients]:  # fmt: skip
    """A function of `grads`, `saved` and the longest lengths that launches the kernels that are needed.

    dQ, dK and dV have the memory order of their inputs, or go to the tensors `into`, strided like these. Sums in a list
    `jobs`, always of the same number and forms, are done on the side by the dK/dV kernel, which takes them from the
    list. With `bias_sums` the gradients of what was added to all queries, keys and values are jobs too: they fill
    `dbias`, ``[H D + Hk D + Hk Dv]``.
    """
    like, needs_dkv = Saved(*saved), needs[1] or needs[2]
    call = Call(like, options, sizes, like.out, like.out if grads[0] is None else grads[0])
    head_dim, value_dim = call.switches.HEAD_DIM, call.switches.VALUE_DIM
    nhead, group, packed = call.numbers.nhead, call.numbers.group, options.packed
    on_dq, on_dkdv = (table.choose(like.query, call.switches, sizes[0]) for table in (DQ, DKDV))
    go_dq, go_dkdv = call.launch(attention_dq_kernel, on_dq), None
    of_mask = mask_gradient(like, call, options, sizes) if needs[3] else None
    of_relative = relative_gradient(call, options) if needs[4] else None

    def run(
        grads: Sequence[Tensor | None], saved: Sequence[Any], max_len_q: int, max_len_k: int, *,
        into: Sequence[Any] | None = None, jobs: Any = None, dbias: Any = None,
    ) -> Gradients:  # fmt: skip
        nonlocal go_dkdv
        dout, dlse = grads
        tensors, out, statistics = tuple(saved[:-2]), saved[-2], saved[-1]
        query, key, value, mask, bias = tensors[:5]
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            dlse = dlse.contiguous()
        dq = dk = dv = strides_dq = strides_dk = strides_dv = None
        if into is not None:
            dq, dk, dv = into
            strides_dq, strides_dk, strides_dv = call.result(dq), call.result(dk), call.result(dv)
        else:
            if needs[0]:
                dq, strides_dq = call.new_result(query, head_dim)
            if needs_dkv:
                dk, strides_dk = call.new_result(key, head_dim)
                dv, strides_dv = call.new_result(value, value_dim)
        many = sequences(tensors, packed)
        if not (many and query.numel() and key.numel()):
            *found, _ = [None if t is None else t.zero_() for t in (dq, dk, dv, dbias)]
            return *found, *[torch.zeros_like(t) if n else None for t, n in ((mask, needs[3]), (bias, needs[4]))]  # type: ignore[return-value]
        q_bias = v_bias = dmask = drelative = None
        blocks = -(-max_len_q // on_dq.block_m) * many
        if bias_sums:
            widths = (nhead * head_dim, nhead // group * head_dim, nhead // group * value_dim)
            q_bias = query.new_empty((blocks, widths[0]), dtype=torch.float32)
            v_bias = query.new_empty((blocks * group, widths[2]), dtype=torch.float32)
            of_q, of_k, of_v = dbias.split(widths)
            # A key's bias: no row adds up to 0.
            jobs += [Job(q_bias, 0, blocks, of_q), Job(q_bias, 0, 0, of_k), Job(v_bias, 0, blocks * group, of_v)]
        delta = query.new_empty(math.prod(call.rows_of(query)), dtype=torch.float32)
        changing = call.changing(tensors, max_len_q, max_len_k, out, dout)
        given = (out, dout, dlse, statistics, delta, dq, q_bias, v_bias)
        go_dq(blocks * nhead, 1, tensors, *given, strides_dq or (0, 0, 0), *changing)
        if dk is not None:
            if go_dkdv is None:  # made with the first jobs
                fixed = column_sums.fixed(jobs or [])
                go_dkdv = call.launch(attention_dkdv_kernel, on_dkdv, *fixed, JOBS=len(fixed[0]))
            partials, sums, partial_rows = column_sums.changing(jobs) if jobs else ((), (), ())
            go_dkdv(
                -(-max_len_k // on_dkdv.block_n) * many * (nhead // group), 1, tensors, dout, statistics, delta, dk, dv,
                partials, sums, strides_dk, strides_dv, partial_rows, *changing,
            )  # fmt: skip
            if jobs:
                jobs.clear()
        if of_mask is not None:
            dmask = of_mask((tensors, dout, statistics, delta), changing, max_len_q, max_len_k)
        if of_relative is not None:
            drelative = of_relative((tensors, dout, statistics, delta), changing, max_len_q, max_len_k)
        return dq, dk, dv, dmask, drelative

    return run
