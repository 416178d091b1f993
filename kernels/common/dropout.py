"""Counter-based dropout: the same mask in every kernel, in the backward pass and on the eager path.

Element (row, column) of a tensor seen as ``[rows, columns]`` takes 16 bits of Philox4x32 at
counter ``(column // 8, row low, row high, 0)`` under a 64-bit key drawn from PyTorch's generator:
lane ``column % 8``, of which each of the four words has two, its lower half first. An element is
kept when its number reaches ``p * 2**16``; p is thus rounded to 1.5e-5 (flash-attention: 4e-3).

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds, the
fewest that pass BigCrush there; flash-attention uses seven too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64).reshape(2, 1)
_LOW = 0xFFFFFFFF
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64) * np.arange(PHILOX_ROUNDS, dtype=np.uint64)
_CHUNK = 1 << 14  # groups at a time: their state stays in the cache


def new_seed(x: Tensor, count: int = 1) -> Tensor:
    """Fresh keys from PyTorch's generator: int64 ``[count]`` on the device of `x`, so that nothing waits for a GPU."""
    return torch.randint(2**62, (count,), dtype=torch.int64, device=x.device)


def threshold(dropout_p: float) -> int:
    """An element is dropped when its 16 random bits are below this."""
    return round(dropout_p * 2**16)


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 for p = 1, where everything is dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def drop_mask(seed: Tensor, shape: torch.Size, dropout_p: float, first_rows: Sequence[int] | None = None) -> Tensor:
    """The elements that are dropped: bool, of `shape`, on the device of `seed`.

    Rows are all dimensions but the last, counted from 0; with `first_rows` they are those of the last dimension but
    one, counted from a number of its own for each index before.

    In NumPy, whose unsigned integers are exact here and whose calls are several times cheaper than torch's.
    """
    if seed.is_meta:
        return torch.empty(shape, dtype=torch.bool, device="meta")
    columns = shape[-1]
    rows = shape.numel() // columns if columns else 0
    groups = (columns + 7) // 8
    dropped = np.empty((rows, groups, 8), dtype=np.bool_)
    key = int(seed.item())
    of_each = rows if first_rows is None else shape[-2]
    for part, first in enumerate([0] if first_rows is None else first_rows):
        _drop_rows(dropped[part * of_each : (part + 1) * of_each], first, key, threshold(dropout_p))
    mask = torch.from_numpy(dropped.reshape(rows, 8 * groups)[:, :columns].reshape(shape))
    return mask.to(seed.device)


def _drop_rows(dropped: np.ndarray, first: int, key: int, limit: int) -> None:
    """Fill `dropped`, whose rows are numbered from `first`, some at a time."""
    rows, groups, _ = dropped.shape
    step = 1 << max(0, (_CHUNK // max(groups, 1)).bit_length() - 1)
    start = 0
    while start < rows:
        row = first + start
        count = min(step, rows - start, (1 << 32) - row % (1 << 32))  # no chunk crosses row 2**32
        _draw(dropped[start : start + count], row, key, limit)
        start += count


def _draw(out: np.ndarray, first_row: int, key: int, limit: int) -> None:
    rows, groups, _ = out.shape
    n = rows * groups  # everything in one dimension: NumPy's calls are cheapest so
    keys = (_KEY_STEPS + np.array([[key & _LOW], [key >> 32]], dtype=np.uint64)).astype(np.uint32)[..., None]
    even = np.empty((2, n), dtype=np.uint32)  # words 0 and 2 of the counter
    product = np.empty((2, 2, n), dtype=np.uint64)  # of this round and of the one before
    # Word 2's product feeds word 0 and the other way round, so the words are read backwards.
    halves = product.view(np.uint32).reshape(2, 2, n, 2)[:, ::-1]
    low, high = (halves[..., 0], halves[..., 1]) if sys.byteorder == "little" else (halves[..., 1], halves[..., 0])
    product[0, 0].reshape(rows, groups)[...] = np.arange(groups, dtype=np.uint64) * _MULTIPLIERS[0]
    product[0, 1] = (first_row >> 32) * int(_MULTIPLIERS[1, 0])
    first_low = first_row & _LOW
    even[0].reshape(rows, groups)[...] = np.arange(first_low, first_low + rows)[:, None]
    even[1] = 0
    even ^= high[0]
    even ^= keys[:, 0]
    for i in range(1, PHILOX_ROUNDS):
        now, before = i % 2, (i - 1) % 2
        np.multiply(even, _MULTIPLIERS, out=product[now])
        np.bitwise_xor(high[now], low[before], out=even)
        even ^= keys[:, i]
    odd = low[(PHILOX_ROUNDS - 1) % 2]  # words 1 and 3
    words = np.empty((n, 4), dtype="<u4")
    words[:, 0::2], words[:, 1::2] = even.T, odd.T
    if limit < 2**16:
        np.less(words.view("<u2"), np.uint16(limit), out=out.reshape(n, 8))
    else:
        out[...] = True


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float, first_rows: Sequence[int] | None = None) -> Tensor:
    """`x` with dropout applied under `seed`; differentiable. `seed` None means no dropout; rows as in `drop_mask`."""
    if seed is None:
        return x
    mask = drop_mask(seed, x.shape, dropout_p, first_rows)
    return (x * keep_scale(dropout_p)).masked_fill(mask, 0.0)
