"""The layer as a chain of this library's functions: for torch.compile, autocast and other activations."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..add_norm import add_norm
from ..attention import attention, attention_varlen
from ..ffn import ffn
from .arguments import LayerWeights, Masks, Options


def encoder_layer(src: Tensor, w: LayerWeights, masks: Masks, options: Options) -> Tensor:
    """Each function checks its arguments and takes its own path; differentiable."""
    p = options.dropouts
    if not options.norm_first:
        attended = _self_attention(src, w, masks, options)
        x = add_norm(attended, src, w.norm1_weight, w.norm1_bias, eps=options.eps1, dropout_p=p.projection)
        out = _feed_forward(x, w, options)
        return add_norm(out, x, w.norm2_weight, w.norm2_bias, eps=options.eps2, dropout_p=p.output)
    normed = add_norm(src, None, w.norm1_weight, w.norm1_bias, eps=options.eps1)
    attended = _self_attention(normed, w, masks, options)
    normed, x = add_norm(
        attended, src, w.norm2_weight, w.norm2_bias, eps=options.eps2, dropout_p=p.projection, return_sum=True
    )
    return _feed_forward(normed, w, options, p.output, x)


def _self_attention(x: Tensor, w: LayerWeights, masks: Masks, options: Options) -> Tensor:
    qkv = F.linear(x, w.in_proj_weight, w.in_proj_bias)
    query, key, value = qkv.view(*x.shape[:-1], 3, options.nhead, x.shape[-1] // options.nhead).unbind(-3)
    dropout_p = options.dropouts.attention
    if masks.cu_seqlens is not None:
        starts, longest = masks.cu_seqlens, masks.max_seqlen
        out: Any = attention_varlen(
            query, key, value, starts, starts, longest, longest, masks.attn_mask, dropout_p, masks.is_causal
        )
        out = out.reshape(x.shape)
    else:
        order = (0, 2, 1, 3) if options.batch_first else (1, 2, 0, 3)
        query, key, value = (t.permute(order) for t in (query, key, value))
        out = attention(query, key, value, masks.attn_mask, dropout_p, masks.is_causal)
        out = (out.transpose(1, 2) if options.batch_first else out.permute(2, 0, 1, 3)).reshape(x.shape)
    return F.linear(out, w.out_proj_weight, w.out_proj_bias)


def _feed_forward(
    x: Tensor, w: LayerWeights, options: Options, out_dropout_p: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    dropout_p, activation = options.dropouts.hidden, options.activation
    if isinstance(activation, str):
        return ffn(
            x, w.weight1, w.bias1, w.weight2, w.bias2,
            activation=activation, dropout_p=dropout_p, out_dropout_p=out_dropout_p, residual=residual,
        )  # fmt: skip
    hidden = F.dropout(activation(F.linear(x, w.weight1, w.bias1)), dropout_p)
    out = F.dropout(F.linear(hidden, w.weight2, w.bias2), out_dropout_p)
    return out if residual is None else residual + out
