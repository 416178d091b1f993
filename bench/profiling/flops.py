"""Floating-point operations of a model by length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

STEP = 8
"""Operations are counted at 1, 2, 3 and 4 times this many tokens."""


@dataclass(frozen=True)
class Polynomial:
    """Operations of one sequence of L tokens: ``constant + linear * L + quadratic * L**2``."""

    constant: float
    linear: float
    quadratic: float

    def __call__(self, length: int) -> float:
        return self.constant + self.linear * length + self.quadratic * length * length


def fit(count: Callable[[int], int], step: int = STEP) -> Polynomial | None:
    """The operations of a sequence by its length, from the counts of four short ones.

    Layers and embeddings cost the same for each token and attention the same for each pair, so three counts decide
    it. The fourth finds models that are not like that (attention in blocks, say).

    Args:
        count: operations of one sequence of so many tokens.
        step: the least length counted.

    Returns:
        None where a polynomial of degree 2 does not give all four counts.
    """
    first, second, third, fourth = (count(n * step) for n in (1, 2, 3, 4))
    quadratic = (third - 2 * second + first) / (2 * step * step)
    linear = (second - first) / step - 3 * step * quadratic
    found = Polynomial(first - linear * step - quadratic * step * step, linear, quadratic)
    return found if abs(found(4 * step) - fourth) <= 1e-9 * fourth else None


def count(call: Callable[[], object]) -> int:
    """Operations of the matrix products and attention of one call; a multiply-add is two.

    Attention takes its plain form meanwhile: on a CPU the counter does not know the others, and their backward passes
    compute scores anew, which are no operations of the model.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
