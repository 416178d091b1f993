"""Attention's wiring: one implementation behind the autograd function (eager mode) and the operator (compiled)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seed: Tensor | None,
    dropout_p: float, is_causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp (float32), on whichever backend serves `query`."""
    if backend.use_triton(query):
        from .triton_forward import attention_forward

        return attention_forward(query, key, value, attn_mask, seed, dropout_p, is_causal, softmax_scale)
    out, lse = eager.attention(query, key, value, attn_mask, seed, dropout_p, is_causal, softmax_scale, True)
    assert lse is not None
    return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, dropout_p: float, is_causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK and dV, on whichever backend serves `query`."""
    args = (dout, dlse, query, key, value, attn_mask, seed, out, lse, dropout_p, is_causal, softmax_scale)
    if backend.use_triton(query):
        from .triton_backward import attention_backward

        return attention_backward(*args)
    return eager.attention_backward(*args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, attn_mask, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, attn_mask, seed, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, call: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, attn_mask, seed, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = call(dout, dlse, query, key, value, attn_mask, seed, out, lse, *ctx.options)
    return (*grads, None, None, None, None, None)


class Attention(torch.autograd.Function):
    """The kernels in eager mode, with gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _gradients(ctx, backward, dout, dlse)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], value.shape[3])
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(shape), query.new_empty(query.shape[:3], dtype=wide)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _contiguous_forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = forward(*args)
    return out.contiguous(), lse


def _contiguous_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(grad.contiguous() for grad in backward(*args))


attention_backward_operator = operator.register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "Tensor? seed, Tensor out, Tensor lse, float dropout_p, bool is_causal, float softmax_scale) "
    "-> (Tensor, Tensor, Tensor)",
    _contiguous_backward,
    _fake_backward,
)
attention_operator = operator.register(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, "
    "float dropout_p, bool is_causal, float softmax_scale) -> (Tensor, Tensor)",
    _contiguous_forward,
    _fake_forward,
    setup_context=_save,
    backward=lambda ctx, dout, dlse: _gradients(ctx, attention_backward_operator, dout, dlse),
)
