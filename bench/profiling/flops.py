"""Floating-point operations of a model by length, and the peak that they are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fusenc.kernels.common import launch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import timing
from ..machine_code import chips

STEP = 8
"""Operations are counted at 1, 2, 3 and 4 times this many tokens."""

PRODUCT_SIZES = (768, 1536)
"""Of the square matrix products that stand for a CPU's peak: large enough to reach it, small enough to be quick."""


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


@dataclass
class Peak:
    """What the device could do at most."""

    flops: float
    """Operations a second."""
    source: str


def peak(device: timing.Device, dtype: torch.dtype) -> Peak | None:
    """The peak of matrix products: of a GPU the published one of its architecture, of a CPU the best measured one.

    Returns:
        None on a GPU whose architecture has no published peak in the table of chips.
    """
    if isinstance(device, timing.Cpu):
        return _measured_peak(device, dtype)
    arch = launch.architecture(0)
    chip = chips.chips().get(arch)
    if chip is None:
        return None
    if dtype != torch.float32:
        teraflops, units = chip.tensor_tflops, "tensor cores"
    elif launch.input_precision(torch.empty(0)) == "tf32":
        teraflops, units = chip.tensor_tflops / 2, "tensor cores, TF32"
    else:
        teraflops, units = chip.fp32_tflops, "float32 outside tensor cores"
    return Peak(1e12 * teraflops, f"published, {chip.name} for {arch}, {units}")


def _measured_peak(device: timing.Cpu, dtype: torch.dtype) -> Peak:
    best = 0.0
    for size in PRODUCT_SIZES:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = timing.take_turns({"": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, 5, warm_up=1)[""]  # type: ignore[misc]
        best = max(best, 2 * size**3 / min(seconds))
    name = str(dtype).removeprefix("torch.")
    sizes = " and ".join(map(str, PRODUCT_SIZES))
    return Peak(best, f"measured, the best {name} product of size {sizes} on {torch.get_num_threads()} threads")
