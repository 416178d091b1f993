"""When results count as right, for whatever is timed: nothing wrong gets a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""What the command line calls them."""

LARGEST_DIFFERENCE = 16.0
"""From the reference, in units of eps times the largest value: sums of some thousand terms in another order, and
intermediate results rounded once more. A wrong index or a lost mask differs by the values themselves."""

LARGEST_DIFFERENCE_OF_A_MODEL = 256.0
"""The same after some layers, which pass each other's roundings on and amplify them."""


LEAST_SIZE = 1e-3
"""A result counts as at least this large beside the largest one: a gradient that is 0 but for rounding, as that of a
key's bias is, has no size of its own."""


def difference(
    got: Sequence[Tensor | None], expected: Sequence[Tensor | None], dtype: torch.dtype,
    allowed: float | Sequence[float] = LARGEST_DIFFERENCE,
) -> str:  # fmt: skip
    """What is wrong with the results, nothing if they are right.

    Args:
        got: what is checked; None is a gradient that does not exist.
        expected: the same in `dtype` or a wider one.
        dtype: whose eps counts.
        allowed: the largest difference, in units of eps times the largest expected value of the tensor; one number, or
            one for each result.
    """
    if len(got) != len(expected):
        return f"{len(got)} results, expected {len(expected)}"
    units = _units(expected, dtype)
    each = [allowed] * len(units) if isinstance(allowed, float) else list(allowed)
    for i, (g, e, unit) in enumerate(zip(got, expected, units, strict=True)):
        if g is None or e is None:
            if g is not e:
                return f"result {i} is {'missing' if g is None else 'not expected'}"
            continue
        if g.shape != e.shape:
            return f"result {i} has shape {tuple(g.shape)}, expected {tuple(e.shape)}"
        if not e.numel():
            continue
        found, most = _distance(g, e), each[i] * unit
        if not found <= most:  # also catches NaN
            return f"result {i} differs by {found:.2e}, allowed {most:.2e}"
    return ""


def errors(got: Sequence[Tensor | None], expected: Sequence[Tensor | None], dtype: torch.dtype) -> list[float]:
    """The difference of each result in the units of `difference`; 0 where there is nothing to compare."""
    return [
        0.0 if g is None or e is None or not e.numel() else _distance(g, e) / unit if unit else 0.0
        for g, e, unit in zip(got, expected, _units(expected, dtype), strict=True)
    ]


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max())


def _units(expected: Sequence[Tensor | None], dtype: torch.dtype) -> list[float]:
    """eps times the size of each result."""
    eps = torch.finfo(dtype).eps
    sizes = [0.0 if e is None or not e.numel() else float(e.double().abs().max()) for e in expected]
    largest = max(sizes, default=0.0)
    # What is 0 in the reference itself (a gradient through the softmax of a single key) is made of roundings of what
    # was subtracted, as large as the largest result.
    return [eps * (largest if size <= eps * largest else max(size, LEAST_SIZE * largest)) for size in sizes]
