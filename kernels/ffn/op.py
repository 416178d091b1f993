"""The feed-forward block's wiring: one implementation behind the autograd functions and the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import backend, dropout, operator
from ..common import device as gpu
from . import eager

RECOMPUTE = (False, "activation", True)


def to_save(recompute: bool | str, needs: Sequence[bool]) -> tuple[bool, bool]:
    """Whether the backward pass wants the pre-activation and the activation saved, from what needs gradients."""
    first, second = any(needs[:3]), needs[3]
    hidden = not recompute or recompute == "activation"
    return hidden and (first or (second and bool(recompute))), not recompute and second


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, residual: Tensor | None,
    seed: Tensor | None, out_seed: Tensor | None, dropout_p: float, out_dropout_p: float, activation: str, gated: bool,
    fused: bool | None, save_hidden: bool, save_activated: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Output, and as far as asked for pre-activation and activation, ``[rows, ...]``, on the backend of `x`."""
    if backend.use_triton(x):
        from .forward import ffn_forward
        from .whole import serves, whole_ffn

        keeps = save_hidden or save_activated or seed is not None or out_seed is not None
        if (
            not (keeps or gated) and fused is not False and (residual is None or residual.dtype is x.dtype)
            and serves(x, weight1, weight2, gpu.architecture(x.device.index))
        ):  # fmt: skip
            return whole_ffn(x, weight1, bias1, weight2, bias2, residual, activation), None, None
        out, hidden, activated = ffn_forward(
            x, weight1, bias1, weight2, bias2, residual, seed, out_seed, dropout_p, out_dropout_p, activation, gated,
            fused, save_hidden,
        )  # fmt: skip
        return out, hidden, activated if save_activated else None
    hidden = F.linear(eager.as_matrix(x), weight1, bias1)
    act = dropout.dropout(eager.gate(hidden, activation, gated), seed, dropout_p)
    flat_r = None if residual is None else eager.as_matrix(residual)
    out = eager.output(act, weight2, bias2, flat_r, out_seed, out_dropout_p)
    out = out.view(*x.shape[:-1], weight2.shape[0])
    return out, hidden if save_hidden else None, act if save_activated else None


def backward(
    dout: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, hidden: Tensor | None,
    activated: Tensor | None, seed: Tensor | None, out_seed: Tensor | None, dropout_p: float, out_dropout_p: float,
    activation: str, gated: bool, fused: bool | None, needs: list[bool], accumulate: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx (added to `accumulate`), dweight1, dbias1, dweight2 and dbias2, each only if `needs` says so.

    The product whose epilogue has work to do may be ours; the plain ones are the vendor's. The residual's gradient is
    `dout` itself.
    """
    if not backend.use_triton(x):
        return eager.ffn_backward(
            dout, x, weight1, bias1, weight2, hidden, activated, seed, out_seed, dropout_p, out_dropout_p, activation,
            gated, needs, accumulate,
        )  # fmt: skip
    from ..common.column_sums import ColumnSums
    from .backward import ffn_backward

    sums = ColumnSums()
    grads = ffn_backward(
        dout, x, weight1, bias1, weight2, hidden, activated, seed, out_seed, dropout_p, out_dropout_p, activation,
        gated, fused, needs, sums, accumulate,
    )  # fmt: skip
    sums.launch()
    return grads


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str,
    gated: bool, fused: bool | None, save_hidden: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The dropped-out activation, and if asked for the pre-activation, on whichever backend serves `x`."""
    flat = eager.as_matrix(x)
    hidden: Tensor | None
    if backend.use_triton(x):
        from .forward import linear_act_forward as launch

        out, hidden = launch(flat, weight, bias, seed, dropout_p, activation, gated, fused, save_hidden)
    else:
        hidden = F.linear(flat, weight, bias)
        out = dropout.dropout(eager.gate(hidden, activation, gated), seed, dropout_p)
    return out.view(*x.shape[:-1], out.shape[-1]), hidden if save_hidden else None


def linear_act_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor | None, seed: Tensor | None,
    dropout_p: float, activation: str, gated: bool, fused: bool | None, needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dweight and dbias, each only if `needs` says so."""
    flat_x, flat_do = eager.as_matrix(x), eager.as_matrix(dout)
    if not backend.use_triton(x):
        hidden = F.linear(flat_x, weight, bias) if hidden is None else hidden
        dhidden = eager.hidden_gradient(flat_do, hidden, seed, dropout_p, activation, gated)
        return eager.linear_backward(dhidden, x, weight, needs)
    from ..common.column_sums import ColumnSums
    from .backward import activation_gradient, input_gradient
    from .forward import pre_activation

    sums = ColumnSums()
    hidden = pre_activation(flat_x, weight, bias, gated, fused) if hidden is None else hidden
    grad, dbias, _ = activation_gradient(
        flat_do, hidden, seed, dropout_p, activation, gated, sums, needs[2], needs_activated=False
    )
    assert grad is not None
    dx = input_gradient(grad, weight, None).view(x.shape) if needs[0] else None
    dweight = torch.mm(grad.t(), flat_x) if needs[1] else None
    sums.launch()
    return dx, dweight, dbias


class FeedForward(torch.autograd.Function):
    """`forward` and `backward` in eager mode, on the kernels or with something computed again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        *inputs, recompute = inputs  # type: ignore[assignment]
        needs = ctx.needs_input_grad
        output = forward(*inputs, *to_save(recompute, needs))  # type: ignore[call-arg]
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad
        grads = backward(dout, *ctx.saved_tensors, *ctx.options, list(needs[:5]))  # type: ignore[call-arg]
        return (*grads, dout if needs[5] else None, *[None] * 8)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor | None, ...]) -> None:
    x, weight1, bias1, weight2, _bias2, _residual, seed, out_seed, *ctx.options = inputs[:13]
    hidden, activated = output[1], output[2]
    # The first bias is needed to compute the pre-activation again, and only then.
    ctx.save_for_backward(x, weight1, bias1 if hidden is None else None, weight2, hidden, activated, seed, out_seed)


class LinearAct(torch.autograd.Function):
    """`linear_act_forward` and `linear_act_backward` in eager mode."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        *inputs, recompute = inputs  # type: ignore[assignment]
        output = linear_act_forward(*inputs, not recompute)  # type: ignore[call-arg]
        _save_linear_act(ctx, inputs, output)
        return output[0]

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = linear_act_backward(dout, *ctx.saved_tensors, *ctx.options, list(ctx.needs_input_grad[:3]))  # type: ignore[call-arg]
        return (*grads, *[None] * 6)


def _save_linear_act(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor | None, ...]) -> None:
    x, weight, bias, seed, *ctx.options = inputs[:8]
    hidden = output[1]
    ctx.save_for_backward(x, weight, bias if hidden is None else None, hidden, seed)


def _tensors_only(like: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """As an operator returns them: empty in the place of None."""
    return tuple(like.new_empty(0) if t is None else t.contiguous() for t in tensors)


def _kept(output: tuple[Tensor, ...], flags: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return (output[0], *(t if flag else None for t, flag in zip(output[1:], flags, strict=True)))


def _operator_forward(*args: Any) -> tuple[Tensor, ...]:
    return _tensors_only(args[0], forward(*args))


def _fake_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, residual: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    gated, save_hidden, save_activated = rest[5], rest[-2], rest[-1]
    rows, width = math.prod(x.shape[:-1]), weight1.shape[0]
    return (
        x.new_empty((*x.shape[:-1], weight2.shape[0]), dtype=x.dtype if residual is None else residual.dtype),
        x.new_empty((rows, width) if save_hidden else 0),
        x.new_empty((rows, width // 2 if gated else width) if save_activated else 0),
    )


def _operator_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, _kept(output, inputs[-2:]))


def _operator_gradients(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    grads = ffn_backward_operator(dout, *ctx.saved_tensors, *ctx.options, list(needs[:5]))
    needed = (grad if need else None for grad, need in zip(grads, needs[:5], strict=True))
    return (*needed, dout if needs[5] else None, *[None] * 9)


def _operator_backward(*args: Any) -> tuple[Tensor, ...]:
    return _tensors_only(args[1], backward(*args))


def _fake_backward(dout: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, *rest: Any) -> Any:
    shapes = (x.shape, weight1.shape, weight1.shape[:1], weight2.shape, weight2.shape[:1])
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, rest[-1], strict=True))


def _linear_act_operator_forward(*args: Any) -> tuple[Tensor, ...]:
    return _tensors_only(args[0], linear_act_forward(*args))


def _fake_linear_act(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gated, save = rest[4], rest[-1]
    width = weight.shape[0]
    out = x.new_empty((*x.shape[:-1], width // 2 if gated else width))
    return out, x.new_empty((math.prod(x.shape[:-1]), width) if save else 0)


def _linear_act_operator_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_linear_act(ctx, inputs, _kept(output, inputs[-1:]))


def _linear_act_gradients(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = linear_act_backward_operator(dout, *ctx.saved_tensors, *ctx.options, list(needs))
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 6)


def _linear_act_operator_backward(*args: Any) -> tuple[Tensor, ...]:
    return _tensors_only(args[1], linear_act_backward(*args))


def _fake_linear_act_backward(dout: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, rest[-1], strict=True))


ffn_backward_operator = operator.register(
    "ffn_backward(Tensor dout, Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? hidden, "
    "Tensor? activated, Tensor? seed, Tensor? out_seed, float dropout_p, float out_dropout_p, str activation, "
    "bool gated, bool? fused, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)
ffn_operator = operator.register(
    "ffn(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? residual, Tensor? seed, "
    "Tensor? out_seed, float dropout_p, float out_dropout_p, str activation, bool gated, bool? fused, "
    "bool save_hidden, bool save_activated) -> (Tensor, Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_operator_save,
    backward=_operator_gradients,
    cast=5,
)
linear_act_backward_operator = operator.register(
    "linear_act_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? hidden, Tensor? seed, "
    "float dropout_p, str activation, bool gated, bool? fused, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _linear_act_operator_backward,
    _fake_linear_act_backward,
)
linear_act_operator = operator.register(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, Tensor? seed, float dropout_p, str activation, bool gated, "
    "bool? fused, bool save) -> (Tensor, Tensor)",
    _linear_act_operator_forward,
    _fake_linear_act,
    setup_context=_linear_act_operator_save,
    backward=_linear_act_gradients,
    cast=3,
)
