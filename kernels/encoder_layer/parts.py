"""The layer part by part, on this library's functions: what it means, and the path of the CPU, and of linear layers and
activations that are modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..add_norm import add_norm
from ..attention import attention, attention_varlen
from ..common import backend
from ..ffn import ffn
from ..ffn.eager import activate
from ..rotary import rotary
from .arguments import Options, Tensors
from .neighbours import find, stacked, without_derivatives
from .products import of_qkv

Modules = Mapping[str, Callable[[Tensor], Tensor]]
"""What takes the place of a product, by the name of its weight without ``_weight``."""
NONE: Modules = {}


class Part(NamedTuple):
    """What a part gives before it is added to its input."""

    x: Tensor
    bias: Tensor | None = None
    """That of the product `x`, where the next norm's kernel adds it: its backward pass sums the bias's gradient."""
    p: float = 0.0
    """Probability with which an element is dropped after that."""


def encoder_layer(
    t: Tensors, o: Options, max_seqlen: int, modules: Modules = NONE,
    across: tuple[Tensors, Options, Modules] | None = None,
) -> Tensor:  # fmt: skip
    """Each function checks its arguments and takes its own path; differentiable.

    `across` makes it a decoder layer: the attention to a memory, which is the source of its tensors. Of its weights
    those of an attention count, and of the norm that goes with it as the first.
    """
    x = t.src
    if not o.norm_first:
        x = _norm1(attention_part(x, x, t, o, max_seqlen, modules), x, t, o)
        if across is not None:
            x = _norm1(attention_part(x, across[0].src, *across[:2], 0, across[2]), x, *across[:2])
        return _norm2(feed_forward(x, t, o, modules), x, t, o)  # type: ignore[no-any-return]
    normed = x if o.no_norm1 else _norm1(Part(x), None, t, o)
    attended = attention_part(normed, normed, t, o, max_seqlen, modules)
    if across is not None:
        normed, x = _norm1(attended, x, *across[:2], True)
        attended = attention_part(normed, across[0].src, *across[:2], 0, across[2])
    normed, x = _norm2(attended, x, t, o, True)
    if t.post_norm2_weight is not None:
        return x + feed_forward(normed, t, o, modules).x
    return feed_forward(normed, t, o, modules, x).x


def _norm1(part: Part, residual: Tensor | None, t: Tensors, o: Options, return_sum: bool = False) -> Any:
    return _norm(part, residual, t.norm1_weight, t.norm1_bias, o, o.eps1, return_sum)


def _norm2(part: Part, residual: Tensor | None, t: Tensors, o: Options, return_sum: bool = False) -> Any:
    return _norm(part, residual, t.norm2_weight, t.norm2_bias, o, o.eps2, return_sum)


def _norm(
    part: Part, residual: Tensor | None, weight: Any, bias: Any, o: Options, eps: float, return_sum: bool = False
) -> Any:
    return add_norm(
        part.x, residual, weight, bias, norm="rms" if o.rms else "layer", eps=eps, dropout_p=part.p, x_bias=part.bias,
        return_sum=return_sum,
    )  # fmt: skip


def attention_part(
    x: Tensor, source: Tensor, t: Tensors, o: Options, max_seqlen: int, modules: Modules = NONE
) -> Part:  # fmt: skip
    """Attention of the tokens `x` to those of `source`, which may be `x`, projected."""
    weights, biases = of_qkv(t)
    inputs, names = (x, source, source), ("in_proj", "k_proj", "v_proj")
    if len(weights) == 3 and not modules and without_derivatives():
        (joined, weight), (joined_biases, bias) = find(weights), find(biases)
        if joined and joined_biases:
            weights, biases = (weight,), (bias,)
    if len(weights) == 1 and source is not x:
        rows = (o.nhead * o.head_dim, 2 * o.kv_nhead * o.head_dim)
        weights = weights[0].split_with_sizes(rows)
        biases = (None, None) if biases[0] is None else biases[0].split_with_sizes(rows)
    found = [_linear(y, n, w, b, modules) for y, n, w, b in zip(inputs, names, weights, biases, strict=False)]
    *heads, last = [each.unflatten(-1, (-1, o.head_dim)) for each in found]
    heads += last.split_with_sizes((o.nhead, o.kv_nhead, o.kv_nhead)[len(heads) :], -2)
    query, key, value = heads
    out = attend(query, key, value, t, o, max_seqlen)
    later = _norm_adds(out, "out_proj", modules)
    out = _linear(out, "out_proj", t.out_proj_weight, None if later else t.out_proj_bias, modules)
    part = Part(out, t.out_proj_bias if later else None, o.projection_p)
    return _normed(part, t.post_norm1_weight, t.post_norm1_bias, o, o.eps1)


def attend(query: Tensor, key: Tensor, value: Tensor, t: Tensors, o: Options, max_seqlen: int) -> Tensor:
    """Attention with heads after tokens, ``[B, L, H, D]``, ``[L, B, H, D]`` or packed ``[T, H, D]`` each; heads side by
    side."""
    options: dict[str, Any] = {"scale": o.scale, "relative_bias": t.relative_bias}
    if o.left >= 0 or o.right >= 0:
        options["window"] = tuple(None if size < 0 else size for size in (o.left, o.right))
    if o.softcap:
        options["softcap"] = o.softcap
    starts, order = t.cu_seqlens, (0, 2, 1, 3) if o.batch_first else (1, 2, 0, 3)
    if starts is None:
        query, key, value = (each.permute(order) for each in (query, key, value))
    if t.cos is not None and t.sin is not None:
        query, key = rotary(query, key, t.cos, t.sin)  # type: ignore[assignment]
    if starts is not None:
        out = attention_varlen(
            query, key, value, starts, starts, max_seqlen, max_seqlen, t.attn_mask, o.attention_p, o.is_causal,
            **options,
        )  # fmt: skip
        return out.flatten(-2)
    out = attention(
        query, key, value, t.attn_mask, o.attention_p, o.is_causal, enable_gqa=o.nhead != o.kv_nhead, **options
    )
    return (out.transpose(1, 2) if o.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)


def feed_forward(
    x: Tensor, t: Tensors, o: Options, modules: Modules = NONE, residual: Tensor | None = None
) -> Part:  # fmt: skip
    """The block's output; beside a residual, dropped out and added to it."""
    activation: Any = o.activation
    later = residual is None and _norm_adds(x, "weight2", modules)
    bias2, p = None if later else t.bias2, 0.0 if residual is None else o.output_p
    whole = isinstance(activation, str) and not modules.keys() & {"weight1", "up", "weight2"}
    if whole and (t.up_weight is None or backend.would_use_triton(x)):
        stack: Any = stacked if t.up_weight is None or without_derivatives() else _concatenated
        weight, bias = stack((t.weight1, t.up_weight)), stack((t.bias1, t.up_bias))
        out = ffn(
            x, weight, bias, t.weight2, bias2, activation=activation, gated=o.gated, dropout_p=o.hidden_p,
            out_dropout_p=p, residual=residual, recompute="activation" if o.recompute else False,
        )  # type: ignore[arg-type]  # fmt: skip
    else:
        hidden = _linear(x, "weight1", t.weight1, t.bias1, modules)
        rest: Tensor | None = None
        if t.up_weight is not None:
            rest = _linear(x, "up", t.up_weight, t.up_bias, modules)
        elif o.gated:
            hidden, rest = hidden.chunk(2, -1)
        hidden = activate(hidden, None, 0.0, activation, False) if isinstance(activation, str) else activation(hidden)
        hidden = F.dropout(hidden if rest is None else hidden * rest, o.hidden_p)
        out = F.dropout(_linear(hidden, "weight2", t.weight2, bias2, modules), p)
        out = out if residual is None else residual + out
    if residual is not None:
        return Part(out)
    return _normed(Part(out, t.bias2 if later else None, o.output_p), t.post_norm2_weight, t.post_norm2_bias, o, o.eps2)


def _normed(part: Part, weight: Tensor | None, bias: Tensor | None, o: Options, eps: float) -> Part:
    """A part after the norm of its own, if it has one."""
    return part if weight is None else Part(_norm(part, None, weight, bias, o, eps))


def _norm_adds(x: Tensor, name: str, modules: Modules) -> bool:
    """True if the next norm shall add a product's bias; elsewhere the product adds it for nothing."""
    return name not in modules and backend.would_use_triton(x)


def _concatenated(tensors: tuple[Any, Any]) -> Any:
    return tensors[0] if tensors[1] is None else torch.cat(tensors)


def _linear(x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, modules: Modules) -> Tensor:
    module = modules.get(name)
    return F.linear(x, weight, bias) if module is None else module(x)  # type: ignore[arg-type]
