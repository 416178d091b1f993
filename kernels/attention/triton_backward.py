"""Attention backward: dK and dV per key block, dQ per query block, and their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import launch
from ..common.triton_blocks import dropout_keep, load_block
from .triton_blocks import LOG2E, block_probabilities, block_scores, load_statistics
from .triton_forward import AttentionConfig, describe_call, empty_in_order_of


@triton.jit(do_not_specialize=["len_q"])
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_od, stride_gb, stride_gh, stride_gm, stride_gd,
    nhead, len_q,
    HAS_DLSE: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One program computes delta = rowsum(O * dO) - dLSE for BLOCK_M rows of one head. The softmax's
    # backward pass needs rowsum(P * dP), which is this (FlashAttention-2, algorithm 2, line 4); a
    # gradient of the log-sum-exp enters the scores as +P * dLSE, so it joins here with a minus sign.
    blocks_m = tl.cdiv(len_q, BLOCK_M)
    pid_m = tl.program_id(0) % blocks_m
    head = tl.program_id(0) // blocks_m
    b = (head // nhead).to(tl.int64)
    h = (head % nhead).to(tl.int64)
    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV)
    inside = (rows < len_q)[:, None] & (offs_dv < VALUE_DIM)[None, :]
    dims = offs_dv.to(tl.int64)[None, :]
    out_at = out_ptr + b * stride_ob + h * stride_oh + rows[:, None] * stride_om + dims * stride_od
    dout_at = dout_ptr + b * stride_gb + h * stride_gh + rows[:, None] * stride_gm + dims * stride_gd
    out = tl.load(out_at, mask=inside, other=0.0)
    dout = tl.load(dout_at, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    flat = head.to(tl.int64) * len_q + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + flat, mask=rows < len_q, other=0.0)
    tl.store(delta_ptr + flat, delta, mask=rows < len_q)


@triton.jit
def _visit_queries(
    dk, dv, k, v, q_ptrs, dout_ptrs, lse_ptr, delta_ptr, mask_ptr, seed, head, columns, first_column,
    offs_m, offs_d, offs_dv, first, last,
    stride_qm, stride_gm, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
    CHECK: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_HAS_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the query blocks in ``[first, last)`` to dK and dV; all blocks of scores are transposed, ``[BN, BM]``."""
    for start in range(first, last, BLOCK_M):
        rows = start + offs_m
        offset = tl.cast(start, tl.int64)
        flat = head.to(tl.int64) * len_q + rows
        inside = rows < len_q
        q = load_block(
            q_ptrs + offset * stride_qm, inside[:, None], (offs_d < HEAD_DIM)[None, :], CHECK, HEAD_DIM != BLOCK_D
        )  # [BM, BD]
        scores = block_scores(
            k, tl.trans(q), rows[None, :], columns[:, None], mask_ptr, stride_mm, stride_mn, scale_log2, len_q, len_k,
            CHECK, IS_CAUSAL, MASK, MASK_HAS_ROWS, INPUT_PRECISION,
        )  # [BN, BM]  # fmt: skip
        row_max, rest = load_statistics(lse_ptr, flat, inside, MASK)
        p = block_probabilities(scores, row_max[None, :], rest[None, :], MASK)
        dout = load_block(
            dout_ptrs + offset * stride_gm, inside[:, None], (offs_dv < VALUE_DIM)[None, :],
            CHECK, VALUE_DIM != BLOCK_DV,
        )  # [BM, BDV]  # fmt: skip
        dp = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        dropped = p
        if DROPOUT:
            keep = tl.trans(dropout_keep(seed, flat, first_column, dropout_threshold, BLOCK_N))
            dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
        delta = tl.load(delta_ptr + flat, mask=inside, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["len_q"])
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    nhead, len_q, len_k, softmax_scale, dropout_threshold, keep_scale,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_HAS_ROWS: tl.constexpr, DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One program computes dK and dV for BLOCK_N keys of one head: it reads its keys and values once and
    # walks over the queries, recomputing P from the log-sum-exp. With Z the dropout factor (0 or 1 / (1 - p)):
    #   dV = (P Z)^T dO      dS = P (Z dO V^T - delta)      dK = scale * dS^T Q
    # (FlashAttention-2, algorithm 2; FlashAttention, appendix B.2 for dropout). No two programs share an
    # output, so the sums need no atomics and two runs give the same bits.
    blocks_n = tl.cdiv(len_k, BLOCK_N)
    pid_n = tl.program_id(0) % blocks_n
    head = tl.program_id(0) // blocks_n
    b = (head // nhead).to(tl.int64)
    h = (head % nhead).to(tl.int64)

    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n64 = columns.to(tl.int64)[:, None]
    offs_m = tl.arange(0, BLOCK_M)
    m64 = offs_m.to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + m64 * stride_qm + offs_d.to(tl.int64)[None, :] * stride_qd
    dout_ptrs = dout_ptr + b * stride_gb + h * stride_gh + m64 * stride_gm + offs_dv.to(tl.int64)[None, :] * stride_gd
    mask_ptr += b * stride_mb + h * stride_mh
    seed = tl.load(seed_ptr) if DROPOUT else 0

    inside = (columns < len_k)[:, None]
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + n64 * stride_kn + offs_d.to(tl.int64)[None, :] * stride_kd
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + n64 * stride_vn + offs_dv.to(tl.int64)[None, :] * stride_vd
    k = load_block(k_ptrs, inside, (offs_d < HEAD_DIM)[None, :], True, HEAD_DIM != BLOCK_D)
    v = load_block(v_ptrs, inside, (offs_dv < VALUE_DIM)[None, :], True, VALUE_DIM != BLOCK_DV)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    scale_log2 = softmax_scale * LOG2E

    # Under a causal mask only queries from the diagonal on see these keys; the blocks on the diagonal
    # are checked, then come those that need no check, then the ragged end. A mask checks them all.
    # A block of keys past the end computes rubbish that is not stored, so it needs no check for that.
    first = 0
    checked = 0
    if IS_CAUSAL:
        first = pid_n * BLOCK_N // BLOCK_M * BLOCK_M
        checked = tl.minimum(tl.cdiv((pid_n + 1) * BLOCK_N, BLOCK_M) * BLOCK_M, tl.cdiv(len_q, BLOCK_M) * BLOCK_M)
    whole = tl.maximum(len_q // BLOCK_M * BLOCK_M, checked)
    if MASK != "none":
        checked = tl.cdiv(len_q, BLOCK_M) * BLOCK_M
        whole = checked
    if IS_CAUSAL or MASK != "none":
        dk, dv = _visit_queries(
            dk, dv, k, v, q_ptrs, dout_ptrs, lse_ptr, delta_ptr, mask_ptr, seed, head, columns, pid_n * BLOCK_N,
            offs_m, offs_d, offs_dv, first, checked,
            stride_qm, stride_gm, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
            True, IS_CAUSAL, MASK, MASK_HAS_ROWS, DROPOUT, INPUT_PRECISION, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if MASK == "none":
        dk, dv = _visit_queries(
            dk, dv, k, v, q_ptrs, dout_ptrs, lse_ptr, delta_ptr, mask_ptr, seed, head, columns, pid_n * BLOCK_N,
            offs_m, offs_d, offs_dv, checked, whole,
            stride_qm, stride_gm, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
            False, IS_CAUSAL, MASK, MASK_HAS_ROWS, DROPOUT, INPUT_PRECISION, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        dk, dv = _visit_queries(
            dk, dv, k, v, q_ptrs, dout_ptrs, lse_ptr, delta_ptr, mask_ptr, seed, head, columns, pid_n * BLOCK_N,
            offs_m, offs_d, offs_dv, whole, len_q,
            stride_qm, stride_gm, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
            True, IS_CAUSAL, MASK, MASK_HAS_ROWS, DROPOUT, INPUT_PRECISION, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    dk_ptrs = dk_ptr + b * stride_dkb + h * stride_dkh + n64 * stride_dkn + offs_d.to(tl.int64)[None, :] * stride_dkd
    dv_ptrs = dv_ptr + b * stride_dvb + h * stride_dvh + n64 * stride_dvn + offs_dv.to(tl.int64)[None, :] * stride_dvd
    dk = (dk * softmax_scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptrs, dk, mask=inside & (offs_d < HEAD_DIM)[None, :])
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=inside & (offs_dv < VALUE_DIM)[None, :])


@triton.jit
def _visit_keys(
    dq, q, dout, row_max, rest, delta, k_ptrs, v_ptrs, mask_ptr, seed, rows, flat, offs_n, offs_d, offs_dv, first, last,
    stride_kn, stride_vn, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
    CHECK: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_HAS_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add the key blocks in ``[first, last)`` to dQ."""
    for start in range(first, last, BLOCK_N):
        columns = start + offs_n
        offset = tl.cast(start, tl.int64)
        inside = (columns < len_k)[:, None]
        k = load_block(
            k_ptrs + offset * stride_kn, inside, (offs_d < HEAD_DIM)[None, :], CHECK, HEAD_DIM != BLOCK_D
        )  # [BN, BD]
        scores = block_scores(
            q, tl.trans(k), rows[:, None], columns[None, :], mask_ptr, stride_mm, stride_mn, scale_log2, len_q, len_k,
            CHECK, IS_CAUSAL, MASK, MASK_HAS_ROWS, INPUT_PRECISION,
        )  # [BM, BN]  # fmt: skip
        p = block_probabilities(scores, row_max[:, None], rest[:, None], MASK)
        v = load_block(
            v_ptrs + offset * stride_vn, inside, (offs_dv < VALUE_DIM)[None, :], CHECK, VALUE_DIM != BLOCK_DV
        )  # [BN, BDV]
        dp = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
        if DROPOUT:
            dp = tl.where(dropout_keep(seed, flat, start, dropout_threshold, BLOCK_N), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
    return dq


@triton.jit(do_not_specialize=["len_q"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_dqb, stride_dqh, stride_dqm, stride_dqd,
    nhead, len_q, len_k, softmax_scale, dropout_threshold, keep_scale,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_HAS_ROWS: tl.constexpr, DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One program computes dQ = scale * dS K for BLOCK_M queries of one head, with dS as in the dK/dV kernel.
    # It reads its queries, dO, LSE and delta once, and every key and value once.
    blocks_m = tl.cdiv(len_q, BLOCK_M)
    pid_m = tl.program_id(0) % blocks_m
    head = tl.program_id(0) // blocks_m
    b = (head // nhead).to(tl.int64)
    h = (head % nhead).to(tl.int64)

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m64 = rows.to(tl.int64)[:, None]
    offs_n = tl.arange(0, BLOCK_N)
    n64 = offs_n.to(tl.int64)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + n64 * stride_kn + offs_d.to(tl.int64)[None, :] * stride_kd
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + n64 * stride_vn + offs_dv.to(tl.int64)[None, :] * stride_vd
    mask_ptr += b * stride_mb + h * stride_mh
    seed = tl.load(seed_ptr) if DROPOUT else 0

    inside = (rows < len_q)[:, None]
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + m64 * stride_qm + offs_d.to(tl.int64)[None, :] * stride_qd
    dout_ptrs = dout_ptr + b * stride_gb + h * stride_gh + m64 * stride_gm + offs_dv.to(tl.int64)[None, :] * stride_gd
    q = load_block(q_ptrs, inside, (offs_d < HEAD_DIM)[None, :], True, HEAD_DIM != BLOCK_D)
    dout = load_block(dout_ptrs, inside, (offs_dv < VALUE_DIM)[None, :], True, VALUE_DIM != BLOCK_DV)
    flat = head.to(tl.int64) * len_q + rows
    row_max, rest = load_statistics(lse_ptr, flat, rows < len_q, MASK)
    delta = tl.load(delta_ptr + flat, mask=rows < len_q, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale_log2 = softmax_scale * LOG2E

    last = tl.minimum(len_k, (pid_m + 1) * BLOCK_M) if IS_CAUSAL else len_k
    plain = tl.minimum(len_k, pid_m * BLOCK_M) if IS_CAUSAL else len_k
    plain = plain // BLOCK_N * BLOCK_N
    if MASK == "none":
        dq = _visit_keys(
            dq, q, dout, row_max, rest, delta, k_ptrs, v_ptrs, mask_ptr, seed, rows, flat, offs_n, offs_d, offs_dv,
            0, plain,
            stride_kn, stride_vn, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
            False, IS_CAUSAL, MASK, MASK_HAS_ROWS, DROPOUT, INPUT_PRECISION, HEAD_DIM, VALUE_DIM,
            BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    else:
        plain = 0
    dq = _visit_keys(
        dq, q, dout, row_max, rest, delta, k_ptrs, v_ptrs, mask_ptr, seed, rows, flat, offs_n, offs_d, offs_dv,
        plain, last,
        stride_kn, stride_vn, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
        True, IS_CAUSAL, MASK, MASK_HAS_ROWS, DROPOUT, INPUT_PRECISION, HEAD_DIM, VALUE_DIM,
        BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    dq_ptrs = dq_ptr + b * stride_dqb + h * stride_dqh + m64 * stride_dqm + offs_d.to(tl.int64)[None, :] * stride_dqd
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptrs, dq, mask=inside & (offs_d < HEAD_DIM)[None, :])


# By element size and padded head size, as in the forward table.
_DKDV = {
    (2, 16): AttentionConfig(32, 128, 4, 2),
    (2, 32): AttentionConfig(32, 128, 4, 2),
    (2, 64): AttentionConfig(32, 64, 4, 2),
    (2, 128): AttentionConfig(32, 64, 4, 1),
    (2, 256): AttentionConfig(16, 32, 8, 1),
    (4, 16): AttentionConfig(32, 64, 4, 1),
    (4, 32): AttentionConfig(32, 64, 8, 1),
    (4, 64): AttentionConfig(32, 32, 8, 1),
    (4, 128): AttentionConfig(16, 32, 8, 1),
    (4, 256): AttentionConfig(16, 16, 8, 1),
}
_DQ = {
    (2, 16): AttentionConfig(128, 64, 4, 2),
    (2, 32): AttentionConfig(128, 32, 4, 2),
    (2, 64): AttentionConfig(128, 32, 4, 2),
    (2, 128): AttentionConfig(64, 32, 4, 1),
    (2, 256): AttentionConfig(32, 16, 4, 1),
    (4, 16): AttentionConfig(64, 32, 4, 1),
    (4, 32): AttentionConfig(64, 32, 4, 1),
    (4, 64): AttentionConfig(32, 32, 8, 1),
    (4, 128): AttentionConfig(32, 16, 8, 1),
    (4, 256): AttentionConfig(16, 16, 8, 1),
}
_DELTA_ROWS = 16


def attention_backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    seed: Tensor | None, out: Tensor, statistics: Tensor, dropout_p: float, is_causal: bool, softmax_scale: float,
    needs_dquery: bool = True, needs_dkv: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Launch the three backward kernels, but for what is not needed: dQ, dK and dV in the dtype and memory order of
    their inputs. `statistics` is what the forward launcher returned last."""
    call = describe_call(query, key, value, attn_mask, dropout_p, is_causal)
    dquery = empty_in_order_of(query, call.head_dim)
    dkey = empty_in_order_of(key, call.head_dim)
    dvalue = empty_in_order_of(value, call.value_dim)
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return dquery.zero_(), dkey.zero_(), dvalue.zero_()
    block_d, block_dv = call.block_d, call.block_dv
    heads = call.batch * call.nhead
    delta = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    table_key = (query.element_size(), max(block_d, block_dv))
    mask = query if attn_mask is None else attn_mask
    seed = delta if seed is None else seed
    inputs = (*query.stride(), *key.stride(), *value.stride(), *call.mask_strides, *dout.stride())
    sizes = (call.nhead, call.len_q, call.len_k, softmax_scale, call.dropout_threshold, call.keep_scale)
    with launch.on_device_of(query):
        delta_kernel[(triton.cdiv(call.len_q, _DELTA_ROWS) * heads,)](
            out, dout, delta if dlse is None else dlse.contiguous(), delta, *out.stride(), *dout.stride(),
            call.nhead, call.len_q,
            HAS_DLSE=dlse is not None, VALUE_DIM=call.value_dim, BLOCK_M=_DELTA_ROWS, BLOCK_DV=block_dv,
            **launch.COMPILE_OPTIONS,
        )  # fmt: skip
        if needs_dkv:
            config = _DKDV[table_key]
            attention_dkdv_kernel[(triton.cdiv(call.len_k, config.block_n) * heads,)](
                query, key, value, mask, seed, dout, statistics, delta, dkey, dvalue,
                *inputs, *dkey.stride(), *dvalue.stride(), *sizes,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
                num_warps=config.num_warps, num_stages=config.num_stages,
                **call.switches, **launch.COMPILE_OPTIONS,
            )  # fmt: skip
        if needs_dquery:
            config = _DQ[table_key]
            attention_dq_kernel[(triton.cdiv(call.len_q, config.block_m) * heads,)](
                query, key, value, mask, seed, dout, statistics, delta, dquery, *inputs, *dquery.stride(), *sizes,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
                num_warps=config.num_warps, num_stages=config.num_stages,
                **call.switches, **launch.COMPILE_OPTIONS,
            )  # fmt: skip
    return (dquery if needs_dquery else None, *((dkey, dvalue) if needs_dkv else (None, None)))
