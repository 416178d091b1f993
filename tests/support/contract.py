"""The error contract: a kernel against the same computation in float64, measured by eager PyTorch's own error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tolerances import FLOOR, FORWARD_FACTOR, GRADIENT_FACTOR, size_of_a_sum
from torch import Tensor

Function = Callable[..., Tensor]


def assert_contract(
    kernel: Function, reference: Function, inputs: Sequence[Tensor], dtype: torch.dtype, *,
    least_gradient: float = 0.0, summed: Mapping[int, int] | None = None,
) -> None:  # fmt: skip
    """Hold `kernel` to the contract, forward and backward.

    Args:
        kernel: what is tested, a function of the inputs.
        reference: the same in plain PyTorch; run in float64 for the truth and in `dtype` for eager's error.
        inputs: float32 tensors; they are rounded to `dtype` first, so every side starts from the same values.
        least_gradient: the floor counts a gradient as at least this large; see `tolerances.LEAST_GRADIENT`.
        summed: inputs (by position) whose gradient is a sum over so many rows; see `tolerances.size_of_a_sum`.
    """
    rounded = [t.to(dtype).detach() for t in inputs]
    got, grads = _run(kernel, rounded)
    truth, true_grads = _run(reference, [t.double() for t in rounded], like=got)
    eager, eager_grads = _run(reference, rounded, like=got)
    compare("output", got, truth, eager, FORWARD_FACTOR, dtype)
    for i, (g, t, e) in enumerate(zip(grads, true_grads, eager_grads, strict=True)):
        least = max(least_gradient, size_of_a_sum((summed or {}).get(i, 0)))
        compare(f"gradient of input {i}", g, t, e, GRADIENT_FACTOR, dtype, least)


def _run(function: Function, inputs: list[Tensor], like: Tensor | None = None) -> tuple[Tensor, Sequence[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(out.shape, generator=generator).to(out.dtype if like is None else like.dtype).to(out.device)
    return out.detach(), torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def compare(
    what: str, got: Tensor, truth: Tensor, eager: Tensor, factor: float, dtype: torch.dtype, least: float = 0.0
) -> None:
    """Hold one result to `factor` times the error of `eager`, plus the floor of `dtype`."""
    assert got.shape == truth.shape and got.dtype == eager.dtype, f"{what}: {got.dtype} {tuple(got.shape)}"
    assert not got.isnan().any(), f"{what}: NaN"
    error = _largest(got.double() - truth)
    floor = FLOOR[dtype] * torch.finfo(dtype).eps * max(_largest(truth), least)
    allowed = factor * _largest(eager.double() - truth) + floor
    assert error <= allowed, f"{what}: error {error:.3e} is above {allowed:.3e}"


def output_and_gradients(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """`out` and the gradients of a random linear function of it.

    Random, because after a LayerNorm the sum and the sum of squares are constants: their gradients are rounding alone.
    """
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def results(function: Function, *tensors: Tensor) -> list[Tensor]:
    """`output_and_gradients` of a function of tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    return output_and_gradients(function(*leaves), leaves)


def layer_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `fusenc.kernels.LayerWeights`."""
    vectors = dict.fromkeys(
        ("out_proj_bias", "norm1_weight", "norm1_bias", "bias2", "norm2_weight", "norm2_bias"), (width,)
    )
    return {
        "in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,), "out_proj_weight": (width, width),
        "weight1": (hidden, width), "bias1": (hidden,), "weight2": (width, hidden), **vectors,
    }  # fmt: skip


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Hold results of `output_and_gradients` to each other, relative to the largest output and the largest gradient.

    Of all gradients, since some are 0 by nature (that of a key's bias) and keep the rounding of the others.
    """
    largest = max(_largest(t) for t in expected[1:])
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        limit = tolerance * (largest if i else _largest(b))
        what = f"gradient {i - 1}" if i else "output"
        torch.testing.assert_close(a, b, rtol=0, atol=limit, msg=lambda text, what=what: f"{what}: {text}")


def _largest(t: Tensor) -> float:
    finite = t.masked_fill(t.isinf() | t.isnan(), 0.0) if not t.isfinite().all() else t
    return float(finite.abs().max()) if t.numel() else 0.0
