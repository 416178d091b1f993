"""ffn and linear_act as operations: what call paths, autograd functions and operators are made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common import checks, compat, plan
from ..common.operator import Operation, Prepare
from . import eager
from .arguments import LinearOptions, LinearTensors, Options, Saved, Tensors, stored


def _signature(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, residual: Tensor | None
) -> Hashable:
    return (
        _of_layer(x, weight1, bias1), plan.of_parameter(weight2), plan.of_parameter(bias2),
        None if residual is None else (residual.shape[:-1] == x.shape[:-1], plan.of_rows(residual)),
    )  # fmt: skip


def _of_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Hashable:
    rows = x.numel() // (x.shape[-1] or 1)
    return (
        plan.of_rows(x), (rows - 1).bit_length(), plan.of_parameter(weight), plan.of_parameter(bias),
        x.dtype is torch.float32 and compat.tf32_allowed(),
    )  # fmt: skip


def _check(tensors: Any, options: Any, sizes: Any, autocast: bool) -> tuple[Prepare, Options]:
    x, weight1, bias1, weight2, bias2, residual = tensors
    dropout_p, out_dropout_p, training, activation, gated, recompute, fused = options
    _check_first(x, activation, dropout_p, fused)
    checks.dropout_probability(out_dropout_p, "out_dropout_p")
    if recompute not in (False, "activation", True):
        checks.fail_value("recompute", "False, 'activation' or True", recompute)
    width = _check_layer(x, x.shape[-1], "x", "weight1", weight1, "bias1", bias1, gated)
    d_out = _check_layer(x, width, "weight1", "weight2", weight2, "bias2", bias2, False)
    if residual is not None:
        checks.same_kind("residual", residual, "x", x, or_float32=True)
        if checks.differ(residual.shape, torch.Size((*x.shape[:-1], d_out))):
            checks.fail_value("residual", f"shape {[*x.shape[:-1], d_out]}, that of the result", residual)
    p, out_p = (float(dropout_p), float(out_dropout_p)) if training else (0.0, 0.0)
    return (), Options(p, out_p, activation, bool(gated), fused, recompute in (False, "activation"), not recompute)


def _linear_check(tensors: Any, options: Any, sizes: Any, autocast: bool) -> tuple[Prepare, LinearOptions]:
    x, weight, bias = tensors
    dropout_p, training, activation, gated, recompute, fused = options
    _check_first(x, activation, dropout_p, fused)
    if recompute not in (False, True):
        checks.fail_value("recompute", "False or True", recompute)
    _check_layer(x, x.shape[-1], "x", "weight", weight, "bias", bias, gated)
    p = float(dropout_p) if training else 0.0
    return (), LinearOptions(p, activation, bool(gated), fused, not recompute)


def _check_first(x: Any, activation: Any, dropout_p: Any, fused: Any) -> None:
    checks.one_of("activation", activation, eager.ACTIVATIONS)
    checks.dropout_probability(dropout_p)
    checks.one_of("fused", fused, (None, True, False))
    checks.floating_tensor("x", x)
    if x.dim() == 0:
        checks.fail_value("x", "at least one dimension", x)


def _check_layer(
    x: Tensor, width: int, follows: str, name: str, weight: Any, bias_name: str, bias: Any, gated: Any
) -> int:
    """Check a layer that takes `width` columns from what is called `follows`; how many columns it gives."""
    checks.same_kind(name, weight, "x", x)
    if weight.dim() != 2:
        checks.fail_value(name, "two dimensions", weight)
    if weight.shape[1] != width:
        checks.fail_value(name, f"shape [rows, {width}], to go with {follows}", weight)
    if gated and weight.shape[0] % 2:
        checks.fail_value(name, "an even number of rows, half of them the gate's", weight)
    if bias is not None:
        checks.same_kind(bias_name, bias, "x", x)
        if checks.differ(bias.shape, weight.shape[:1]):
            checks.fail_value(bias_name, f"shape [{weight.shape[0]}], to go with {name}", bias)
    return weight.shape[0] // 2 if gated else weight.shape[0]


def _eager(tensors: Tensors, options: Options) -> tuple[Tensor]:
    if options.keep_activated or not _differentiable(tensors):
        return (eager.ffn(tensors, options),)
    if not options.keep_hidden:
        return (checkpoint(eager.ffn, tensors, options, use_reentrant=False, preserve_rng_state=False),)
    hidden = F.linear(tensors.x, tensors.weight1, tensors.bias1)
    return (checkpoint(eager.of_hidden, hidden, tensors, options, use_reentrant=False, preserve_rng_state=False),)


def _linear_eager(tensors: LinearTensors, options: LinearOptions) -> tuple[Tensor]:
    arguments = (*tensors, options.dropout_p, options.activation, options.gated)
    if options.keep_hidden or not _differentiable(tensors):
        return (eager.linear_act(*arguments),)
    return (checkpoint(eager.linear_act, *arguments, use_reentrant=False, preserve_rng_state=False),)


def _differentiable(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward(tensors: Tensors, options: Options, sizes: Any, needs: tuple[bool, ...]) -> Callable[..., Any]:
    from .forward import ffn_forward

    return ffn_forward(tensors, options, needs)


def _linear_forward(tensors: Any, options: LinearOptions, sizes: Any, needs: Sequence[bool]) -> Callable[..., Any]:
    from .forward import linear_act_forward, with_rows_of

    (x, weight, bias, seed), (p, activation, gated, fused, keep) = tensors, options
    launch = linear_act_forward(x, weight, bias, seed, p, activation, gated, fused, len(needs) > 0 and keep)

    def run(x: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out, hidden = launch(plan.as_rows(x) if needs else x, *rest)
        return with_rows_of(x, out), hidden

    return run


def _keep(tensors: Sequence[Any], results: Sequence[Any], options: Options) -> Saved:
    x, weight1, bias1, weight2, bias2, _, seed, out_seed = tensors
    return Saved(x, weight1, bias1, weight2, bias2, results[1], results[2], seed, out_seed)


def _linear_keep(tensors: Sequence[Any], results: Sequence[Any], options: LinearOptions) -> Saved:
    x, weight, bias, seed = tensors
    return Saved(x, weight, bias, None, None, results[1], None, seed, None)


def _backward(grads: Any, saved: Any, options: Options, sizes: Any, needs: Sequence[bool]) -> Callable[..., Any]:
    from ..common.column_sums import with_sums
    from .backward import ffn_backward

    launch = with_sums(ffn_backward(grads[0], Saved(*saved), options, needs[:5]))
    return lambda grads, saved: (*launch(grads[0], saved), grads[0] if needs[5] else None)


def _linear_backward(grads: Any, saved: Any, options: LinearOptions, sizes: Any, needs: Any) -> Callable[..., Any]:
    p, activation, gated, fused, _ = options
    run = _backward(grads, saved, Options(p, 0.0, activation, gated, fused), sizes, (*needs, False, False, False))
    return lambda grads, saved: run(grads, saved)[:3]


def _fake(tensors: Tensors, options: Options, sizes: Any, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    x, weight1, weight2, residual = tensors.x, tensors.weight1, tensors.weight2, tensors.residual
    rows, (hidden, activated) = math.prod(x.shape[:-1]), stored(options, needs)
    return (
        x.new_empty((*x.shape[:-1], weight2.shape[0]), dtype=x.dtype if residual is None else residual.dtype),
        x.new_empty((rows, weight1.shape[0])) if hidden else None,
        x.new_empty((rows, weight2.shape[1])) if activated else None,
    )


def _linear_fake(tensors: LinearTensors, options: LinearOptions, sizes: Any, needs: Any) -> tuple[Tensor | None, ...]:
    x, width = tensors.x, tensors.weight.shape[0]
    return (
        x.new_empty((*x.shape[:-1], width // 2 if options.gated else width)),
        x.new_empty((math.prod(x.shape[:-1]), width)) if needs and options.keep_hidden else None,
    )


FFN = Operation(
    "ffn", Tensors, Options, differentiable=6, outputs=1, results=3, signature=_signature, check=_check, eager=_eager,
    forward=_forward, keep=_keep, backward=_backward, fake=_fake, dropouts=("dropout_p", "out_dropout_p"),
    contiguous=(2, 4), cast=5,
)  # fmt: skip
LINEAR_ACT = Operation(
    "linear_act", LinearTensors, LinearOptions, differentiable=3, outputs=1, results=2, signature=_of_layer,
    check=_linear_check, eager=_linear_eager, forward=_linear_forward, keep=_linear_keep, backward=_linear_backward,
    fake=_linear_fake, dropouts=("dropout_p",), contiguous=(2,), cast=3,
)  # fmt: skip
