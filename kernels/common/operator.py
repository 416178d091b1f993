"""What every family's wiring shares: operators of ``torch.library``, the autocast rule, first derivatives only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fusenc", "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    cast: int | None = None,
) -> Any:
    """Define ``fusenc::<schema>`` for every device; with a backward formula it also gets its autocast rule, which
    concerns the first `cast` arguments, or all."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusenc::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.fusenc, name).default
    if backward is not None:
        torch.library.register_autograd(f"fusenc::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        for device_type in ("cpu", "cuda"):
            _LIBRARY.impl(name, _autocast_rule(operator, device_type, cast), f"Autocast{device_type.upper()}")
    return operator


def _autocast_rule(operator: Any, device_type: str, count: int | None) -> Callable[..., Any]:
    def rule(*args: Any) -> Any:
        cast = autocast_inputs(device_type, *args[:count])
        with torch.autocast(device_type, enabled=False):
            return operator(*cast, *args[len(cast) :])

    return rule


def autocast_inputs(device_type: str, *args: Any) -> tuple[Any, ...]:
    """The floating tensors among `args` in the dtype of the autocast in force, as for torch's own matrix products."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a for a in args
    )


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient as it is, which raises when it is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("fusenc's kernels have a first derivative only; use plain PyTorch where a second is needed")


def first_derivative(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """For an autograd function's backward: its gradients raise when they are differentiated.

    `torch.autograd.function.once_differentiable` raises only if the incoming gradient is itself differentiable;
    otherwise its result is a constant, and a gradient penalty would add nothing without a word.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        depends_on = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(None if r is None else _NoSecondDerivative.apply(r, *depends_on) for r in results)

    return wrapped
