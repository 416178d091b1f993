"""What needs a value for each pair of query and key: a mask's gradient, a relative bias's, the softmax weights.

The fast path keeps none of that; here it is computed again, block by block, and summed before it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common.blocks import dropout_keep
from .arguments import Inputs, Options
from .blocks import (
    block_probabilities,
    block_scores,
    both_sequences,
    load_row,
    load_statistics,
    load_tile,
    terms_of,
    tile,
)
from .configs import PLANES
from .launching import describe


@triton.jit
def _block(
    b, h, row0, rows, column0, columns, pointers, strides, sizes, window, numbers, random,
    WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """``Z P``, or the gradient of the scores, ``P (Z dO V^T - delta)``, of one block; 0 where nothing is seen."""
    (
        q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, delta_ptr,
        mask_ptr, relative_ptr, slopes_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, tiles_ptr,
    ) = pointers  # fmt: skip
    strides_q, strides_k, strides_v, strides_dout, strides_mask, strides_added, strides_map = strides
    heads, rows_of, longest_q, longest_k = sizes
    nhead, group = heads
    own, first_q, first_k, limits = both_sequences(
        b, seqlens_q_ptr, seqlens_k_ptr, rows_of, longest_q, longest_k, window, S
    )
    len_q, len_k, offset, left, right = limits
    # A block that is outside the sequence or the window, or dead in the block mask, costs nothing more.
    live = (row0 < len_q) & (column0 < len_k) & (column0 + S.BLOCK_N > 0)
    if S.LEFT:
        live = live & (column0 + S.BLOCK_N > row0 + offset - left)
    if S.RIGHT:
        live = live & (column0 < row0 + S.BLOCK_M + offset + right)
    if S.SPARSE:
        stride_pb, stride_ph, stride_pm, stride_pn = strides_map
        map_ptr += b * stride_pb + h * stride_ph
        if ALIGNED:
            if live:
                live = tl.load(map_ptr + row0 // S.SPARSE * stride_pm + column0 // S.SPARSE * stride_pn) > 0
    result = tl.full((S.BLOCK_M, S.BLOCK_N), 0.0, tl.float32)
    if live:
        stride_qb, stride_qh, stride_qm, stride_qd = strides_q
        stride_kb, stride_kh, stride_kn, stride_kd = strides_k
        offs_d = tl.arange(0, S.BLOCK_D)
        in_q = rows < len_q
        in_k = (columns >= 0) & (columns < len_k)
        q_base = q_ptr + own * stride_qb + h * stride_qh + first_q * stride_qm
        k_base = k_ptr + own * stride_kb + h // group * stride_kh + first_k * stride_kn
        q = load_tile(q_base + tile(rows, stride_qm, offs_d, stride_qd, S), in_q, offs_d, True, S.HEAD_DIM, S.BLOCK_D)
        k = load_tile(
            k_base + tile(columns, stride_kn, offs_d, stride_kd, S), in_k, offs_d, True, S.HEAD_DIM, S.BLOCK_D
        )
        terms = terms_of(b, h, mask_ptr, relative_ptr, slopes_ptr, strides_mask, strides_added, window, numbers, S)
        products = tl.dot(q, tl.trans(k), input_precision=S.PRECISION)
        scores, _ = block_scores(products, rows[:, None], columns[None, :], tiles_ptr, terms, limits, True, False, S)
        if S.SPARSE:
            inside = in_q[:, None] & in_k[None, :]
            at = (rows // S.SPARSE * stride_pm)[:, None] + (columns // S.SPARSE * stride_pn)[None, :]
            kinds = tl.load(map_ptr + at, mask=inside, other=0)
            in_tile = (rows % S.SPARSE)[:, None] * S.SPARSE + (columns % S.SPARSE)[None, :]
            at = (kinds - 2).to(tl.int64) * (S.SPARSE * S.SPARSE) + in_tile
            seen = (tl.load(tiles_ptr + at, mask=kinds > 1, other=0) != 0) | (kinds == 1)
            scores = tl.where(seen, scores, float("-inf"))
        flat = (own * nhead + h) * rows_of[0] + first_q + rows
        row_max, rest = load_statistics(statistics_ptr, flat, in_q, True, S)
        result = block_probabilities(scores, row_max[:, None], rest[:, None], terms[0], S)
        if WEIGHTS:
            if S.DROPOUT:
                seed, dropout_threshold = random
                keep = dropout_keep(seed, flat, column0, dropout_threshold, S.BLOCK_N)
                result = tl.where(keep, result * numbers[2], 0.0)
        else:
            stride_vb, stride_vh, stride_vn, stride_vd = strides_v
            stride_gb, stride_gh, stride_gm, stride_gd = strides_dout
            offs_dv = tl.arange(0, S.BLOCK_DV)
            v_base = v_ptr + own * stride_vb + h // group * stride_vh + first_k * stride_vn
            dout_base = dout_ptr + own * stride_gb + h * stride_gh + first_q * stride_gm
            v_ptrs = v_base + tile(columns, stride_vn, offs_dv, stride_vd, S)
            dout_ptrs = dout_base + tile(rows, stride_gm, offs_dv, stride_gd, S)
            v = load_tile(v_ptrs, in_k, offs_dv, True, S.VALUE_DIM, S.BLOCK_DV)
            dout = load_tile(dout_ptrs, in_q, offs_dv, True, S.VALUE_DIM, S.BLOCK_DV)
            dp = tl.dot(dout, tl.trans(v), input_precision=S.PRECISION)
            if S.DROPOUT:
                seed, dropout_threshold = random
                keep = dropout_keep(seed, flat, column0, dropout_threshold, S.BLOCK_N)
                dp = tl.where(keep, dp * numbers[2], 0.0)
            delta = load_row(delta_ptr, flat, in_q, 0.0, True)
            result = result * (dp - delta[:, None])
    return result


@triton.jit(do_not_specialize=["len_q", "window", "plane", "factor"])
def attention_plane_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, delta_ptr, out_ptr,
    mask_ptr, relative_ptr, slopes_ptr, seed_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, tiles_ptr,
    strides_q, strides_k, strides_v, strides_dout, strides_mask, strides_added, strides_map, strides_out,
    heads, rows_of, len_q, len_k, window, numbers, dropout_threshold, plane, factor,
    WEIGHTS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program computes one block of a tensor [batch, heads, Lq, Lk], any of whose dimensions may be 1, which stands
    # for a sum over it: the gradient of an additive mask (the scores' own gradient, summed over what the mask was
    # broadcast over), or the softmax weights. Each block is the work of one program, so the sums need no atomics.
    batch, out_batch, out_heads, first_row, row_count = plane
    stride_ob, stride_oh, stride_om, stride_on = strides_out
    all_m = tl.cdiv(row_count, S.BLOCK_M)
    all_n = tl.cdiv(len_k, S.BLOCK_N)
    pid = tl.program_id(0)
    if SUM_COLUMNS:
        out_n = 0
        sum_n = all_n
    else:
        out_n = pid % all_n
        pid = pid // all_n
        sum_n = 1
    if SUM_ROWS:
        out_m = 0
        sum_m = all_m
    else:
        out_m = pid % all_m
        pid = pid // all_m
        sum_m = 1
    out_h = pid % out_heads
    out_b = pid // out_heads
    sum_h = heads[0] // out_heads
    sum_b = batch // out_batch
    pointers = (
        q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, delta_ptr,
        mask_ptr, relative_ptr, slopes_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, tiles_ptr,
    )  # fmt: skip
    strides = (strides_q, strides_k, strides_v, strides_dout, strides_mask, strides_added, strides_map)
    sizes = (heads, rows_of, len_q, len_k)
    seed = tl.load(seed_ptr) if S.DROPOUT else 0
    offs_m = tl.arange(0, S.BLOCK_M)
    offs_n = tl.arange(0, S.BLOCK_N)
    total = tl.full((S.BLOCK_M, S.BLOCK_N), 0.0, tl.float32)
    for step in range(sum_b * sum_h * sum_m * sum_n):
        column0 = (out_n + step % sum_n) * S.BLOCK_N
        row0 = first_row + (out_m + step // sum_n % sum_m) * S.BLOCK_M
        h = (out_h + step // sum_n // sum_m % sum_h).to(tl.int64)
        b = (out_b + step // sum_n // sum_m // sum_h).to(tl.int64)
        total += _block(
            b, h, row0, row0 + offs_m, column0, column0 + offs_n, pointers, strides, sizes, window, numbers,
            (seed, dropout_threshold), WEIGHTS, True, S,
        )  # fmt: skip
    total *= factor
    out_ptr += out_b.to(tl.int64) * stride_ob + out_h.to(tl.int64) * stride_oh
    rows = out_m * S.BLOCK_M + offs_m
    columns = out_n * S.BLOCK_N + offs_n
    if SUM_ROWS and SUM_COLUMNS:
        tl.store(out_ptr, tl.sum(total).to(out_ptr.dtype.element_ty))
    elif SUM_ROWS:
        out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + columns.to(tl.int64) * stride_on, out, mask=columns < len_k)
    elif SUM_COLUMNS:
        out = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows.to(tl.int64) * stride_om, out, mask=rows < row_count)
    else:
        inside = (rows < row_count)[:, None] & (columns < len_k)[None, :]
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + columns.to(tl.int64)[None, :] * stride_on
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["len_q", "window", "sequences", "reach"])
def attention_diagonals_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, delta_ptr, out_ptr,
    mask_ptr, relative_ptr, slopes_ptr, seed_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, tiles_ptr,
    strides_q, strides_k, strides_v, strides_dout, strides_mask, strides_added, strides_map,
    heads, rows_of, len_q, len_k, window, numbers, dropout_threshold, sequences, reach,
    BLOCK_T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    # One program sums the gradient of one head's scores along BLOCK_T diagonals, that is over all pairs of query and
    # key at each of BLOCK_T distances from -reach on. For some queries it computes the block of keys that holds those
    # distances, in which the diagonals are rows shifted against each other, aligns them, and adds the rows up.
    chunks = tl.cdiv(2 * reach + 1, BLOCK_T)
    chunk = tl.program_id(0) % chunks
    h = (tl.program_id(0) // chunks).to(tl.int64)
    distance0 = chunk * BLOCK_T - reach
    pointers = (
        q_ptr, k_ptr, v_ptr, dout_ptr, statistics_ptr, delta_ptr,
        mask_ptr, relative_ptr, slopes_ptr, seqlens_q_ptr, seqlens_k_ptr, map_ptr, tiles_ptr,
    )  # fmt: skip
    strides = (strides_q, strides_k, strides_v, strides_dout, strides_mask, strides_added, strides_map)
    sizes = (heads, rows_of, len_q, len_k)
    seed = tl.load(seed_ptr) if S.DROPOUT else 0
    offs_m = tl.arange(0, S.BLOCK_M)
    offs_n = tl.arange(0, S.BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T)
    all_m = tl.cdiv(len_q, S.BLOCK_M)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for step in range(sequences * all_m):
        row0 = step % all_m * S.BLOCK_M
        b = (step // all_m).to(tl.int64)
        limits = both_sequences(b, seqlens_q_ptr, seqlens_k_ptr, rows_of, len_q, len_k, window, S)[3]
        start = row0 + distance0 + limits[2]
        column0 = start - (start & 7)  # dropout's random numbers come eight columns at a time
        block = _block(
            b, h, row0, row0 + offs_m, column0, column0 + offs_n, pointers, strides, sizes, window, numbers,
            (seed, dropout_threshold), False, False, S,
        )  # fmt: skip
        shifted = offs_m[:, None] + offs_t[None, :] + (start & 7)
        total += tl.sum(tl.gather(block, shifted, 1), 0)
    entry = chunk * BLOCK_T + offs_t
    tl.store(out_ptr + h * (2 * reach + 1) + entry, total, mask=entry < 2 * reach + 1)


def mask_gradient(dout: Tensor, statistics: Tensor, delta: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """The gradient of a floating mask, of its shape and dtype."""
    mask = inputs.attn_mask
    assert mask is not None
    rows, columns = mask.shape[2:]
    batch, nhead = mask.shape[:2]
    if rows == 1 or columns == 1:  # small: each sequence and head has its own, and they are summed afterwards
        batch, nhead = describe(inputs, options).sequences, inputs.query.shape[1]
    whole = (batch, nhead) == tuple(mask.shape[:2])
    shape = (batch, nhead, rows, columns)
    out = torch.empty(shape, dtype=mask.dtype if whole else torch.float32, device=mask.device)
    _launch_plane(dout, statistics, delta, out, inputs, options, 0, options.max_len_q, 1.0)
    return out if whole else out.sum_to_size(mask.shape).to(mask.dtype)


def softmax_weights(
    statistics: Tensor, inputs: Inputs, options: Options, first_row: int, row_count: int, average: bool
) -> Tensor:
    """The softmax weights of some queries, float32 ``[B, H or 1, rows, Lk]``, from the forward pass's statistics; after
    dropout if the call has any."""
    call = describe(inputs, options)
    heads = 1 if average else call.nhead
    shape = (call.sequences, heads, row_count, options.max_len_k)
    out = torch.empty(shape, dtype=torch.float32, device=inputs.query.device)
    factor = 1.0 / call.nhead if average else 1.0
    if out.numel():
        _launch_plane(None, statistics, None, out, inputs, options, first_row, row_count, factor)
    return out


def _launch_plane(
    dout: Tensor | None, statistics: Tensor, delta: Tensor | None, out: Tensor, inputs: Inputs, options: Options,
    first_row: int, row_count: int, factor: float,
) -> None:  # fmt: skip
    call = describe(inputs, options)
    config = PLANES.choose(inputs.query, call.switches, call.len_q)
    batch, nhead, rows, columns = out.shape
    sum_rows, sum_columns = rows == 1 and row_count > 1, columns == 1 and options.max_len_k > 1
    blocks_m = 1 if sum_rows else triton.cdiv(row_count, config.block_m)
    blocks_n = 1 if sum_columns else triton.cdiv(options.max_len_k, config.block_n)
    with gpu.on_device_of(inputs.query):
        attention_plane_kernel[(batch * nhead * blocks_m * blocks_n,)](
            inputs.query, inputs.key, inputs.value, dout, statistics, delta, out, *call.pointers,
            inputs.block_map, inputs.tiles, *call.strides, (0, 0, 0, 0) if dout is None else dout.stride(),
            *call.strides_of_terms, call.strides_of_map, out.stride(), *call.sizes,
            (call.sequences, batch, nhead, first_row, row_count), factor,
            WEIGHTS=dout is None, SUM_ROWS=sum_rows, SUM_COLUMNS=sum_columns,
            S=call.switches._replace(BLOCK_M=config.block_m, BLOCK_N=config.block_n),
            num_warps=config.num_warps, num_stages=config.num_stages, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip


_DIAGONALS = 32
"""Distances of a program; with 16 queries and up to 7 columns for alignment they fit into a block of 64 keys."""


def relative_gradient(dout: Tensor, statistics: Tensor, delta: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """The gradient of a relative bias, of its shape and dtype."""
    bias = inputs.relative_bias
    assert bias is not None
    call = describe(inputs, options)
    reach = max(options.max_len_q, options.max_len_k) - 1  # no distance is larger
    out = torch.empty((call.nhead, 2 * reach + 1), dtype=torch.float32, device=bias.device)
    with gpu.on_device_of(inputs.query):
        attention_diagonals_kernel[(call.nhead * triton.cdiv(2 * reach + 1, _DIAGONALS),)](
            inputs.query, inputs.key, inputs.value, dout, statistics, delta, out, *call.pointers,
            inputs.block_map, inputs.tiles, *call.strides, dout.stride(),
            *call.strides_of_terms, call.strides_of_map, *call.sizes, call.sequences, reach,
            BLOCK_T=_DIAGONALS, S=call.switches._replace(BLOCK_M=16, BLOCK_N=64),
            num_warps=4, num_stages=1, **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    table = bias.shape[1] // 2
    if table < reach:  # distances past the table's ends count for its ends
        past = reach - table
        kept = out[:, past : out.shape[1] - past].clone()
        kept[:, 0] += out[:, :past].sum(1)
        kept[:, -1] += out[:, out.shape[1] - past :].sum(1)
        out = kept
    elif table > reach:
        out = torch.nn.functional.pad(out, (table - reach, table - reach))
    return out.sum_to_size(bias.shape).to(bias.dtype)
