"""The layer in plain PyTorch: the path of the CPU and of float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..add_norm import eager as add_norm
from ..add_norm.arguments import Options as NormOptions
from ..add_norm.arguments import Tensors as NormTensors
from ..attention import eager as attention
from ..common import dropout
from ..ffn import eager as ffn
from .arguments import Options, Tensors, as_rows, attention_options, attention_tensors


def encoder_layer(t: Tensors, options: Options, max_seqlen: int, batch_second: int) -> tuple[Tensor]:
    """The output; differentiable."""
    x, width = t.src, t.src.shape[-1]
    if t.cu_seqlens is not None:
        attention.require_starts("cu_seqlens", t.cu_seqlens, x.shape[0], "max_seqlen", max_seqlen)
    first = _norm(x, t.norm1_weight, t.norm1_bias, options.eps1) if options.norm_first else x
    qkv = F.linear(first, t.in_proj_weight, t.in_proj_bias)
    inputs = attention_tensors(qkv, x.shape, t.attn_mask, t.cu_seqlens, t.attention_seed, options)
    numbers, length = attention_options(width, t.cu_seqlens is not None, options), max_seqlen
    if t.cu_seqlens is None:
        length = inputs.query.shape[2]
    attended = as_rows(attention.attention(inputs, numbers, length, length)[0], options).view(x.shape)
    projected = F.linear(attended, t.out_proj_weight, t.out_proj_bias)
    x = _add(projected, t.projection_seed, options.projection_p, x)
    if not options.norm_first:
        x = _norm(x, t.norm1_weight, t.norm1_bias, options.eps1)
    between = _norm(x, t.norm2_weight, t.norm2_bias, options.eps2) if options.norm_first else x
    activated = ffn.linear_act(
        between, t.weight1, t.bias1, t.hidden_seed, options.hidden_p, options.activation, False
    )  # fmt: skip
    out = _add(F.linear(activated, t.weight2, t.bias2), t.output_seed, options.output_p, x)
    return (out if options.norm_first else _norm(out, t.norm2_weight, t.norm2_bias, options.eps2),)


def _add(x: Tensor, seed: Tensor | None, dropout_p: float, residual: Tensor) -> Tensor:
    """``residual + dropout(x)``, in the memory of `x`: a product's output, which nobody else needs."""
    return dropout.dropout(x, seed, dropout_p).add_(residual)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return add_norm.add_norm(NormTensors(x, None, weight, bias, None), NormOptions(eps=eps))[0]
