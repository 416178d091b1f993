"""The scores of one block, as the forward and both backward kernels compute them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
                scores += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E
        scores = tl.where(keep, scores, float("-inf"))
    return scores
