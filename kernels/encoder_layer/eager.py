"""The layer in plain PyTorch: the path of the CPU and of float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention  # torch's own, whatever `sdpa_replacement` does

from ..add_norm import eager as add_norm
from ..add_norm.arguments import Options as NormOptions
from ..attention import eager as attention
from ..common import dropout
from ..common.dropout import Site
from ..ffn import eager as ffn
from .arguments import LayerWeights, Masks, Options, as_rows, attention_call, views


def encoder_layer(src: Tensor, w: LayerWeights, masks: Masks, seeds: Tensor | None, options: Options) -> Tensor:
    """The output; differentiable. `seeds`: a key for each place that drops."""
    p, activation = options.dropouts, options.kernel_activation
    drawn1, drawn2, drawn3, drawn4 = _drawn(src, w, masks, seeds, options)
    if options.norm_first:
        attended = _self_attention(_norm(src, w.norm1_weight, w.norm1_bias, options.eps1), w, masks, drawn1, options)
        x = _dropout_add(attended, drawn2, p.projection, src)
        between = _norm(x, w.norm2_weight, w.norm2_bias, options.eps2)
    else:
        attended = _self_attention(src, w, masks, drawn1, options)
        x = _dropout_add(attended, drawn2, p.projection, src)
        between = x = _norm(x, w.norm1_weight, w.norm1_bias, options.eps1)
    activated = ffn.linear_act(between, w.weight1, w.bias1, drawn3, p.hidden, activation, False)
    out = _dropout_add(F.linear(activated, w.weight2, w.bias2), drawn4, p.output, x)
    return out if options.norm_first else _norm(out, w.norm2_weight, w.norm2_bias, options.eps2)


def _dropout_add(x: Tensor, drawn: Tensor | None, dropout_p: float, residual: Tensor) -> Tensor:
    """``residual + dropout(x)``, in the memory of `x` where it can be: a product's output, which nobody else needs."""
    if drawn is None:
        return x.add_(residual)
    if drawn.dtype is x.dtype:
        return torch.addcmul(residual, x, drawn)
    return dropout.dropout(x, drawn, dropout_p).add_(residual)


def _drawn(src: Tensor, w: LayerWeights, masks: Masks, seeds: Tensor | None, options: Options) -> list[Tensor | None]:
    """For each place that drops what `dropout.dropout` takes: of small batches the factors of all from one draw, else
    the keys, under which each place draws for itself."""
    p, rows = options.dropouts, src.shape
    if seeds is None:
        return [None, None, None, None]
    length, batch = rows[:2] if not options.batch_first else rows[1::-1]
    hidden = w.weight1.shape[0]
    if (
        masks.cu_seqlens is not None  # attention draws for some sequences at a time
        or batch * length * (options.nhead * length + hidden + 2 * rows[-1]) > dropout.FEW
    ):
        return p.spread(seeds.split(1))
    shapes = ((batch, options.nhead, length, length), rows, (*rows[:-1], hidden), rows)
    sites = tuple([Site(shape, q) for shape, q in zip(shapes, p, strict=True) if q > 0.0])
    return p.spread(dropout.factors(seeds, sites, torch.float64 if src.dtype is torch.float64 else torch.float32))


def _self_attention(x: Tensor, w: LayerWeights, masks: Masks, drawn: Tensor | None, options: Options) -> Tensor:
    qkv = F.linear(x, w.in_proj_weight, w.in_proj_bias)
    plain = masks.attn_mask is None and x.is_cpu and not x.is_cuda
    if plain and drawn is None and masks.cu_seqlens is not None:
        out = _attention_of_packed(qkv, masks.cu_seqlens, masks.is_causal, options.nhead)
        return F.linear(out, w.out_proj_weight, w.out_proj_bias)
    if plain and drawn is None:
        query, key, value = views(qkv, x.shape, options)
        out = scaled_dot_product_attention(query, key, value, is_causal=masks.is_causal)
    elif plain and drawn is not None and drawn.dtype is x.dtype and not masks.is_causal:
        out = _attention_with_factors(qkv, drawn, x.shape, options)
    else:
        out, _ = attention.attention(*attention_call(qkv, x.shape, masks, drawn, options))
    return F.linear(as_rows(out, options, x), w.out_proj_weight, w.out_proj_bias)


def _attention_of_packed(qkv: Tensor, cu_seqlens: Tensor, is_causal: bool, nhead: int) -> Tensor:
    """Attention inside each of packed sequences, neighbours of equal length at once, in few calls: ``[T, E]``."""
    width = qkv.shape[-1] // 3
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens.tolist())]
    groups = [(length, len(list(members))) for length, members in itertools.groupby(lengths) if length]
    parts = []
    for (length, count), part in zip(groups, qkv.split([length * count for length, count in groups]), strict=True):
        query, key, value = part.view(count, length, 3, nhead, width // nhead).permute(2, 0, 3, 1, 4).unbind()
        out = scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        parts.append(out.transpose(1, 2).reshape(-1, width))
    return torch.cat(parts) if parts else qkv[:, :width]


def _attention_with_factors(qkv: Tensor, factors: Tensor, shape: Sequence[int], options: Options) -> Tensor:
    """Attention of a small batch whose dropout is drawn already, in the fewest calls: ``[B, H, L, D]``."""
    batch, nhead, length, _ = factors.shape
    head_dim = shape[-1] // nhead
    order = (2, 0, 3, 1, 4) if options.batch_first else (2, 1, 3, 0, 4)
    split = qkv.view(*shape[:-1], 3, nhead, head_dim).permute(order).reshape(3, batch * nhead, length, head_dim)
    query, key, value = split.unbind()
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0.0, alpha=head_dim**-0.5)
    weights = scores.softmax(-1) * factors.view(scores.shape)
    return torch.bmm(weights, value).view(batch, nhead, length, head_dim)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if eps < add_norm.TINY:
        return add_norm.add_norm(x, None, weight, bias, None, None, NormOptions(0.0, eps))[0]
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
