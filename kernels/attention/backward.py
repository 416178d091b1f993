"""Attention backward: dK and dV per key block, dQ per query block, and their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common.blocks import dropout_keep
from ..common.column_sums import ColumnSums, add_up_columns
from .arguments import Inputs, Options, sequences
from .blocks import (
    block_probabilities,
    block_scores,
    both_sequences,
    live_block,
    live_blocks,
    load_row,
    load_statistics,
    load_tile,
    terms_of,
    tile,
    visible_keys,
    visible_range,
)
from .configs import DKDV, DQ
from .launching import Call, describe, empty_in_order_of, reaches_far, strides_of_list


@triton.jit
def row_delta(out, dout, dlse_ptr, flat, inside, HAS_DLSE: tl.constexpr):
    """``rowsum(O * dO) - dLSE``. The softmax's backward pass needs rowsum(P * dP), which is this (FlashAttention-2,
    algorithm 2, line 4); a gradient of the log-sum-exp enters the scores as +P * dLSE, so it joins with a minus."""
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + flat, mask=inside, other=0.0)
    return delta


@triton.jit(do_not_specialize=["len_q"])
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, strides_out, strides_dout, nhead, len_q,
    HAS_DLSE: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One program computes the delta of BLOCK_M rows of one head, for when dQ, whose kernel does it, is not wanted.
    stride_ob, stride_oh, stride_om, stride_od = strides_out
    stride_gb, stride_gh, stride_gm, stride_gd = strides_dout
    blocks_m = tl.cdiv(len_q, BLOCK_M)
    pid_m = tl.program_id(0) % blocks_m
    head = (tl.program_id(0) // blocks_m).to(tl.int64)
    b = head // nhead
    h = head % nhead
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DV)
    inside = (rows < len_q)[:, None] & (dims < VALUE_DIM)[None, :]
    m = rows.to(tl.int64)[:, None]
    d = dims.to(tl.int64)[None, :]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + m * stride_om + d * stride_od
    dout_ptrs = dout_ptr + b * stride_gb + h * stride_gh + m * stride_gm + d * stride_gd
    out = tl.load(out_ptrs, mask=inside, other=0.0)
    dout = tl.load(dout_ptrs, mask=inside, other=0.0)
    flat = head * len_q + rows
    delta = row_delta(out, dout, dlse_ptr, flat, rows < len_q, HAS_DLSE)
    tl.store(delta_ptr + flat, delta, mask=rows < len_q)


@triton.jit
def _visit_queries(
    dk, dv, k, v, q_ptr, dout_ptr, statistics_ptr, delta_ptr, q_strides, flat0, columns, first_column,
    terms, limits, random, sparse, first, last, CHECK: tl.constexpr, TILED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Add the queries in ``[first, last)`` to dK and dV; all blocks of scores are transposed, ``[BN, BM]``."""
    stride_qm, stride_qd, stride_gm, stride_gd = q_strides
    seed, dropout_threshold, keep_scale = random
    list_ptr, map_ptr, stride_map, tiles_ptr = sparse
    len_q = limits[0]
    offs_m = tl.arange(0, S.BLOCK_M)
    offs_d = tl.arange(0, S.BLOCK_D)
    offs_dv = tl.arange(0, S.BLOCK_DV)
    q_at = tile(offs_m, stride_qm, offs_d, stride_qd, S)
    dout_at = tile(offs_m, stride_gm, offs_dv, stride_gd, S)
    for position in range(first, last, S.BLOCK_M):
        start = position
        tile_ptr = tiles_ptr
        if S.SPARSE:
            start, tile_ptr = live_block(list_ptr, map_ptr, tiles_ptr, stride_map, position, TILED, S)
        rows = start + offs_m
        far = tl.cast(start, tl.int64)
        inside = rows < len_q
        q = load_tile(q_ptr + far * stride_qm + q_at, inside, offs_d, CHECK, S.HEAD_DIM, S.BLOCK_D)  # [BM, BD]
        products = tl.dot(k, tl.trans(q), input_precision=S.PRECISION)
        scores, damping = block_scores(
            products, rows[None, :], columns[:, None], tile_ptr, terms, limits, CHECK, TILED, S
        )  # [BN, BM]
        row_max, rest = load_statistics(statistics_ptr, rows, inside, CHECK, S)
        p = block_probabilities(scores, row_max[None, :], rest[None, :], terms[0], S)
        dout_ptrs = dout_ptr + far * stride_gm + dout_at
        dout = load_tile(dout_ptrs, inside, offs_dv, CHECK, S.VALUE_DIM, S.BLOCK_DV)  # [BM, BDV]
        dp = tl.dot(v, tl.trans(dout), input_precision=S.PRECISION)
        dropped = p
        if S.DROPOUT:
            keep = tl.trans(dropout_keep(seed, flat0 + rows, first_column, dropout_threshold, S.BLOCK_N))
            dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=S.PRECISION)
        delta = load_row(delta_ptr, rows, inside, 0.0, CHECK)
        ds = p * (dp - delta[None, :])
        if S.SOFTCAP:
            ds *= damping
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=S.PRECISION)
    return dk, dv


@triton.jit
def _add_head(
    dk, dv, k, v, b, h, own, first_q, columns, column0, pointers, strides, nhead, total_q, limits, window, numbers,
    seed, dropout_threshold, ragged, S: tl.constexpr,
):  # fmt: skip
    """Add what the queries of one head give to dK and dV."""
    q_ptr, dout_ptr, statistics_ptr, delta_ptr, mask_ptr, relative_ptr, slopes_ptr, map_ptr, list_ptr, tiles_ptr = (
        pointers
    )
    strides_q, strides_dout, strides_mask, strides_added, strides_map, strides_list = strides
    stride_qb, stride_qh, stride_qm, stride_qd = strides_q
    stride_gb, stride_gh, stride_gm, stride_gd = strides_dout
    len_q, len_k, offset, left, right = limits
    q_base = q_ptr + own * stride_qb + h * stride_qh + first_q * stride_qm
    dout_base = dout_ptr + own * stride_gb + h * stride_gh + first_q * stride_gm
    flat0 = (own * nhead + h) * total_q + first_q
    statistics_ptr += flat0 * (2 if S.ADDED else 1)
    delta_ptr += flat0
    terms = terms_of(b, h, mask_ptr, relative_ptr, slopes_ptr, strides_mask, strides_added, window, numbers, S)
    random = (seed, dropout_threshold, numbers[2])
    q_strides = (stride_qm, stride_qd, stride_gm, stride_gd)
    if S.SPARSE:
        list_ptr += b * strides_list[0] + h * strides_list[1] + column0 // S.SPARSE * strides_list[2]
        map_ptr += b * strides_map[0] + h * strides_map[1] + column0 // S.SPARSE * strides_map[3]
        sparse, full, live = live_blocks(list_ptr, map_ptr, strides_map[2], tiles_ptr, column0 < len_k, S)
        dk, dv = _visit_queries(
            dk, dv, k, v, q_base, dout_base, statistics_ptr, delta_ptr, q_strides, flat0, columns, column0,
            terms, limits, random, sparse, 0, full, True, False, S,
        )  # fmt: skip
        dk, dv = _visit_queries(
            dk, dv, k, v, q_base, dout_base, statistics_ptr, delta_ptr, q_strides, flat0, columns, column0,
            terms, limits, random, sparse, full, live, True, True, S,
        )  # fmt: skip
    else:
        # A block of keys past the end computes rubbish that is not stored, so it needs a check only for the mask.
        sparse = (list_ptr, map_ptr, 0, tiles_ptr)
        low, plain_low, plain_high, high = visible_range(
            column0, S.BLOCK_N, len_q, -offset, right, left, ragged, S.RIGHT, S.LEFT, S.BLOCK_M
        )
        if S.SEQUENCES != "dense":
            if column0 >= len_k:
                high = 0
                plain_high = 0
        if S.RIGHT:
            dk, dv = _visit_queries(
                dk, dv, k, v, q_base, dout_base, statistics_ptr, delta_ptr, q_strides, flat0, columns, column0,
                terms, limits, random, sparse, low, tl.minimum(plain_low, high), True, False, S,
            )  # fmt: skip
        dk, dv = _visit_queries(
            dk, dv, k, v, q_base, dout_base, statistics_ptr, delta_ptr, q_strides, flat0, columns, column0,
            terms, limits, random, sparse, plain_low, plain_high, False, False, S,
        )  # fmt: skip
        dk, dv = _visit_queries(
            dk, dv, k, v, q_base, dout_base, statistics_ptr, delta_ptr, q_strides, flat0, columns, column0,
            terms, limits, random, sparse, plain_high, high, True, False, S,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["len_q", "window", "partial_rows"])
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, delta_ptr, dk_ptr, dv_ptr,
    mask_ptr, relative_ptr, slopes_ptr, seed_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, list_ptr, tiles_ptr,
    strides_q, strides_k, strides_v, strides_dout, strides_dk, strides_dv,
    strides_mask, strides_added, strides_map, strides_list,
    heads, rows_of, len_q, len_k, window, numbers, dropout_threshold,
    partial_ptrs, sum_ptrs, partial_rows, partial_strides, widths, JOBS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program computes dK and dV for BLOCK_N keys of one head: it reads its keys and values once and
    # walks over the queries that see them, of every head that shares them, recomputing P from the
    # log-sum-exp. With Z the dropout factor (0 or 1 / (1 - p)):
    #   dV = (P Z)^T dO      dS = P (Z dO V^T - delta)      dK = scale * dS^T Q
    # (FlashAttention-2, algorithm 2; FlashAttention, appendix B.2 for dropout). No two programs share an
    # output, so the sums need no atomics and two runs give the same bits. Then the programs share the column sums that
    # earlier kernels left to be done, if any, which saves those a launch.
    nhead, group = heads
    stride_kb, stride_kh, stride_kn, stride_kd = strides_k
    stride_vb, stride_vh, stride_vn, stride_vd = strides_v
    stride_dkb, stride_dkh, stride_dkn, stride_dkd = strides_dk
    stride_dvb, stride_dvh, stride_dvn, stride_dvd = strides_dv
    key_nhead = nhead // group

    blocks_n = tl.cdiv(len_k, S.BLOCK_N)
    column0 = tl.program_id(0) % blocks_n * S.BLOCK_N
    head = tl.program_id(0) // blocks_n
    b = (head // key_nhead).to(tl.int64)
    key_h = (head % key_nhead).to(tl.int64)
    own, first_q, first_k, limits = both_sequences(b, seqlens_q_ptr, seqlens_k_ptr, rows_of, len_q, len_k, window, S)
    longest = len_k
    len_k = limits[1]
    seed = tl.load(seed_ptr) if S.DROPOUT else 0

    columns = column0 + tl.arange(0, S.BLOCK_N)
    offs_d = tl.arange(0, S.BLOCK_D)
    offs_dv = tl.arange(0, S.BLOCK_DV)
    k_base = k_ptr + own * stride_kb + key_h * stride_kh + first_k * stride_kn
    v_base = v_ptr + own * stride_vb + key_h * stride_vh + first_k * stride_vn
    inside = columns < len_k
    k = load_tile(k_base + tile(columns, stride_kn, offs_d, stride_kd, S), inside, offs_d, True, S.HEAD_DIM, S.BLOCK_D)
    v_ptrs = v_base + tile(columns, stride_vn, offs_dv, stride_vd, S)
    v = load_tile(v_ptrs, inside, offs_dv, True, S.VALUE_DIM, S.BLOCK_DV)
    dk = tl.full((S.BLOCK_N, S.BLOCK_D), 0.0, tl.float32)
    dv = tl.full((S.BLOCK_N, S.BLOCK_DV), 0.0, tl.float32)
    ragged = False
    if S.MASK != "none":
        ragged = column0 + S.BLOCK_N > len_k
    pointers = (
        q_ptr, dout_ptr, statistics_ptr, delta_ptr, mask_ptr, relative_ptr, slopes_ptr, map_ptr, list_ptr, tiles_ptr,
    )  # fmt: skip
    strides = (strides_q, strides_dout, strides_mask, strides_added, strides_map, strides_list)
    if S.GROUPED:
        for member in range(group):
            dk, dv = _add_head(
                dk, dv, k, v, b, key_h * group + member, own, first_q, columns, column0, pointers, strides, nhead,
                rows_of[0], limits, window, numbers, seed, dropout_threshold, ragged, S,
            )  # fmt: skip
    else:
        dk, dv = _add_head(
            dk, dv, k, v, b, key_h, own, first_q, columns, column0, pointers, strides, nhead,
            rows_of[0], limits, window, numbers, seed, dropout_threshold, ragged, S,
        )  # fmt: skip

    stored = columns < longest
    if S.SEQUENCES == "packed":
        stored = inside
    elif S.SEQUENCES == "lengths":  # keys past the end are nobody's, but their gradient is written
        dk = tl.where(inside[:, None], dk, 0.0)
        dv = tl.where(inside[:, None], dv, 0.0)
    dk_base = dk_ptr + own * stride_dkb + key_h * stride_dkh + first_k * stride_dkn
    dv_base = dv_ptr + own * stride_dvb + key_h * stride_dvh + first_k * stride_dvn
    dk = (dk * numbers[0]).to(dk_ptr.dtype.element_ty)
    dk_ptrs = dk_base + tile(columns, stride_dkn, offs_d, stride_dkd, S)
    dv_ptrs = dv_base + tile(columns, stride_dvn, offs_dv, stride_dvd, S)
    tl.store(dk_ptrs, dk, mask=stored[:, None] & (offs_d < S.HEAD_DIM)[None, :])
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=stored[:, None] & (offs_dv < S.VALUE_DIM)[None, :])
    if JOBS > 0:
        add_up_columns(partial_ptrs, sum_ptrs, partial_rows, partial_strides, widths, JOBS)


@triton.jit
def _visit_keys(
    dq, weight, q, dout, row_max, rest, delta, k_ptr, v_ptr, kv_strides, rows, flat, terms, limits, random, sparse,
    first, last, CHECK: tl.constexpr, TILED: tl.constexpr, WEIGHTS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Add the keys in ``[first, last)`` to dQ, and with WEIGHTS what dropout left of each row's weights to `weight`."""
    stride_kn, stride_kd, stride_vn, stride_vd = kv_strides
    seed, dropout_threshold, keep_scale = random
    list_ptr, map_ptr, stride_map, tiles_ptr = sparse
    len_k = limits[1]
    offs_n = tl.arange(0, S.BLOCK_N)
    offs_d = tl.arange(0, S.BLOCK_D)
    offs_dv = tl.arange(0, S.BLOCK_DV)
    k_at = tile(offs_n, stride_kn, offs_d, stride_kd, S)
    v_at = tile(offs_n, stride_vn, offs_dv, stride_vd, S)
    for position in range(first, last, S.BLOCK_N):
        start = position
        tile_ptr = tiles_ptr
        if S.SPARSE:
            start, tile_ptr = live_block(list_ptr, map_ptr, tiles_ptr, stride_map, position, TILED, S)
        columns = start + offs_n
        far = tl.cast(start, tl.int64)
        inside = columns < len_k
        k = load_tile(k_ptr + far * stride_kn + k_at, inside, offs_d, CHECK, S.HEAD_DIM, S.BLOCK_D)  # [BN, BD]
        products = tl.dot(q, tl.trans(k), input_precision=S.PRECISION)
        scores, damping = block_scores(
            products, rows[:, None], columns[None, :], tile_ptr, terms, limits, CHECK, TILED, S
        )  # [BM, BN]
        p = block_probabilities(scores, row_max[:, None], rest[:, None], terms[0], S)
        v = load_tile(v_ptr + far * stride_vn + v_at, inside, offs_dv, CHECK, S.VALUE_DIM, S.BLOCK_DV)  # [BN, BDV]
        dp = tl.dot(dout, tl.trans(v), input_precision=S.PRECISION)
        if S.DROPOUT:
            keep = dropout_keep(seed, flat, start, dropout_threshold, S.BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
            if WEIGHTS:
                weight += tl.sum(tl.where(keep, p * keep_scale, 0.0), 1)
        ds = p * (dp - delta[:, None])
        if S.SOFTCAP:
            ds *= damping
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=S.PRECISION)
    return dq, weight


@triton.jit(do_not_specialize=["len_q", "window"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dlse_ptr, statistics_ptr, delta_ptr, dq_ptr, partial_ptr,
    mask_ptr, relative_ptr, slopes_ptr, seed_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, list_ptr, tiles_ptr,
    strides_q, strides_k, strides_v, strides_out, strides_dout, strides_dq,
    strides_mask, strides_added, strides_map, strides_list,
    heads, rows_of, len_q, len_k, window, numbers, dropout_threshold,
    HAS_DLSE: tl.constexpr, BIAS_SUMS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program computes dQ = scale * dS K for BLOCK_M queries of one head, with dS as in the dK/dV kernel.
    # It reads its queries, O, dO and LSE once, and every key and value that they see once. The delta of its rows
    # (see `row_delta`), which the kernels after it need, it leaves in memory.
    # With BIAS_SUMS it also writes its share of the gradients of what was added to each query and to each value,
    # their projections' biases, as one row of `partial`: the sum of dQ, and since a value's bias reaches a row of the
    # output through all its weights, the sum of dO times the sum of P Z. (A key's bias has no gradient: it moves all
    # scores of a row alike.)
    nhead, group = heads
    stride_qb, stride_qh, stride_qm, stride_qd = strides_q
    stride_kb, stride_kh, stride_kn, stride_kd = strides_k
    stride_vb, stride_vh, stride_vn, stride_vd = strides_v
    stride_gb, stride_gh, stride_gm, stride_gd = strides_dout
    stride_dqb, stride_dqh, stride_dqm, stride_dqd = strides_dq

    blocks_m = tl.cdiv(len_q, S.BLOCK_M)
    row0 = tl.program_id(0) % blocks_m * S.BLOCK_M
    head = tl.program_id(0) // blocks_m
    b = (head // nhead).to(tl.int64)
    h = (head % nhead).to(tl.int64)
    own, first_q, first_k, limits = both_sequences(b, seqlens_q_ptr, seqlens_k_ptr, rows_of, len_q, len_k, window, S)
    terms = terms_of(b, h, mask_ptr, relative_ptr, slopes_ptr, strides_mask, strides_added, window, numbers, S)
    longest = len_q
    len_q = limits[0]
    seed = tl.load(seed_ptr) if S.DROPOUT else 0
    random = (seed, dropout_threshold, numbers[2])

    rows = row0 + tl.arange(0, S.BLOCK_M)
    flat = (own * nhead + h) * rows_of[0] + first_q + rows
    offs_d = tl.arange(0, S.BLOCK_D)
    offs_dv = tl.arange(0, S.BLOCK_DV)
    q_base = q_ptr + own * stride_qb + h * stride_qh + first_q * stride_qm
    dout_base = dout_ptr + own * stride_gb + h * stride_gh + first_q * stride_gm
    k_base = k_ptr + own * stride_kb + h // group * stride_kh + first_k * stride_kn
    v_base = v_ptr + own * stride_vb + h // group * stride_vh + first_k * stride_vn
    kv_strides = (stride_kn, stride_kd, stride_vn, stride_vd)

    inside = rows < len_q
    q = load_tile(q_base + tile(rows, stride_qm, offs_d, stride_qd, S), inside, offs_d, True, S.HEAD_DIM, S.BLOCK_D)
    dout_ptrs = dout_base + tile(rows, stride_gm, offs_dv, stride_gd, S)
    dout = load_tile(dout_ptrs, inside, offs_dv, True, S.VALUE_DIM, S.BLOCK_DV)
    row_max, rest = load_statistics(statistics_ptr, flat, inside, True, S)
    stored = rows < longest
    if S.SEQUENCES == "packed":
        stored = inside
    out_base = out_ptr + own * strides_out[0] + h * strides_out[1] + first_q * strides_out[2]
    out_ptrs = out_base + tile(rows, strides_out[2], offs_dv, strides_out[3], S)
    out = load_tile(out_ptrs, inside, offs_dv, True, S.VALUE_DIM, S.BLOCK_DV)
    delta = row_delta(out, dout, dlse_ptr, flat, inside, HAS_DLSE)
    tl.store(delta_ptr + flat, delta, mask=stored)
    dq = tl.full((S.BLOCK_M, S.BLOCK_D), 0.0, tl.float32)
    weight = tl.full((S.BLOCK_M,), 0.0, tl.float32)
    WEIGHTS: tl.constexpr = BIAS_SUMS and S.DROPOUT

    if S.SPARSE:
        list_ptr += b * strides_list[0] + h * strides_list[1] + row0 // S.SPARSE * strides_list[2]
        map_ptr += b * strides_map[0] + h * strides_map[1] + row0 // S.SPARSE * strides_map[2]
        sparse, full, live = live_blocks(list_ptr, map_ptr, strides_map[3], tiles_ptr, row0 < len_q, S)
        dq, weight = _visit_keys(
            dq, weight, q, dout, row_max, rest, delta, k_base, v_base, kv_strides, rows, flat, terms, limits, random,
            sparse, 0, full, True, False, WEIGHTS, S,
        )  # fmt: skip
        dq, weight = _visit_keys(
            dq, weight, q, dout, row_max, rest, delta, k_base, v_base, kv_strides, rows, flat, terms, limits, random,
            sparse, full, live, True, True, WEIGHTS, S,
        )  # fmt: skip
    else:
        sparse = (list_ptr, map_ptr, 0, tiles_ptr)
        low, plain_low, plain_high, high = visible_keys(row0, limits, S)
        if S.LEFT:
            dq, weight = _visit_keys(
                dq, weight, q, dout, row_max, rest, delta, k_base, v_base, kv_strides, rows, flat, terms, limits,
                random, sparse, low, tl.minimum(plain_low, high), True, False, WEIGHTS, S,
            )  # fmt: skip
        dq, weight = _visit_keys(
            dq, weight, q, dout, row_max, rest, delta, k_base, v_base, kv_strides, rows, flat, terms, limits, random,
            sparse, plain_low, plain_high, False, False, WEIGHTS, S,
        )  # fmt: skip
        dq, weight = _visit_keys(
            dq, weight, q, dout, row_max, rest, delta, k_base, v_base, kv_strides, rows, flat, terms, limits, random,
            sparse, plain_high, high, True, False, WEIGHTS, S,
        )  # fmt: skip

    if S.SEQUENCES == "lengths":  # queries past the end are nobody's, but their gradient is written
        dq = tl.where(inside[:, None], dq, 0.0)
    dq_base = dq_ptr + own * stride_dqb + h * stride_dqh + first_q * stride_dqm
    dq *= numbers[0]
    if BIAS_SUMS:
        if not S.DROPOUT:
            weight = tl.where(rest < float("inf"), 1.0, 0.0)
        row_ptr = partial_ptr + (b * blocks_m + tl.program_id(0) % blocks_m) * nhead * (S.HEAD_DIM + S.VALUE_DIM)
        own_rows = tl.where(inside[:, None], dq, 0.0)  # rows past the end are rubbish without a check
        tl.store(row_ptr + h * S.HEAD_DIM + offs_d, tl.sum(own_rows, 0), mask=offs_d < S.HEAD_DIM)
        row_ptr += nhead * S.HEAD_DIM
        values = tl.sum(weight[:, None] * dout.to(tl.float32), 0)
        tl.store(row_ptr + h * S.VALUE_DIM + offs_dv, values, mask=offs_dv < S.VALUE_DIM)
    dq = dq.to(dq_ptr.dtype.element_ty)
    dq_ptrs = dq_base + tile(rows, stride_dqm, offs_d, stride_dqd, S)
    tl.store(dq_ptrs, dq, mask=stored[:, None] & (offs_d < S.HEAD_DIM)[None, :])


_DELTA_ROWS = 16


def launch_delta(dout: Tensor, dlse: Tensor | None, out: Tensor, call: Call) -> Tensor:
    """``rowsum(O * dO) - dLSE`` of every row, ``[B, H, Lq]``; a packed batch is one row of tokens here."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    batch, nhead, rows, value_dim = out.shape
    delta_kernel[(triton.cdiv(rows, _DELTA_ROWS) * batch * nhead,)](
        out, dout, delta if dlse is None else dlse.contiguous(), delta, out.stride(), dout.stride(), nhead, rows,
        HAS_DLSE=dlse is not None, VALUE_DIM=value_dim, BLOCK_M=_DELTA_ROWS, BLOCK_DV=call.switches.BLOCK_DV,
        **gpu.COMPILE_OPTIONS,
    )  # fmt: skip
    return delta


def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, statistics: Tensor, inputs: Inputs, options: Options,
    needs: tuple[bool, bool, bool, bool], sums: ColumnSums | None = None, partial: Tensor | None = None,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Launch the backward kernels that are needed: gradients of query, of key and value, of the mask, of the relative
    bias, as `needs` says. dQ, dK and dV have the dtype and memory order of their inputs, or are written to `grads`.
    `statistics` is what the forward launcher returned last.

    What `sums` holds is summed on the side. With `partial` (see `bias_sums`) dQ's kernel adds to it.
    """
    needs_dquery, needs_dkv, needs_dmask, needs_drelative = needs
    call = describe(inputs, options)
    query, key, value, attn_mask, relative_bias, *_ = inputs
    nothing = query.numel() == 0 or key.numel() == 0 or value.numel() == 0 or call.sequences == 0
    if nothing:
        zeros = [torch.zeros_like(t) if t is not None else None for t in (query, key, value, attn_mask, relative_bias)]
        wanted = (needs_dquery, needs_dkv, needs_dkv, needs_dmask, needs_drelative)
        return tuple(grad if want else None for grad, want in zip(zeros, wanted, strict=True))
    if reaches_far(dout):
        dout = dout.contiguous()
    dquery = dkey = dvalue = dmask = drelative = None
    with gpu.on_device_of(query):
        if needs_dquery:
            dquery = empty_in_order_of(query, query.shape[3]) if grads is None else grads[0]
            delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
            config = DQ.choose(query, call.switches, options.max_len_q)
            blocks = triton.cdiv(options.max_len_q, config.block_m)
            attention_dq_kernel[(blocks * call.sequences * call.nhead,)](
                query, key, value, out, dout, delta if dlse is None else dlse.contiguous(), statistics, delta, dquery,
                delta if partial is None else partial, *call.pointers, inputs.block_map, inputs.blocks_of_query,
                inputs.tiles, *call.strides, out.stride(), dout.stride(), dquery.stride(), *call.strides_of_terms,
                call.strides_of_map, strides_of_list(inputs.blocks_of_query), *call.sizes,
                HAS_DLSE=dlse is not None, BIAS_SUMS=partial is not None,
                S=call.switches._replace(BLOCK_M=config.block_m, BLOCK_N=config.block_n),
                num_warps=config.num_warps, num_stages=config.num_stages, **gpu.COMPILE_OPTIONS,
            )  # fmt: skip
        else:
            delta = launch_delta(dout, dlse, out, call)
        if needs_dkv:
            dkey, dvalue = (
                (empty_in_order_of(key, key.shape[3]), empty_in_order_of(value, value.shape[3]))
                if grads is None
                else grads[1:]
            )
            jobs, count = _NO_SUMS if sums is None else sums.take()
            config = DKDV.choose(query, call.switches, options.max_len_q)
            blocks = triton.cdiv(options.max_len_k, config.block_n)
            attention_dkdv_kernel[(blocks * call.sequences * key.shape[1],)](
                query, key, value, dout, statistics, delta, dkey, dvalue, *call.pointers,
                inputs.block_map, inputs.blocks_of_key, inputs.tiles, *call.strides, dout.stride(), dkey.stride(),
                dvalue.stride(), *call.strides_of_terms, call.strides_of_map, strides_of_list(inputs.blocks_of_key),
                *call.sizes, *jobs, JOBS=count,
                S=call.switches._replace(BLOCK_M=config.block_m, BLOCK_N=config.block_n),
                num_warps=config.num_warps, num_stages=config.num_stages, **gpu.COMPILE_OPTIONS,
            )  # fmt: skip
        if needs_dmask or needs_drelative:
            from .planes import mask_gradient, relative_gradient

            if needs_dmask:
                dmask = mask_gradient(dout, statistics, delta, inputs, options)
            if needs_drelative:
                drelative = relative_gradient(dout, statistics, delta, inputs, options)
    return dquery, dkey, dvalue, dmask, drelative


_NO_SUMS = ColumnSums().take()


def bias_sums(inputs: Inputs, options: Options) -> Tensor:
    """What dQ's kernel writes its shares of the gradients of the query's and the value's bias to, float32
    ``[blocks of queries, H D + H Dv]``; their sum over the rows is the gradient of each element."""
    query, value = inputs.query, inputs.value
    config = DQ.choose(query, describe(inputs, options).switches, options.max_len_q)
    rows = triton.cdiv(options.max_len_q, config.block_m) * sequences(inputs, options)
    width = query.shape[1] * (query.shape[3] + value.shape[3])
    return torch.empty((rows, width), dtype=torch.float32, device=query.device)
