"""The layer as a chain of this library's functions: the path of the CPU, of torch.compile and of autocast."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..add_norm import add_norm
from ..attention import attention, attention_varlen
from ..ffn import ffn
from .arguments import LayerWeights, Masks, Options


def encoder_layer(src: Tensor, weights: LayerWeights, masks: Masks, options: Options) -> Tensor:
    """Each function takes its own path; differentiable."""
    w, p = weights, options.dropouts
    if not options.norm_first:
        attended = _self_attention(src, w, masks, options)
        x = add_norm(attended, src, w.norm1_weight, w.norm1_bias, eps=options.eps1, dropout_p=p.projection)
        out = ffn(x, w.weight1, w.bias1, w.weight2, w.bias2, activation=options.activation, dropout_p=p.hidden)
        return add_norm(out, x, w.norm2_weight, w.norm2_bias, eps=options.eps2, dropout_p=p.output)
    normed = add_norm(src, None, w.norm1_weight, w.norm1_bias, eps=options.eps1)
    attended = _self_attention(normed, w, masks, options)
    normed, x = add_norm(
        attended, src, w.norm2_weight, w.norm2_bias, eps=options.eps2, dropout_p=p.projection, return_sum=True
    )
    return ffn(
        normed, w.weight1, w.bias1, w.weight2, w.bias2,
        activation=options.activation, dropout_p=p.hidden, out_dropout_p=p.output, residual=x,
    )  # fmt: skip


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
