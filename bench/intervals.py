"""How sure a time is, from the spread of its rounds; without assumptions on how times are distributed."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence


def of_median(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """An interval that holds the true median with at least this probability (order statistics; Conover, "Practical
    nonparametric statistics", 1999, section 3.2); the smallest and largest value where there are too few for that."""
    ordered, n = sorted(values), len(values)
    outside, rank = 0.0, 0
    while rank < (n - 1) // 2:
        outside += math.comb(n, rank) / 2.0**n
        if 2.0 * outside > 1.0 - level:
            break
        rank += 1
    return ordered[max(rank - 1, 0)], ordered[n - 1 - max(rank - 1, 0)]


def of_ratio(a: Sequence[float], b: Sequence[float], level: float) -> tuple[float, float, float]:
    """How much larger `b` is than `a`: a ratio and an interval that holds the true one with at least this probability.

    The median of all ratios of one value of `b` to one of `a` (Hodges and Lehmann, "Estimates of location based on
    rank tests", 1963), and between which of these ratios a Mann-Whitney test at this level cannot tell 1 from them.
    With too few values for the level the interval has no ends.
    """
    ratios = sorted(y / x for x in a for y in b)
    middle = statistics.median(ratios)
    cut = _rank(len(a), len(b), 1.0 - level)
    if cut == 0:
        return middle, 0.0, math.inf
    return middle, ratios[cut - 1], ratios[len(ratios) - cut]


EXACT = 900
"""Pairs of values up to which the distribution is counted out."""


@functools.cache
def _rank(n: int, m: int, outside: float) -> int:
    """The largest k such that the Mann-Whitney statistic of equal distributions is below k, or as far above, with at
    most this probability. Of many pairs by the normal distribution, which is then a little on the safe side."""
    if n * m > EXACT:
        deviation = math.sqrt(n * m * (n + m + 1) / 12.0)
        return max(0, int(n * m / 2.0 + statistics.NormalDist().inv_cdf(outside / 2.0) * deviation))
    ways = _ways(n, m)
    total, below = math.comb(n + m, n), 0
    for k, count in enumerate(ways):
        below += count
        if 2 * below > outside * total:
            return k
    raise AssertionError("the statistic has to be somewhere")


def _ways(n: int, m: int) -> list[int]:
    """How many orders of n and m values give each statistic from 0 to n m: the coefficients of a Gaussian binomial."""
    ways = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for k in range(n * m, m + i - 1, -1):  # times 1 - q^(m + i)
            ways[k] -= ways[k - m - i]
        for k in range(i, n * m + 1):  # divided by 1 - q^i
            ways[k] += ways[k - i]
    return ways
