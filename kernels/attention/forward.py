"""Attention forward: the flash algorithm, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common.blocks import dropout_keep
from .arguments import Inputs, Options, output_dtype
from .blocks import (
    LN2,
    LOG2E,
    block_scores,
    both_sequences,
    live_block,
    live_blocks,
    load_tile,
    terms_of,
    tile,
    visible_keys,
)
from .configs import FORWARD
from .launching import describe, empty_in_order_of, strides_of_list


@triton.jit
def _visit_keys(
    acc, row_max, row_sum, q, k_ptr, v_ptr, kv_strides, rows, flat, terms, limits, random, sparse, first, last,
    CHECK: tl.constexpr, TILED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys in ``[first, last)``."""
    stride_kn, stride_kd, stride_vn, stride_vd = kv_strides
    seed, dropout_threshold, keep_scale = random
    list_ptr, map_ptr, stride_map, tiles_ptr = sparse
    len_k = limits[1]
    offs_n = tl.arange(0, S.BLOCK_N)
    offs_d = tl.arange(0, S.BLOCK_D)
    offs_dv = tl.arange(0, S.BLOCK_DV)
    k_at = tile(offs_n, stride_kn, offs_d, stride_kd, S)
    v_at = tile(offs_n, stride_vn, offs_dv, stride_vd, S)
    factor = terms[0] * LOG2E
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
        scores, _ = block_scores(
            products, rows[:, None], columns[None, :], tile_ptr, terms, limits, CHECK, TILED, S
        )  # [BM, BN]
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
            p = tl.where(dropout_keep(seed, flat, start, dropout_threshold, S.BLOCK_N), p * keep_scale, 0.0)
        v = load_tile(v_ptr + far * stride_vn + v_at, inside, offs_dv, CHECK, S.VALUE_DIM, S.BLOCK_DV)  # [BN, BDV]
        if S.FLOAT8:
            v = v.to(tl.float16)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=S.PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["len_q", "window"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, statistics_ptr,
    mask_ptr, relative_ptr, slopes_ptr, seed_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, list_ptr, tiles_ptr,
    scales_ptr, strides_q, strides_k, strides_v, strides_out, strides_mask, strides_added, strides_map, strides_list,
    heads, rows_of, len_q, len_k, window, numbers, dropout_threshold,
    RETURN_LSE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_M rows of softmax(scale * Q K^T + mask) V for one head. It reads its
    # queries once and every key and value they see once, and writes the output and the log-sum-exp of each
    # row; the scores never leave the chip. Online softmax: Dao et al., "FlashAttention" (2022), algorithm 1,
    # with the division by the row sum delayed to the end (FlashAttention-2, section 3.1).
    nhead, group = heads
    stride_qb, stride_qh, stride_qm, stride_qd = strides_q
    stride_kb, stride_kh, stride_kn, stride_kd = strides_k
    stride_vb, stride_vh, stride_vn, stride_vd = strides_v
    stride_ob, stride_oh, stride_om, stride_od = strides_out

    blocks_m = tl.cdiv(len_q, S.BLOCK_M)
    row0 = tl.program_id(0) % blocks_m * S.BLOCK_M
    head = tl.program_id(0) // blocks_m
    b = (head // nhead).to(tl.int64)
    h = (head % nhead).to(tl.int64)
    own, first_q, first_k, limits = both_sequences(b, seqlens_q_ptr, seqlens_k_ptr, rows_of, len_q, len_k, window, S)
    terms = terms_of(b, h, mask_ptr, relative_ptr, slopes_ptr, strides_mask, strides_added, window, numbers, S)
    value_scale = 1.0
    if S.FLOAT8:
        scale, cap, slope, relative, reach, mask, stride_mm, stride_mn = terms
        scale *= tl.load(scales_ptr + 2 * (b * nhead + h))
        terms = (scale, cap, slope, relative, reach, mask, stride_mm, stride_mn)
        value_scale = tl.load(scales_ptr + 2 * (b * nhead + h) + 1)
    longest = len_q
    len_q = limits[0]
    seed = tl.load(seed_ptr) if S.DROPOUT else 0
    random = (seed, dropout_threshold, numbers[2])

    rows = row0 + tl.arange(0, S.BLOCK_M)
    flat = (own * nhead + h) * rows_of[0] + first_q + rows
    offs_d = tl.arange(0, S.BLOCK_D)
    offs_dv = tl.arange(0, S.BLOCK_DV)
    q_base = q_ptr + own * stride_qb + h * stride_qh + first_q * stride_qm
    k_base = k_ptr + own * stride_kb + h // group * stride_kh + first_k * stride_kn
    v_base = v_ptr + own * stride_vb + h // group * stride_vh + first_k * stride_vn
    kv_strides = (stride_kn, stride_kd, stride_vn, stride_vd)

    q = load_tile(
        q_base + tile(rows, stride_qm, offs_d, stride_qd, S), rows < len_q, offs_d, True, S.HEAD_DIM, S.BLOCK_D
    )
    acc = tl.full((S.BLOCK_M, S.BLOCK_DV), 0.0, tl.float32)
    row_max = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.full((S.BLOCK_M,), 0.0, tl.float32)

    if S.SPARSE:
        # Live blocks, the full ones first; the others have a tile that says which of their elements are seen.
        list_ptr += b * strides_list[0] + h * strides_list[1] + row0 // S.SPARSE * strides_list[2]
        map_ptr += b * strides_map[0] + h * strides_map[1] + row0 // S.SPARSE * strides_map[2]
        sparse, full, live = live_blocks(list_ptr, map_ptr, strides_map[3], tiles_ptr, row0 < len_q, S)
        acc, row_max, row_sum = _visit_keys(
            acc, row_max, row_sum, q, k_base, v_base, kv_strides, rows, flat, terms, limits, random, sparse,
            0, full, True, False, S,
        )  # fmt: skip
        acc, row_max, row_sum = _visit_keys(
            acc, row_max, row_sum, q, k_base, v_base, kv_strides, rows, flat, terms, limits, random, sparse,
            full, live, True, True, S,
        )  # fmt: skip
    else:
        sparse = (list_ptr, map_ptr, 0, tiles_ptr)
        low, plain_low, plain_high, high = visible_keys(row0, limits, S)
        if S.LEFT:
            acc, row_max, row_sum = _visit_keys(
                acc, row_max, row_sum, q, k_base, v_base, kv_strides, rows, flat, terms, limits, random, sparse,
                low, tl.minimum(plain_low, high), True, False, S,
            )  # fmt: skip
        acc, row_max, row_sum = _visit_keys(
            acc, row_max, row_sum, q, k_base, v_base, kv_strides, rows, flat, terms, limits, random, sparse,
            plain_low, plain_high, False, False, S,
        )  # fmt: skip
        acc, row_max, row_sum = _visit_keys(
            acc, row_max, row_sum, q, k_base, v_base, kv_strides, rows, flat, terms, limits, random, sparse,
            plain_high, high, True, False, S,
        )  # fmt: skip

    empty = row_sum == 0.0  # no key seen: output 0, log-sum-exp -inf
    stored = rows < longest
    if S.SEQUENCES == "packed":
        stored = rows < len_q
    elif S.SEQUENCES == "lengths":
        empty = empty | (rows >= len_q)
    row_sum = tl.where(empty, 1.0, row_sum)
    out = tl.where(empty[:, None], 0.0, acc) / row_sum[:, None]
    if S.FLOAT8:
        out *= value_scale
    out_base = out_ptr + own * stride_ob + h * stride_oh + first_q * stride_om
    out_ptrs = out_base + tile(rows, stride_om, offs_dv, stride_od, S)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=stored[:, None] & (offs_dv < S.VALUE_DIM)[None, :])
    # For the backward pass, see load_statistics; and for the caller in natural logarithms.
    rest = tl.log2(row_sum)
    if S.ADDED:
        tl.store(statistics_ptr + 2 * flat, tl.where(empty, 0.0, row_max), mask=stored)
        tl.store(statistics_ptr + 2 * flat + 1, tl.where(empty, float("inf"), rest), mask=stored)
        lse = row_max + rest * LN2
    else:
        tl.store(statistics_ptr + flat, tl.where(empty, float("inf"), row_max + rest), mask=stored)
        lse = (row_max + rest) * LN2
    if RETURN_LSE:
        tl.store(lse_ptr + flat, tl.where(empty, float("-inf"), lse), mask=stored)


def attention_forward(inputs: Inputs, options: Options, return_lse: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the forward kernel: the output ``[B, H, Lq, Dv]``, the log-sum-exp ``[B, H, Lq]`` in float32 if asked for,
    and what the backward pass needs: the same to base 2, and in two parts ``[B, H, Lq, 2]`` if anything is added to the
    scores."""
    call = describe(inputs, options)
    query = inputs.query
    out = empty_in_order_of(query, inputs.value.shape[3], output_dtype(query))
    rows = query.shape[:3]
    parts = (2,) if call.switches.ADDED else ()
    statistics = torch.empty((*rows, *parts), dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, dtype=torch.float32, device=query.device) if return_lse else None
    if statistics.numel() == 0 or call.sequences == 0:
        return out, lse, statistics
    config = FORWARD.choose(query, call.switches, call.len_q)
    blocks = triton.cdiv(call.len_q, config.block_m)
    with gpu.on_device_of(query):
        attention_forward_kernel[(blocks * call.sequences * call.nhead,)](
            query, inputs.key, inputs.value, out, lse, statistics, *call.pointers, inputs.block_map,
            inputs.blocks_of_query, inputs.tiles, inputs.scales, *call.strides, out.stride(), *call.strides_of_terms,
            call.strides_of_map, strides_of_list(inputs.blocks_of_query), *call.sizes,
            RETURN_LSE=return_lse, S=call.switches._replace(BLOCK_M=config.block_m, BLOCK_N=config.block_n),
            num_warps=config.num_warps, num_stages=config.num_stages, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return out, lse, statistics
