"""Attention's wiring: one implementation behind the autograd function (eager mode) and the operator (compiled)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager
from .arguments import Inputs, Options, output_dtype, wide_dtype

_TENSORS = len(Inputs._fields)
DIFFERENTIABLE = 5
"""Of the inputs the first so many: query, key, value, attn_mask, relative_bias."""


def forward(inputs: Inputs, options: Options, return_lse: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, log-sum-exp (float32) if asked for, and what the backward pass needs of it, on whichever backend serves
    the query; the eager one needs nothing."""
    if backend.use_triton(inputs.query):
        from .forward import attention_forward

        return attention_forward(inputs, options, return_lse)
    return *eager.attention(inputs, options, return_lse), None


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, statistics: Tensor, inputs: Inputs, options: Options,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the differentiable inputs as far as they are needed, on whichever backend serves the query."""
    if backend.use_triton(inputs.query):
        from .backward import attention_backward

        dquery, dkey, dvalue, dmask, drelative = needs
        return attention_backward(
            dout, dlse, out, statistics, inputs, options, (dquery, dkey or dvalue, dmask, drelative)
        )
    return eager.attention_backward(dout, dlse, inputs, options, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    out, _, statistics = output
    ctx.save_for_backward(*inputs[:_TENSORS], out, statistics)
    ctx.options = inputs[_TENSORS : _TENSORS + len(Options._fields)]
    ctx.set_materialize_grads(False)


class Attention(torch.autograd.Function):
    """The kernels in eager mode, with gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        output = forward(Inputs(*arguments[:_TENSORS]), Options(*arguments[_TENSORS:-1]), arguments[-1])
        _save(ctx, arguments, output)
        return output[:2]

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, out, statistics = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        needs = ctx.needs_input_grad[:DIFFERENTIABLE]
        grads = backward(dout, dlse, out, statistics, Inputs(*inputs), Options(*ctx.options), needs)
        return (*grads, *[None] * (_TENSORS - DIFFERENTIABLE + len(Options._fields) + 1))


def forward_with_weights(inputs: Inputs, options: Options, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.attention_with_weights`, and statistics, on the kernels."""
    from .planes import softmax_weights

    out, _, statistics = forward(inputs, options, False)
    assert statistics is not None
    weights = softmax_weights(statistics, inputs, options, 0, inputs.query.shape[2], average)
    return out, weights[:, 0] if average else weights, statistics


class AttentionWithWeights(torch.autograd.Function):
    """The same with gradients. Weights that nothing was computed from cost the backward pass nothing."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        *given, ctx.average = arguments
        out, weights, statistics = forward_with_weights(
            Inputs(*given[:_TENSORS]), Options(*given[_TENSORS:]), ctx.average
        )
        _save(ctx, tuple(given), (out, None, statistics))
        return out, weights

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor | None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, out, statistics = ctx.saved_tensors
        inputs, options, needs = Inputs(*tensors), Options(*ctx.options), ctx.needs_input_grad[:DIFFERENTIABLE]
        if dweights is not None:
            grads = eager.weights_backward(dout, dweights, inputs, options, ctx.average, needs)
        else:
            dout = torch.zeros_like(out) if dout is None else dout
            grads = backward(dout, None, out, statistics, inputs, options, needs)
        return (*grads, *[None] * (_TENSORS - DIFFERENTIABLE + len(Options._fields) + 1))


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options, return_lse = Inputs(*arguments[:_TENSORS]), Options(*arguments[_TENSORS:-1]), arguments[-1]
    query = inputs.query
    rows = query.shape[:3]
    wide = wide_dtype(query)
    kernels = backend.would_use_triton(query)
    parts = (2,) if _has_parts(inputs, options) else ()
    return (
        query.new_empty((*rows, inputs.value.shape[3]), dtype=output_dtype(query)),
        query.new_empty(rows if return_lse else (0,), dtype=wide),
        query.new_empty((*rows, *parts) if kernels else (0,), dtype=wide),
    )


def _has_parts(inputs: Inputs, options: Options) -> bool:
    """Whether the kernels keep the log-sum-exp's two parts apart; see `blocks.load_statistics`."""
    mask = inputs.attn_mask
    added = mask is not None and mask.dtype != torch.bool
    added = added or options.softcap > 0.0 or inputs.relative_bias is not None or inputs.alibi_slopes is not None
    return added


def _fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, statistics: Tensor, *rest: Any) -> list[Tensor]:
    inputs, needs = rest[:_TENSORS], rest[-1]
    return [
        t.new_empty(t.shape) if want else t.new_empty(0)
        for t, want in zip(inputs[:5], needs, strict=True)
        if t is not None
    ]


def _operator_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, options = Inputs(*arguments[:_TENSORS]), Options(*arguments[_TENSORS:-1])
    out, lse, statistics = forward(inputs, options, arguments[-1])
    none = out.new_empty(0, dtype=wide_dtype(inputs.query))
    return (
        out.contiguous(),
        none if lse is None else lse.contiguous(),
        none.clone() if statistics is None else statistics,
    )


def _operator_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, statistics: Tensor, *rest: Any) -> list[Tensor]:
    """As `backward`, with an entry for each input that there is, empty where no gradient was asked for."""
    inputs, options, needs = Inputs(*rest[:_TENSORS]), Options(*rest[_TENSORS:-1]), rest[-1]
    grads = backward(dout, dlse, out, statistics, inputs, options, needs)
    return [
        grad.contiguous() if want and grad is not None else t.new_empty(0)
        for t, grad, want in zip(inputs[:DIFFERENTIABLE], grads, needs, strict=True)
        if t is not None
    ]


def _operator_gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, out, statistics = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    needs = [bool(want) for want in ctx.needs_input_grad[:DIFFERENTIABLE]]
    grads = iter(attention_backward_operator(dout, dlse, out, statistics, *inputs, *ctx.options, needs))
    found = [next(grads) if t is not None else None for t in inputs[:DIFFERENTIABLE]]
    found = [grad if want else None for grad, want in zip(found, needs, strict=True)]
    return (*found, *[None] * (_TENSORS - DIFFERENTIABLE + len(Options._fields) + 1))


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? relative_bias, Tensor? alibi_slopes, "
    "Tensor? seed, Tensor? seqlens_q, Tensor? seqlens_k, Tensor? block_map, Tensor? blocks_of_query, "
    "Tensor? blocks_of_key, Tensor? tiles, Tensor? scales, float softmax_scale, float dropout_p, float softcap, "
    "SymInt left, SymInt right, bool bottom_right, bool packed, SymInt max_len_q, SymInt max_len_k"
)
attention_backward_operator = operator.register(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor statistics, {_ARGUMENTS}, bool[] needs) "
    "-> Tensor[]",
    _operator_backward,
    _fake_backward,
)
attention_operator = operator.register(
    f"attention({_ARGUMENTS}, bool return_lse) -> (Tensor, Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_save,
    backward=_operator_gradients,
    cast=3,
)
