"""The scores of one block, as the forward and both backward kernels compute them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def block_scores(
    a, b, rows, columns, mask_ptr, stride_mm, stride_mn, scale_log2, len_q, len_k,
    CHECK: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_HAS_ROWS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """``a @ b`` scaled to base-2 logarithms, with -inf where the mask forbids.

    `rows` and `columns` are query and key positions, shaped to broadcast over the block, so the
    transposed block of the dK/dV kernel is the same function. Without CHECK the caller promises
    that the whole block is in bounds and, for a causal mask, below the diagonal.
    """
    scores = tl.dot(a, b, input_precision=INPUT_PRECISION) * scale_log2
    if CHECK:
        keep = columns < len_k
        if IS_CAUSAL:
            keep = keep & (columns <= rows)
        if MASK != "none":
            ptrs = mask_ptr + columns.to(tl.int64) * stride_mn
            inside = columns < len_k
            if MASK_HAS_ROWS:
                ptrs += rows.to(tl.int64) * stride_mm
                inside = inside & (rows < len_q)
            if MASK == "bool":
                keep = keep & (tl.load(ptrs, mask=inside, other=0) != 0)
            else:
                added = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
                # -inf forbids; a finite number, be it float32's lowest, must stay finite.
                keep = keep & (added != float("-inf"))
                scores += tl.maximum(added * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        scores = tl.where(keep, scores, float("-inf"))
    return scores


@triton.jit
def load_statistics(lse_ptr, flat, inside, MASK: tl.constexpr):
    """What the forward pass left of each row: (maximum, rest) of its base-2 log-sum-exp.

    A floating mask may add numbers so large to a whole row that their sum would swallow the rest, so there the
    two are kept apart; else the maximum is 0 and the rest everything. For a row with nothing to attend to, and
    past the end, the rest is +inf, which makes each probability exp2(-inf) = 0.
    """
    if MASK == "float":
        row_max = tl.load(lse_ptr + 2 * flat, mask=inside, other=0.0)
        rest = tl.load(lse_ptr + 2 * flat + 1, mask=inside, other=float("inf"))
    else:
        rest = tl.load(lse_ptr + flat, mask=inside, other=float("inf")) * LOG2E
        rest = tl.where(rest == float("-inf"), float("inf"), rest)
        row_max = tl.zeros_like(rest)
    return row_max, rest


@triton.jit
def block_probabilities(scores, row_max, rest, MASK: tl.constexpr):
    """``softmax`` of a block from what `load_statistics` gave, shaped to broadcast over it."""
    if MASK == "float":
        return tl.exp2((scores - row_max) - rest)
    else:
        return tl.exp2(scores - rest)
