"""Attention forward: the flash algorithm, and its launcher."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks, dropout, launch
from ..common.triton_blocks import dropout_keep, load_block
from .eager import MAX_HEAD_DIM
from .triton_blocks import LN2, LOG2E, block_scores


@triton.jit
def _visit_keys(
    acc, row_max, row_sum, q, k_ptrs, v_ptrs, mask_ptr, seed, rows, random_rows, offs_d, offs_dv, first, last,
    stride_kn, stride_vn, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
    CHECK: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_HAS_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks in ``[first, last)``; CHECK turns bounds and masks on."""
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        offset = tl.cast(start, tl.int64)
        k = load_block(
            k_ptrs + offset * stride_kn, (columns < len_k)[None, :], (offs_d < HEAD_DIM)[:, None],
            CHECK, HEAD_DIM != BLOCK_D,
        )  # [BD, BN]  # fmt: skip
        scores = block_scores(
            q, k, rows[:, None], columns[None, :], mask_ptr, stride_mm, stride_mn, scale_log2, len_q, len_k,
            CHECK, IS_CAUSAL, MASK, MASK_HAS_ROWS, INPUT_PRECISION,
        )  # [BM, BN]  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has met no allowed key yet has maximum -inf: subtracting 0 instead keeps exp2 at 0, not NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if CHECK else new_max
        p = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        if DROPOUT:  # the softmax's denominator counts the dropped keys too
            p = tl.where(dropout_keep(seed, random_rows, start, dropout_threshold, BLOCK_N), p * keep_scale, 0.0)
        v = load_block(
            v_ptrs + offset * stride_vn, (columns < len_k)[:, None], (offs_dv < VALUE_DIM)[None, :],
            CHECK, VALUE_DIM != BLOCK_DV,
        )  # [BN, BDV]  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["len_q"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, seed_ptr, out_ptr, lse_ptr, statistics_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_om, stride_od,
    nhead, len_q, len_k, softmax_scale, dropout_threshold, keep_scale,
    IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_HAS_ROWS: tl.constexpr, DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One program computes BLOCK_M rows of softmax(scale * Q K^T + mask) V for one head. It reads its
    # queries once and every key and value once, and writes the output and the log-sum-exp of each row;
    # the scores never leave the chip. Online softmax: Dao et al., "FlashAttention" (2022), algorithm 1,
    # with the division by the row sum delayed to the end (FlashAttention-2, section 3.1).
    blocks_m = tl.cdiv(len_q, BLOCK_M)
    pid_m = tl.program_id(0) % blocks_m
    head = tl.program_id(0) // blocks_m
    b = (head // nhead).to(tl.int64)
    h = (head % nhead).to(tl.int64)

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_ptrs = (
        q_ptr
        + b * stride_qb
        + h * stride_qh
        + rows.to(tl.int64)[:, None] * stride_qm
        + offs_d.to(tl.int64)[None, :] * stride_qd
    )
    k_ptrs = (
        k_ptr
        + b * stride_kb
        + h * stride_kh
        + offs_n.to(tl.int64)[None, :] * stride_kn
        + offs_d.to(tl.int64)[:, None] * stride_kd
    )
    v_ptrs = (
        v_ptr
        + b * stride_vb
        + h * stride_vh
        + offs_n.to(tl.int64)[:, None] * stride_vn
        + offs_dv.to(tl.int64)[None, :] * stride_vd
    )
    mask_ptr += b * stride_mb + h * stride_mh
    seed = tl.load(seed_ptr) if DROPOUT else 0
    random_rows = head.to(tl.int64) * len_q + rows

    q = load_block(q_ptrs, (rows < len_q)[:, None], (offs_d < HEAD_DIM)[None, :], True, HEAD_DIM != BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    scale_log2 = softmax_scale * LOG2E

    # Key blocks that need no check at all come first, then the diagonal and the ragged end. A mask checks them all.
    last = tl.minimum(len_k, (pid_m + 1) * BLOCK_M) if IS_CAUSAL else len_k
    plain = tl.minimum(len_k, pid_m * BLOCK_M) if IS_CAUSAL else len_k
    plain = plain // BLOCK_N * BLOCK_N
    if MASK == "none":
        acc, row_max, row_sum = _visit_keys(
            acc, row_max, row_sum, q, k_ptrs, v_ptrs, mask_ptr, seed, rows, random_rows, offs_d, offs_dv, 0, plain,
            stride_kn, stride_vn, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
            False, IS_CAUSAL, MASK, MASK_HAS_ROWS, DROPOUT, INPUT_PRECISION, HEAD_DIM, VALUE_DIM,
            BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    else:
        plain = 0
    acc, row_max, row_sum = _visit_keys(
        acc, row_max, row_sum, q, k_ptrs, v_ptrs, mask_ptr, seed, rows, random_rows, offs_d, offs_dv, plain, last,
        stride_kn, stride_vn, stride_mm, stride_mn, scale_log2, dropout_threshold, keep_scale, len_q, len_k,
        True, IS_CAUSAL, MASK, MASK_HAS_ROWS, DROPOUT, INPUT_PRECISION, HEAD_DIM, VALUE_DIM,
        BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    empty = row_sum == 0.0  # no key allowed: output 0, log-sum-exp -inf
    out = acc / tl.where(empty, 1.0, row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), row_max * LN2 + tl.log(tl.where(empty, 1.0, row_sum)))
    out_ptrs = (
        out_ptr
        + b * stride_ob
        + h * stride_oh
        + rows.to(tl.int64)[:, None] * stride_om
        + offs_dv.to(tl.int64)[None, :] * stride_od
    )
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(rows < len_q)[:, None] & (offs_dv < VALUE_DIM)[None, :])
    tl.store(lse_ptr + random_rows, lse, mask=rows < len_q)
    if MASK == "float":  # for the backward pass; see load_statistics
        rest = tl.where(empty, float("inf"), tl.log2(tl.where(empty, 1.0, row_sum)))
        tl.store(statistics_ptr + 2 * random_rows, tl.where(empty, 0.0, row_max), mask=rows < len_q)
        tl.store(statistics_ptr + 2 * random_rows + 1, rest, mask=rows < len_q)


class AttentionConfig(NamedTuple):
    """Block sizes and launch options of one attention kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By element size and padded head size. Each fits the shared memory of the smallest supported chips (99 KiB on
# sm_86, 64 KiB on gfx942) and keeps everything in registers on sm_80, sm_90 and gfx942;
# bench/machine_code/budget.csv holds the tables to that and shows the exceptions.
_FORWARD = {
    (2, 16): AttentionConfig(128, 64, 4, 3),
    (2, 32): AttentionConfig(128, 64, 4, 3),
    (2, 64): AttentionConfig(128, 64, 8, 2),
    (2, 128): AttentionConfig(128, 32, 8, 2),
    (2, 256): AttentionConfig(64, 32, 8, 1),
    (4, 16): AttentionConfig(64, 64, 4, 2),
    (4, 32): AttentionConfig(64, 32, 4, 2),
    (4, 64): AttentionConfig(64, 32, 8, 2),
    (4, 128): AttentionConfig(32, 32, 8, 1),
    (4, 256): AttentionConfig(16, 16, 4, 1),
}


class Call(NamedTuple):
    """What the forward and backward launchers derive from the arguments of one call."""

    batch: int
    nhead: int
    len_q: int
    len_k: int
    head_dim: int
    value_dim: int
    mask_strides: tuple[int, ...]
    switches: dict[str, object]
    dropout_threshold: int
    keep_scale: float

    @property
    def block_d(self) -> int:
        return max(16, launch.power_of_2(self.head_dim))

    @property
    def block_dv(self) -> int:
        return max(16, launch.power_of_2(self.value_dim))


def describe_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Call:
    """Sizes, mask strides (0 where the mask broadcasts) and compile-time switches of a call."""
    batch, nhead, len_q, head_dim = query.shape
    len_k, value_dim = key.shape[2], value.shape[3]
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    kind = "none"
    if attn_mask is not None:
        kind = "bool" if attn_mask.dtype == torch.bool else "float"
        mask_strides = attn_mask.expand(batch, nhead, len_q, len_k).stride()
    switches = {
        "IS_CAUSAL": is_causal,
        "MASK": kind,
        "MASK_HAS_ROWS": mask_strides[2] != 0,
        "DROPOUT": dropout_p > 0.0,
        "INPUT_PRECISION": launch.input_precision(query),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
    }
    return Call(
        batch, nhead, len_q, len_k, head_dim, value_dim, mask_strides, switches,
        dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
    )  # fmt: skip


def empty_in_order_of(like: Tensor, last: int) -> Tensor:
    """An uninitialised tensor shaped as `like` but for its last dimension, with dimensions in like's memory order."""
    order = sorted(range(3), key=lambda i: like.stride(i), reverse=True)
    shape = [like.shape[i] for i in order] + [last]
    back = [order.index(i) for i in range(3)] + [3]
    return torch.empty(shape, dtype=like.dtype, device=like.device).permute(back)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seed: Tensor | None,
    dropout_p: float, is_causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel: the output ``[B, H, Lq, Dv]``, the log-sum-exp ``[B, H, Lq]`` in float32, and what the
    backward pass needs of it: with a floating mask its two parts ``[B, H, Lq, 2]``, else the log-sum-exp itself."""
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > MAX_HEAD_DIM:
            checks.fail_value(name, f"a head size of at most {MAX_HEAD_DIM} on the kernels", tensor)
    call = describe_call(query, key, value, attn_mask, dropout_p, is_causal)
    out = empty_in_order_of(query, call.value_dim)
    lse = torch.empty((call.batch, call.nhead, call.len_q), dtype=torch.float32, device=query.device)
    statistics = lse
    if call.switches["MASK"] == "float":
        statistics = torch.empty((*lse.shape, 2), dtype=torch.float32, device=query.device)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse, statistics
    block_d, block_dv = call.block_d, call.block_dv
    config = _FORWARD[query.element_size(), max(block_d, block_dv)]
    grid = (triton.cdiv(call.len_q, config.block_m) * call.batch * call.nhead,)
    with launch.on_device_of(query):
        attention_forward_kernel[grid](
            query, key, value, query if attn_mask is None else attn_mask, lse if seed is None else seed, out, lse,
            statistics, *query.stride(), *key.stride(), *value.stride(), *call.mask_strides, *out.stride(),
            call.nhead, call.len_q, call.len_k, softmax_scale, call.dropout_threshold, call.keep_scale,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **call.switches, **launch.COMPILE_OPTIONS,
        )  # fmt: skip
    return out, lse, statistics
