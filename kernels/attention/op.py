"""Attention's wiring: one implementation behind the autograd function (eager mode) and the operator (compiled)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seed: Tensor | None,
    dropout_p: float, is_causal: bool, softmax_scale: float, return_lse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp (float32) and what the backward pass needs of it, on whichever backend serves `query`.

    Without `return_lse` the eager path's log-sum-exp is zeros: its backward pass needs none."""
    if backend.use_triton(query):
        from .triton_forward import attention_forward

        return attention_forward(query, key, value, attn_mask, seed, dropout_p, is_causal, softmax_scale)
    out, lse = eager.attention(query, key, value, attn_mask, seed, dropout_p, is_causal, softmax_scale, return_lse)
    if lse is None:
        lse = query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return out.contiguous(), lse.contiguous(), lse


def backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    seed: Tensor | None, out: Tensor, statistics: Tensor, dropout_p: float, is_causal: bool, softmax_scale: float,
    needs_dquery: bool = True, needs_dkv: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dQ, dK and dV as far as they are needed, on whichever backend serves `query`."""
    args = (dout, dlse, query, key, value, attn_mask, seed, out, statistics, dropout_p, is_causal, softmax_scale)
    if backend.use_triton(query):
        from .triton_backward import attention_backward

        return attention_backward(*args, needs_dquery, needs_dkv)
    return eager.attention_backward(*args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, attn_mask, seed, dropout_p, is_causal, softmax_scale, *_ = inputs
    out, _, statistics = output
    ctx.save_for_backward(query, key, value, attn_mask, seed, out, statistics)
    ctx.options = dropout_p, is_causal, softmax_scale
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, call: Any, dout: Tensor | None, dlse: Tensor | None, *needs: bool
) -> tuple[Tensor | None, ...]:
    query, key, value, attn_mask, seed, out, statistics = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return call(dout, dlse, query, key, value, attn_mask, seed, out, statistics, *ctx.options, *needs)


class Attention(torch.autograd.Function):
    """The kernels in eager mode, with gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad
        grads = _gradients(ctx, backward, dout, dlse, needs[0], needs[1] or needs[2])
        return (*grads, None, None, None, None, None)


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=wide)
    parts = (2,) if _has_parts(query, attn_mask) else ()
    return query.new_empty((*query.shape[:3], value.shape[3])), lse, query.new_empty((*lse.shape, *parts), dtype=wide)


def _has_parts(query: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether the kernels keep the log-sum-exp's two parts apart; see `triton_blocks.load_statistics`."""
    return attn_mask is not None and attn_mask.dtype != torch.bool and backend.would_use_triton(query)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _operator_forward(*args: Any) -> tuple[Tensor, ...]:
    out, lse, statistics = forward(*args)
    # An operator's outputs may not share memory.
    return out.contiguous(), lse, statistics.clone() if statistics is lse else statistics


def _operator_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(grad.contiguous() for grad in backward(*args) if grad is not None)


def _operator_gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, attention_backward_operator, dout, dlse), None, None, None, None, None, None)


attention_backward_operator = operator.register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "Tensor? seed, Tensor out, Tensor statistics, float dropout_p, bool is_causal, float softmax_scale) "
    "-> (Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)
attention_operator = operator.register(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, "
    "float dropout_p, bool is_causal, float softmax_scale, bool return_lse) -> (Tensor, Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_save,
    backward=_operator_gradients,
)
