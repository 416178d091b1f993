"""rotary's wiring: one implementation behind the autograd function (eager mode) and the operator (compiled).

A rotation is linear, and its gradient is a rotation: it can be differentiated any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager


def rotate(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Query and key rotated, by the negative angle if `inverse`, on whichever backend serves `query`."""
    if not backend.use_triton(query):
        return eager.rotary(query, key, cos, sin, position_ids, interleaved, inverse)
    if inverse:
        from .backward import rotate_back

        return rotate_back(query, key, cos, sin, position_ids, interleaved)
    from .forward import rotate as launch

    return launch(query, key, cos, sin, position_ids, interleaved, False)


class Rotary(torch.autograd.Function):
    """Every backend in eager mode, with gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:5])
        ctx.interleaved, ctx.inverse = inputs[5:]
        return rotate(*inputs)

    @staticmethod
    def backward(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        options = (*ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
        apply = Rotary.apply if torch.is_grad_enabled() else rotate
        if dquery is None:
            dkey = None if dkey is None else apply(dkey, None, *options)[0]
        else:
            dquery, dkey = apply(dquery, dkey, *options)
        return dquery, dkey, None, None, None, None, None


def _operator_forward(query: Tensor, key: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    out, key_out = rotate(query, key, *rest)
    return out, query.new_empty(0) if key_out is None else key_out


def _fake_forward(query: Tensor, key: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(0) if key is None else torch.empty_like(key)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, key, cos, sin, position_ids, ctx.interleaved, ctx.inverse = inputs
    ctx.has_key = key is not None
    ctx.save_for_backward(cos, sin, position_ids)


def _gradients(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
    given = dkey if ctx.has_key else None
    grads = rotary_operator(dquery, given, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return (grads[0], grads[1] if ctx.has_key else None, None, None, None, None, None)


rotary_operator = operator.register(
    "rotary(Tensor query, Tensor? key, Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, bool inverse) "
    "-> (Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
    cast=0,  # a rotation keeps its dtype, under autocast too
)
