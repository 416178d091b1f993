"""add_norm as an operation: what its call path, autograd function and torch.library operator are made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common import checks, plan
from ..common.operator import Operation, Prepare
from . import eager
from .arguments import Options, Saved, Tensors, stores_sum, sum_dtype

NORMS = ("layer", "rms")


def _signature(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None
) -> Hashable:
    return (
        plan.of_rows(x), None if residual is None else (residual.shape == x.shape, plan.of_rows(residual)),
        plan.of_parameter(weight), plan.of_parameter(bias), plan.of_parameter(x_bias),
    )  # fmt: skip


def _check(tensors: Any, options: Any, sizes: Any, autocast: bool) -> tuple[Prepare, Options]:
    x, residual, *parameters = tensors
    norm, eps, dropout_p, training, return_sum, zero_centered, residual_in_fp32, recompute = options
    checks.dropout_probability(dropout_p)
    checks.one_of("norm", norm, NORMS)
    checks.not_negative("eps", eps)
    checks.floating_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        checks.fail_value("x", "a last dimension of at least 1", x)
    if residual is not None:
        checks.same_kind("residual", residual, "x", x, or_float32=True)
        if checks.differ(residual.shape, x.shape):
            checks.fail_value("residual", f"shape {list(x.shape)}, that of x", residual)
    for name, value in zip(("weight", "bias", "x_bias"), parameters, strict=True):
        if value is not None:
            checks.same_kind(name, value, "x", x, or_float32=True)
            if checks.differ(value.shape, x.shape[-1:]):
                checks.fail_value(name, f"shape [{x.shape[-1]}], the last dimension of x", value)
    float32_residual = residual is not None and residual.dtype != x.dtype
    float32_sum = x.dtype in checks.HALF and (residual_in_fp32 or float32_residual)
    return (), Options(
        float(dropout_p) if training else 0.0, float(eps), norm == "rms", bool(zero_centered), float32_sum,
        float32_residual, bool(return_sum), bool(recompute), x.dtype,
    )  # fmt: skip


def _eager(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    if options.recompute and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, total, _ = checkpoint(eager.add_norm, tensors, options, use_reentrant=False, preserve_rng_state=False)
    else:
        out, total, _ = eager.add_norm(tensors, options)
    return out, total if stores_sum(tensors, options, ()) else None


def _forward(tensors: Tensors, options: Options, sizes: Any, needs: tuple[bool, ...]) -> Callable[..., Any]:
    from .forward import add_norm_forward

    return add_norm_forward(tensors, options, needs)


def _keep(tensors: Sequence[Any], results: Sequence[Any], options: Options) -> Saved:
    x, residual, weight, bias, x_bias, seed = tensors
    total, statistics = results[1:3]
    if options.recompute and not (residual is x_bias is seed is None):
        return Saved(x, residual, weight, bias, x_bias, statistics, seed)
    return Saved(x if total is None else total, None, weight, bias, x_bias, statistics, seed)


def _backward(
    grads: Sequence[Any], saved: Sequence[Any], options: Options, sizes: Any, needs: Sequence[bool]
) -> Callable[..., Any]:
    from ..common.column_sums import with_sums
    from .backward import add_norm_backward

    return with_sums(add_norm_backward(grads, saved, options, needs))


def _fake(tensors: Tensors, options: Options, sizes: Any, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    x, rows = tensors.x, math.prod(tensors.x.shape[:-1])
    return (
        x.new_empty(x.shape, dtype=options.out_dtype),
        x.new_empty(x.shape, dtype=sum_dtype(x, options)) if stores_sum(tensors, options, needs) else None,
        x.new_empty(rows if options.rms else 2 * rows, dtype=torch.float32) if needs else None,
    )


ADD_NORM = Operation(
    "add_norm", Tensors, Options, differentiable=5, outputs=2, results=3, signature=_signature, check=_check,
    eager=_eager, forward=_forward, keep=_keep, backward=_backward, fake=_fake, dropouts=("dropout_p",),
    contiguous=(2, 3, 4), cast=5, cast_to=torch.float32,
)  # fmt: skip
