"""Triton helpers that more than one kernel family uses."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import PHILOX_ROUNDS

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def dropout_keep(seed, rows, first_column, threshold, BLOCK: tl.constexpr):
    """Which elements of the block ``[len(rows), BLOCK]`` at column `first_column` (a multiple of 8) dropout keeps.

    One Philox call serves eight neighbouring columns; see ``common/dropout.py`` for the scheme.
    """
    group = first_column // 8 + tl.arange(0, BLOCK // 8)
    rows = rows.to(tl.int64)
    c0 = tl.broadcast_to(group[None, :].to(tl.uint32), (rows.shape[0], BLOCK // 8))  # [BM, BLOCK / 8]
    c1 = tl.broadcast_to((rows & 0xFFFFFFFF).to(tl.uint32)[:, None], (rows.shape[0], BLOCK // 8))
    c2 = tl.broadcast_to((rows >> 32).to(tl.uint32)[:, None], (rows.shape[0], BLOCK // 8))
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c0 * 0, _ROUNDS)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # r0 r1 r2 r3
    bits = tl.join(words & 0xFFFF, words >> 16).reshape(rows.shape[0], BLOCK)
    return bits.to(tl.int32) >= threshold


@triton.jit
def load_block(ptrs, row_ok, column_ok, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """Load a block, zero outside; a check that is off costs nothing."""
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(ptrs, mask=row_ok & column_ok, other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=row_ok, other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(ptrs, mask=column_ok, other=0.0)
    else:
        return tl.load(ptrs)
