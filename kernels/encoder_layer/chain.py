"""The layer as a chain of this library's functions: for torch.compile, autocast and other activations."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..add_norm import add_norm
from ..attention import attention, attention_varlen
from ..ffn import ffn
from .arguments import Options, Tensors


def encoder_layer(t: Tensors, options: Options, max_seqlen: int) -> Tensor:
    """Each function checks its arguments and takes its own path; differentiable."""
    src = t.src
    if not options.norm_first:
        attended = _self_attention(src, t, options, max_seqlen)
        x = add_norm(
            attended, src, t.norm1_weight, t.norm1_bias, eps=options.eps1, dropout_p=options.projection_p
        )  # fmt: skip
        out = _feed_forward(x, t, options)
        return add_norm(out, x, t.norm2_weight, t.norm2_bias, eps=options.eps2, dropout_p=options.output_p)
    normed = add_norm(src, None, t.norm1_weight, t.norm1_bias, eps=options.eps1)
    attended = _self_attention(normed, t, options, max_seqlen)
    normed, x = add_norm(
        attended, src, t.norm2_weight, t.norm2_bias, eps=options.eps2, dropout_p=options.projection_p, return_sum=True
    )
    return _feed_forward(normed, t, options, options.output_p, x)


def _self_attention(x: Tensor, t: Tensors, options: Options, max_seqlen: int) -> Tensor:
    qkv = F.linear(x, t.in_proj_weight, t.in_proj_bias)
    query, key, value = qkv.view(*x.shape[:-1], 3, options.nhead, x.shape[-1] // options.nhead).unbind(-3)
    if t.cu_seqlens is not None:
        starts = t.cu_seqlens
        out: Any = attention_varlen(
            query, key, value, starts, starts, max_seqlen, max_seqlen, t.attn_mask, options.attention_p,
            options.is_causal,
        )  # fmt: skip
        out = out.reshape(x.shape)
    else:
        order = (0, 2, 1, 3) if options.batch_first else (1, 2, 0, 3)
        query, key, value = (each.permute(order) for each in (query, key, value))
        out = attention(query, key, value, t.attn_mask, options.attention_p, options.is_causal)
        out = (out.transpose(1, 2) if options.batch_first else out.permute(2, 0, 1, 3)).reshape(x.shape)
    return F.linear(out, t.out_proj_weight, t.out_proj_bias)


def _feed_forward(
    x: Tensor, t: Tensors, options: Options, out_dropout_p: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    activation: Any = options.activation
    if isinstance(activation, str):
        return ffn(
            x, t.weight1, t.bias1, t.weight2, t.bias2, activation=activation, dropout_p=options.hidden_p,
            out_dropout_p=out_dropout_p, residual=residual,
        )  # fmt: skip
    hidden = F.dropout(activation(F.linear(x, t.weight1, t.bias1)), options.hidden_p)
    out = F.dropout(F.linear(hidden, t.weight2, t.bias2), out_dropout_p)
    return out if residual is None else residual + out
