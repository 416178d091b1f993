"""The feed-forward block's wiring: one implementation behind the autograd function and the operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, seed: Tensor | None,
    dropout_p: float, activation: str, save: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Output, pre-activation (if `save`) and activation, on whichever backend serves `x`."""
    if backend.use_triton(x):
        from .triton_forward import ffn_forward

        return ffn_forward(x, weight1, bias1, weight2, bias2, seed, dropout_p, activation, save)
    out, hidden, activated = eager.ffn(x, weight1, bias1, weight2, bias2, seed, dropout_p, activation)
    return out, hidden.view(-1, hidden.shape[-1]), activated.reshape(-1, hidden.shape[-1])


def backward(
    dout: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, hidden: Tensor, activated: Tensor,
    seed: Tensor | None, dropout_p: float, activation: str, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dweight1, dbias1, dweight2 and dbias2, each only if `needs` says so.

    The product whose epilogue has work to do is ours; the plain ones are the vendor's.
    """
    flat_do = dout.reshape(-1, dout.shape[-1])
    flat_x = x.reshape(-1, x.shape[-1])
    dx = dweight1 = dbias1 = None
    if any(needs[:3]):
        if backend.use_triton(dout):
            from .triton_backward import hidden_gradient

            dhidden = hidden_gradient(flat_do, weight2, hidden, seed, dropout_p, activation)
        else:
            dhidden = eager.hidden_gradient(flat_do, weight2, hidden, seed, dropout_p, activation)
        dx = (dhidden @ weight1).view(x.shape) if needs[0] else None
        dweight1 = dhidden.t() @ flat_x if needs[1] else None
        dbias1 = dhidden.sum(0) if needs[2] else None
    dweight2 = flat_do.t() @ activated if needs[3] else None
    dbias2 = flat_do.sum(0) if needs[4] else None
    return dx, dweight1, dbias1, dweight2, dbias2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight1, _, weight2, _, seed, ctx.dropout_p, ctx.activation, *_ = inputs
    ctx.save_for_backward(x, weight1, weight2, output[1], output[2], seed)


def _gradients(ctx: Any, call: Any, dout: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    return call(dout, *ctx.saved_tensors, ctx.dropout_p, ctx.activation, needs)


class FeedForward(torch.autograd.Function):
    """The kernels in eager mode, with gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        output = forward(*inputs, True)  # type: ignore[call-arg]
        _save(ctx, inputs, output)  # type: ignore[arg-type]
        return output[0]

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_gradients(ctx, backward, dout), None, None, None)


def _operator_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, save = args[0], args[-1]
    out, hidden, activated = forward(*args)
    if not save:  # an operator returns tensors only
        return out.contiguous(), x.new_empty(0), x.new_empty(0)
    assert hidden is not None
    return out.contiguous(), hidden.contiguous(), activated.contiguous()


def _fake_forward(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    out = x.new_empty((*x.shape[:-1], weight2.shape[0]))
    if not rest[-1]:
        return out, x.new_empty(0), x.new_empty(0)
    hidden = x.new_empty((math.prod(x.shape[:-1]), weight1.shape[0]))
    return out, hidden, torch.empty_like(hidden)


def _operator_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(args[0].new_empty(0) if grad is None else grad.contiguous() for grad in backward(*args))


def _fake_backward(dout: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = (x.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, rest[-1], strict=True))


def _operator_gradients(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    grads = _gradients(ctx, ffn_backward_operator, dout)
    needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:5], strict=True))
    return (*needed, None, None, None, None)


ffn_backward_operator = operator.register(
    "ffn_backward(Tensor dout, Tensor x, Tensor weight1, Tensor weight2, Tensor hidden, Tensor activated, "
    "Tensor? seed, float dropout_p, str activation, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)
ffn_operator = operator.register(
    "ffn(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? seed, float dropout_p, "
    "str activation, bool save) -> (Tensor, Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_save,
    backward=_operator_gradients,
)
