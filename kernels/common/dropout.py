"""Counter-based dropout: the same mask in every kernel, in the backward pass and on the eager path.

Element (row, column) of a tensor seen as ``[rows, columns]`` takes 16 bits of Philox4x32 at
counter ``(column // 8, row low, row high, 0)`` under a 64-bit key drawn from PyTorch's generator:
lane ``column % 8``, of which each of the four words has two, its lower half first. An element is
kept when its number reaches ``p * 2**16``; p is thus rounded to 1.5e-5 (flash-attention: 4e-3).

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds, the
fewest that pass BigCrush there; flash-attention uses seven too.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)[:, None, None]
_LOW_BITS, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_KEY_STEPS = np.arange(PHILOX_ROUNDS, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_CHUNK = 1 << 14  # groups of eight elements at a time: their state stays in the cache


_given = threading.local()


@contextlib.contextmanager
def given(keys: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the dropouts of this thread take these keys, in their order, instead of fresh ones."""
    _given.keys = list(keys)
    try:
        yield
    finally:
        del _given.keys


def new_seed(x: Tensor, count: int = 1) -> Tensor:
    """Fresh keys from PyTorch's generator: int64 ``[count]`` on the device of `x`, so that nothing waits for a GPU."""
    if not torch.compiler.is_compiling() and hasattr(_given, "keys"):
        return torch.cat([_given.keys.pop(0) for _ in range(count)])
    return torch.randint(2**62, (count,), dtype=torch.int64, device=x.device)


def threshold(dropout_p: float) -> int:
    """An element is dropped when its 16 random bits are below this."""
    return round(dropout_p * 2**16)


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 for p = 1, where everything is dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def drop_mask(seed: Tensor, shape: Sequence[int], dropout_p: float, first_rows: Sequence[int] | None = None) -> Tensor:
    """The elements that are dropped: bool, of `shape`, on the device of `seed`.

    Rows are all dimensions but the last, counted from 0; with `first_rows` they are those of the last dimension but
    one, counted from a number of its own for each index before. In NumPy, whose unsigned integers are exact here.
    """
    if seed.is_meta:
        return torch.empty(shape, dtype=torch.bool, device="meta")
    columns, limit = shape[-1], threshold(dropout_p)
    rows: np.ndarray = np.arange(math.prod(shape[:-1]), dtype=np.uint64)
    if first_rows is not None:
        rows = (np.array(first_rows, dtype=np.uint64)[:, None] + np.arange(shape[-2], dtype=np.uint64)).reshape(-1)
    dropped = np.ones((len(rows), columns), dtype=np.bool_)
    step = max(1, _CHUNK // max(1, columns // 8))
    for first in range(0, len(rows) if limit < 2**16 else 0, step):
        np.less(_random_bits(int(seed), rows[first : first + step], columns), limit, out=dropped[first : first + step])
    return torch.from_numpy(dropped.reshape(tuple(shape))).to(seed.device)


def _random_bits(key: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """16 bits for each element of some rows, uint16 ``[len(rows), columns]``."""
    groups = -(-columns // 8)
    even, odd = np.zeros((2, 2, len(rows), groups), dtype=np.uint64)  # words 0 and 2, words 1 and 3
    even[0], even[1], odd[0] = np.arange(groups), (rows >> _32)[:, None], (rows & _LOW_BITS)[:, None]
    keys = (np.array([key & 0xFFFFFFFF, key >> 32], dtype=np.uint64) + _KEY_STEPS) & _LOW_BITS
    for of_round in keys[:, :, None, None]:
        products = (even * _MULTIPLIERS)[::-1]
        even = (products >> _32) ^ odd ^ of_round
        odd = products & _LOW_BITS
    words = np.stack((even[0], odd[0], even[1], odd[1]), -1).astype("<u4")
    return words.view("<u2").reshape(len(rows), 8 * groups)[:, :columns]


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float, first_rows: Sequence[int] | None = None) -> Tensor:
    """`x` with dropout applied; differentiable.

    Args:
        x: any floating tensor.
        seed: the key, int64 ``[1]``; None for no dropout.
        dropout_p: probability.
        first_rows: as in `drop_mask`.
    """
    if seed is None:
        return x
    return x.masked_fill(drop_mask(seed, x.shape, dropout_p, first_rows), 0.0) * keep_scale(dropout_p)
