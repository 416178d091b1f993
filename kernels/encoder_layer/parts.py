"""The layer part by part, on this library's functions: what it means, and the path of the CPU, and of linear layers and
activations that are modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..add_norm import add_norm
from ..attention import attention, attention_varlen
from ..common.backend import would_use_triton
from ..ffn import ffn
from ..ffn.eager import activate
from ..rotary import rotary
from .arguments import Options, Tensors
from .neighbours import find, stacked, without_derivatives

Modules = Mapping[str, Callable[[Tensor], Tensor]]
"""What takes the place of a product, by the name of its weight without ``_weight``."""
NONE: Modules = {}


def encoder_layer(t: Tensors, o: Options, max_seqlen: int, modules: Modules = NONE) -> Tensor:
    """Each function checks its arguments and takes its own path; differentiable."""
    x = t.src
    if not o.norm_first:
        x = norm1(attention_part(x, x, t, o, max_seqlen, modules), x, t, o, o.projection_p)
        return norm2(feed_forward(x, t, o, modules), x, t, o, o.output_p)
    normed = x if o.no_norm1 else norm1(x, None, t, o)
    attended = attention_part(normed, normed, t, o, max_seqlen, modules)
    normed, x = norm2(attended, x, t, o, o.projection_p, return_sum=True)
    return feed_forward(normed, t, o, modules, o.output_p, x)


def decoder_layer(
    t: Tensors, o: Options, of_memory: Tensors, memory_options: Options, modules: Modules, memory_modules: Modules
) -> Tensor:
    """A layer that attends to a memory too, between its attention to itself and its feed-forward; `of_memory` has the
    memory as its source, and of its weights those of an attention and of the norm that goes with it as the first."""
    x, memory = t.src, of_memory.src
    if not o.norm_first:
        x = norm1(attention_part(x, x, t, o, 0, modules), x, t, o, o.projection_p)
        attended = attention_part(x, memory, of_memory, memory_options, 0, memory_modules)
        x = norm1(attended, x, of_memory, memory_options, memory_options.projection_p)
        return norm2(feed_forward(x, t, o, modules), x, t, o, o.output_p)
    normed = norm1(x, None, t, o)
    attended = attention_part(normed, normed, t, o, 0, modules)
    normed, x = norm1(attended, x, of_memory, memory_options, o.projection_p, return_sum=True)
    attended = attention_part(normed, memory, of_memory, memory_options, 0, memory_modules)
    normed, x = norm2(attended, x, t, o, memory_options.projection_p, return_sum=True)
    return feed_forward(normed, t, o, modules, o.output_p, x)


def norm1(x: Tensor, residual: Tensor | None, t: Tensors, o: Options, p: float = 0.0, return_sum: bool = False) -> Any:
    """The first norm, of ``residual + dropout(x)``."""
    return _norm(x, residual, t.norm1_weight, t.norm1_bias, o, o.eps1, p, return_sum)


def norm2(x: Tensor, residual: Tensor | None, t: Tensors, o: Options, p: float = 0.0, return_sum: bool = False) -> Any:
    """The second."""
    return _norm(x, residual, t.norm2_weight, t.norm2_bias, o, o.eps2, p, return_sum)


def _norm(x: Any, residual: Any, weight: Any, bias: Any, o: Options, eps: float, p: float, return_sum: bool) -> Any:
    norm = "rms" if o.rms else "layer"
    return add_norm(x, residual, weight, bias, norm=norm, eps=eps, dropout_p=p, return_sum=return_sum)


def attention_part(
    x: Tensor, source: Tensor, t: Tensors, o: Options, max_seqlen: int, modules: Modules = NONE
) -> Tensor:  # fmt: skip
    """Attention of the tokens `x` to those of `source`, which may be `x`, projected."""
    weights = [t.in_proj_weight, t.k_proj_weight, t.v_proj_weight]
    biases = [t.in_proj_bias, t.k_proj_bias, t.v_proj_bias]
    names = ["in_proj", "k_proj", "v_proj"]
    if t.k_proj_weight is None:
        names = names[:1]
    elif source is x and not modules and without_derivatives():
        (joined, weight), (joined_biases, bias) = find(weights), find(biases)
        if joined and joined_biases:
            weights, biases, names = [weight], [bias], names[:1]  # type: ignore[list-item]
    inputs = (x, source, source)
    found = [_linear(y, n, w, b, modules) for y, n, w, b in zip(inputs, names, weights, biases, strict=False)]
    heads = [each.unflatten(-1, (-1, o.head_dim)) for each in found]
    if len(heads) == 1:
        heads = list(heads[0].split((o.nhead, o.kv_nhead, o.kv_nhead), -2))
    query, key, value = heads
    out = attend(query, key, value, t, o, max_seqlen)
    return _linear(out, "out_proj", t.out_proj_weight, t.out_proj_bias, modules)


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
    x: Tensor, t: Tensors, o: Options, modules: Modules = NONE, p: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    """The block's output, dropped out with probability `p` and added to a residual, if there is one."""
    activation: Any = o.activation
    whole = isinstance(activation, str) and not modules.keys() & {"weight1", "up", "weight2"}
    if whole and (t.up_weight is None or would_use_triton(x)):
        stack: Any = stacked if without_derivatives() else _concatenated
        weight, bias = stack((t.weight1, t.up_weight)), stack((t.bias1, t.up_bias))
        return ffn(
            x, weight, bias, t.weight2, t.bias2, activation=activation, gated=o.gated, dropout_p=o.hidden_p,
            out_dropout_p=p, residual=residual, recompute="activation" if o.recompute else False,
        )  # type: ignore[arg-type]  # fmt: skip
    hidden = _linear(x, "weight1", t.weight1, t.bias1, modules)
    rest: Tensor | None = None
    if t.up_weight is not None:
        rest = _linear(x, "up", t.up_weight, t.up_bias, modules)
    elif o.gated:
        hidden, rest = hidden.chunk(2, -1)
    hidden = activate(hidden, None, 0.0, activation, False) if isinstance(activation, str) else activation(hidden)
    hidden = F.dropout(hidden if rest is None else hidden * rest, o.hidden_p)
    out = F.dropout(_linear(hidden, "weight2", t.weight2, t.bias2, modules), p)
    return out if residual is None else residual + out


def _concatenated(tensors: tuple[Any, Any]) -> Any:
    return tensors[0] if tensors[1] is None else torch.cat(tensors)


def _linear(x: Tensor, name: str, weight: Tensor | None, bias: Tensor | None, modules: Modules) -> Tensor:
    module = modules.get(name)
    return F.linear(x, weight, bias) if module is None else module(x)  # type: ignore[arg-type]
