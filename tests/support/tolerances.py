"""Every tolerance of the test suite, each with its reason."""

from __future__ import annotations

import torch

FORWARD_FACTOR = 2.0
"""A kernel's largest error against float64 may be this many times eager PyTorch's in the same dtype (DESIGN.md)."""

GRADIENT_FACTOR = 3.0
"""Likewise for gradients, which pass through more roundings whose order is free (DESIGN.md)."""

FLOOR = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""What is allowed on top, in units of eps times the largest reference value. Where eager is exact by luck
(a single term, a row of equal values) twice its error is nothing. Half precision: the one rounding of the
result. float32: sums of some hundred terms in another order, each of up to half an eps."""

LEAST_GRADIENT = 10.0
"""Attention with one key, or with scores so large that one key takes all the weight: the true gradient is 0 and
eager's is 0 by luck, but dS = P (dP - delta) there is the difference of two numbers of the size of dO V, about 10
for the tests' sizes, and keeps their rounding. Used by those tests alone."""


def size_of_a_sum(rows: int) -> float:
    """How large the floor counts the gradient of a weight or bias, summed over `rows` rows, at least: the size of a sum
    of that many random terms of unit size, the square root of their number. A column can sum to nearly 0 while its
    error grows with what was added up, as a random walk does."""
    return float(rows) ** 0.5


SAME_ALGORITHM = 1e-5
"""float32 results of the same formulas through other calls (packed or padded, one product or three), relative to the
largest value: a few hundred roundings of 6e-8, growing as their square root, with room for layers that amplify."""

SAME_ALGORITHM_64 = 1e-12
"""The same in float64."""

HALF_PRECISION = 4e-3
"""float16 results of size up to 4 against float32: two roundings of eps 1e-3, of the inputs and of
the result, times 2."""

AUTOCAST = 1.6e-2
"""bfloat16 autocast on the kernels against the parts on eager PyTorch, with the same dropout, relative to the largest
value: two roundings of eps 7.8e-3, which largest values see one after the other. Another mask is off by 0.8."""

EMBEDDINGS = 1e-5
"""Sentence embeddings of unit length, fused against unfused, float32 (issue: embeddings differ by less than this)."""

LOSS_CURVE = 1e-4
"""Ten training steps, relative difference of the losses: rounding differences that the optimiser amplifies."""

HOST_COST = 1.3
"""A host cost over that of PyTorch's own functions in the same run, times what is held: such a ratio varies with the
machine and with what else it does."""
