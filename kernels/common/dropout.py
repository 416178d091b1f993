"""Counter-based dropout: the same mask in every kernel, in the backward pass and on the eager path.

Element (row, column) of a tensor seen as ``[rows, columns]`` takes 16 bits of Philox4x32 at
counter ``(column // 8, row low, row high, 0)`` under a 64-bit key drawn from PyTorch's generator:
lane ``column % 8``, of which each of the four words has two, its lower half first. An element is
kept when its number reaches ``p * 2**16``; p is thus rounded to 1.5e-5 (flash-attention: 4e-3).

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds, the
fewest that pass BigCrush there; flash-attention uses seven too.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64) * np.arange(PHILOX_ROUNDS, dtype=np.uint64)[:, None]
_LOW_BITS = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)  # the halves of a 64-bit number in memory
_CHUNK = 1 << 14  # groups at a time: their state stays in the cache
FEW = 1 << 13
"""So many elements are drawn for all sites at once, and their counters are kept for the next call."""


class Site(NamedTuple):
    """One dropout: the tensor's shape, the probability, and where rows are counted from (see `factors`)."""

    shape: tuple[int, ...]
    dropout_p: float
    first_rows: tuple[int, ...] | None = None


class _Plan(NamedTuple):
    """What the keys do not change in a draw for some sites."""

    groups: list[int]
    """Groups of eight elements that each row of a site takes."""
    counts: list[int]
    """Groups of each site."""
    ps: list[float]
    counters: _Counters | None
    """Of all sites, where they are small."""


class _Counters(NamedTuple):
    """What a draw of n groups needs besides keys, ``[2, n]`` each: of the four words numbers 0 and 2 (even) and 1 and 3
    (odd) after the first round, but for its key, and the multipliers of words 0 and 2."""

    even: np.ndarray
    odd: np.ndarray
    multipliers: np.ndarray


def new_seed(x: Tensor, count: int = 1) -> Tensor:
    """Fresh keys from PyTorch's generator: int64 ``[count]`` on the device of `x`, so that nothing waits for a GPU."""
    return torch.randint(2**62, (count,), dtype=torch.int64, device=x.device)


def threshold(dropout_p: float) -> int:
    """An element is dropped when its 16 random bits are below this."""
    return round(dropout_p * 2**16)


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 for p = 1, where everything is dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def drop_mask(
    seed: Tensor, shape: tuple[int, ...], dropout_p: float, first_rows: Sequence[int] | None = None
) -> Tensor:
    """The elements that are dropped: bool, of `shape`, on the device of `seed`. Rows as in `factors`."""
    site = Site(shape, dropout_p, None if first_rows is None else tuple(first_rows))
    return factors(seed, (site,))[0] == 0.0


def factors(seeds: Tensor, sites: tuple[Site, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What the elements at each site are multiplied by, each site under a key of its own: 0 or `keep_scale`.

    Rows are all dimensions but the last, counted from 0; with `first_rows` they are those of the last dimension but
    one, counted from a number of its own for each index before.

    In NumPy, whose unsigned integers are exact here and whose calls are several times cheaper than torch's. Where all
    sites are small, one draw serves them, which costs little more than that of one.

    Args:
        seeds: int64 ``[sites]``.
        sites: what to draw for.
        dtype: float32 or float64.

    Returns:
        For each site a tensor of its shape, on the device of `seeds`.
    """
    if seeds.is_meta:
        return [torch.empty(site.shape, dtype=dtype, device="meta") for site in sites]
    plan = _plan(sites)
    keys = np.array(seeds.tolist(), dtype=np.int64).view(np.uint32).reshape(-1, 2)
    keys = keys if _LOW == 0 else keys[:, ::-1]
    drawn = np.empty((sum(plan.counts), 8), dtype=np.float32 if dtype is torch.float32 else np.float64)
    if plan.counters is not None:
        _draw(drawn, plan.counters, keys, plan.counts, plan.ps)
    end, found = 0, []
    for i, ((shape, p, _), groups, count) in enumerate(zip(sites, plan.groups, plan.counts, strict=True)):
        start, end = end, end + count
        out = drawn[start:end]
        if plan.counters is None:
            rows, step = _rows(sites[i]), max(1, _CHUNK // max(1, groups))
            for first in range(0, len(rows), step):
                part = out[first * groups : (first + step) * groups]
                _draw(part, _counters([rows[first : first + step]], [groups]), keys[i : i + 1], [len(part)], [p])
        if shape[-1] % 8:
            out = out.reshape(math.prod(shape[:-1]), 8 * groups)[:, : shape[-1]]
        factor = torch.from_numpy(out.reshape(shape))
        found.append(factor if seeds.is_cpu else factor.to(seeds.device))
    return found


@functools.lru_cache(maxsize=64)
def _plan(sites: tuple[Site, ...]) -> _Plan:
    groups = [(site.shape[-1] + 7) // 8 for site in sites]
    counts = [math.prod(site.shape[:-1]) * n for site, n in zip(sites, groups, strict=True)]
    counters = None
    if 8 * sum(counts) <= FEW:
        counters = _counters([_rows(site) for site in sites], groups)
        # An operand of equal shape costs NumPy half of one that is broadcast, where there is little of it.
        counters = counters._replace(multipliers=np.broadcast_to(_MULTIPLIERS, counters.even.shape).copy())
    return _Plan(groups, counts, [site.dropout_p for site in sites], counters)


def _rows(site: Site) -> np.ndarray:
    """The numbers of a site's rows."""
    if site.first_rows is None:
        return np.arange(math.prod(site.shape[:-1]), dtype=np.uint64)
    firsts = np.array(site.first_rows, dtype=np.uint64)
    return (firsts[:, None] + np.arange(site.shape[-2], dtype=np.uint64)).reshape(-1)


def _counters(rows: Sequence[np.ndarray], groups: Sequence[int]) -> _Counters:
    """Of the groups of numbered rows."""
    n = sum(len(numbers) * count for numbers, count in zip(rows, groups, strict=True))
    even, odd = np.empty((2, n), dtype=np.uint64), np.empty((2, n), dtype=np.uint32)
    end = 0
    for numbers, count in zip(rows, groups, strict=True):
        start, end = end, end + len(numbers) * count
        # Word 2's product goes to words 0 and 1, word 0's to words 2 and 3.
        products = ((numbers >> _32) * _MULTIPLIERS[1])[:, None], np.arange(count, dtype=np.uint64) * _MULTIPLIERS[0]
        others = (numbers & _LOW_BITS)[:, None], np.uint64(0)
        for i, (product, other) in enumerate(zip(products, others, strict=True)):
            even[i, start:end].reshape(len(numbers), count)[...] = (product >> _32) ^ other
            odd[i, start:end].reshape(len(numbers), count)[...] = product & _LOW_BITS
    return _Counters(even, odd, _MULTIPLIERS)


def _draw(out: np.ndarray, counters: _Counters, keys: np.ndarray, counts: Sequence[int], ps: Sequence[float]) -> None:
    """Fill `out`, ``[n, 8]``, with factors; `counts` of the groups go to each key and probability."""
    n = len(out)
    steps = ((_KEY_STEPS[:, None] + keys) & _LOW_BITS).transpose(0, 2, 1)  # [rounds, 2, keys]
    if len(keys) > 1:
        steps = steps.repeat(counts, 2)
    even, odd, multipliers = counters
    even = even ^ steps[0]
    even_words = even.view(np.uint32)[:, _LOW::2]
    products = np.empty((2, 2, n), dtype=np.uint64)  # of this round and of the one before
    halves = products.view(np.uint32).reshape(2, 2, n, 2)[:, ::-1]  # each goes to the other pair of words
    lows, highs = halves[..., _LOW], halves[..., _HIGH]
    for i in range(1, PHILOX_ROUNDS):
        np.multiply(even, multipliers, out=products[i % 2])
        np.bitwise_xor(highs[i % 2], odd, out=even_words)
        even ^= steps[i]
        odd = lows[i % 2]
    pairs = products[(PHILOX_ROUNDS - 1) % 2, ::-1] << _32
    pairs |= even
    numbers = pairs.astype("<u8", copy=False).view("<u2").reshape(2, n, 4)
    if len(set(ps)) == 1:
        counts = [n]
    end = 0
    for count, p in zip(counts, ps, strict=False):
        start, end = end, end + count
        if threshold(p) > 65535:  # NumPy before 2.2 crashes where it compares 16-bit numbers with more
            out[start:end] = 0.0
            continue
        # Four bytes, the bools of a pair of words, go from one place to the other as one number.
        kept = (numbers[:, start:end] >= threshold(p)).view(np.uint32)[..., 0].T.copy().view(np.bool_)
        np.multiply(kept, keep_scale(p), out=out[start:end])


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float, first_rows: Sequence[int] | None = None) -> Tensor:
    """`x` with dropout applied; differentiable.

    Args:
        x: any floating tensor.
        seed: the key (int64), or what `factors` has drawn with it; None for no dropout.
        dropout_p: probability.
        first_rows: as in `factors`.
    """
    if seed is None:
        return x
    if seed.dtype is torch.int64:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        site = Site(x.shape, dropout_p, None if first_rows is None else tuple(first_rows))
        seed = factors(seed, (site,), wide)[0]
    dropped = x * seed
    return dropped if dropped.dtype is x.dtype else dropped.to(x.dtype)
