"""A Transformer decoder layer: an encoder layer that attends to a memory too."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor

from ..attention.api import Window
from ..attention.op import check_mask, of_mask
from ..common import checks
from ..common.operator import Operation, Prepare
from . import op, parts
from .arguments import LayerWeights, Options, Tensors
from .parts import NONE, Modules

_WEIGHTS = len(LayerWeights._fields)
_NO_OTHERS = (None,) * 5
"""Relative bias, a copy of the source, rotary tables and starts, which a decoder layer does not take."""
_OF_FEED_FORWARD = (
    "weight1", "bias1", "weight2", "bias2", "up_weight", "up_bias", "norm2_weight", "norm2_bias", "post_norm2_weight",
    "post_norm2_bias",
)  # fmt: skip


def decoder_layer(
    src: Tensor, weights: LayerWeights, nhead: int, memory: Tensor, across: LayerWeights, *,
    memory_mask: Tensor | None = None, memory_is_causal: bool = False, memory_scale: float | None = None,
    memory_dropout_p: float = 0.0, across_eps: float = 1e-5, across_dropout_p: float = 0.0, modules: Modules = NONE,
    across_modules: Modules = NONE, attn_mask: Tensor | None = None, is_causal: bool = False, batch_first: bool = True,
    norm_first: bool = False, norm: str = "layer", activation: str | Callable[[Tensor], Tensor] = "gelu",
    gated: bool = False, eps1: float = 1e-5, eps2: float = 1e-5, scale: float | None = None,
    window: Window | None = None, softcap: float | None = None, attn_dropout_p: float = 0.0, dropout1_p: float = 0.0,
    dropout_p: float = 0.0, dropout2_p: float = 0.0, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """`encoder_layer` with an attention to `memory` between the other one and the feed-forward, part by part.

    Args:
        src: as in `encoder_layer`, not packed.
        memory: ``[B, M, E]``, or ``[M, B, E]``.
        across: the parameters of the attention to `memory`, with the norm that goes with it as the first; its
            feed-forward and second norm are not read and may be None. `in_proj_weight` is the weight of query, key and
            value, as in `weights`, and those of the memory take one product. Or it is the query's, with `k_proj_weight`
            and `v_proj_weight` beside it, and they take one each (in inference one, if all three lie together).
        memory_mask, memory_is_causal, memory_scale, memory_dropout_p: of that attention, as in `attention`.
        across_eps: of that norm.
        across_dropout_p: of an element of that attention's projection.
        across_modules: as `modules`; ``"in_proj"`` beside weights of their own for key and value.
        attn_mask, others: as in `encoder_layer`.

    Returns:
        A tensor of the shape of `src`; differentiable.

    Raises:
        TypeError: as `encoder_layer`.
        ValueError: as `encoder_layer` and `attention`.

    Example:
        >>> import torch, fusenc
        >>> from fusenc.kernels import LayerWeights, decoder_layer
        >>> torch_layer = torch.nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        >>> norm1, norm2, norm3 = torch_layer.norm1, torch_layer.norm2, torch_layer.norm3
        >>> up, down = torch_layer.linear1, torch_layer.linear2
        >>> def of(attn, norm):
        ...     return LayerWeights(
        ...         attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias, norm.weight,
        ...         norm.bias, up.weight, up.bias, down.weight, down.bias, norm3.weight, norm3.bias)
        >>> weights, across = of(torch_layer.self_attn, norm1), of(torch_layer.multihead_attn, norm2)
        >>> x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
        >>> torch.allclose(decoder_layer(x, weights, 4, memory, across), torch_layer(x, memory), atol=1e-5)
        True
    """
    for name, of in (("weights", weights), ("across", across)):
        if not isinstance(of, LayerWeights):
            checks.fail_type(name, "a LayerWeights", of)
    options = (
        nhead, batch_first, norm_first, norm, activation, gated, eps1, eps2, scale, is_causal, window, softcap, False,
        recompute, attn_dropout_p, dropout1_p, dropout_p, dropout2_p, memory_is_causal, memory_scale, memory_dropout_p,
        across_eps, across_dropout_p,
    )  # fmt: skip
    tensors = (src, *weights, memory, *across, attn_mask, memory_mask)
    sizes: Any = modules or NONE, across_modules or NONE, int(not batch_first)
    return _DECODER_LAYER(tensors, options, sizes)  # type: ignore[no-any-return]


class _Options(NamedTuple):
    """The numbers of a call."""

    of_layer: Options
    of_memory: Options


def _signature(src: Tensor, *rest: Any) -> Hashable:
    """What the checks depend on; the parts have signatures of their own."""
    *weights, attn_mask, memory_mask, modules, across_modules, batch_second = rest
    shape, memory, masks = src.shape, weights.pop(_WEIGHTS), []
    batch, length = shape[batch_second], shape[1 - batch_second]
    for mask, keys in ((attn_mask, length), (memory_mask, memory.shape[1 - batch_second])):
        if mask is not None:
            heads = mask.shape[-3] if len(mask.shape) > 2 else 1
            masks.append((heads, of_mask(mask, (batch, heads, length, keys))))
    return (
        shape[-1], len(shape), src.dtype, src.device, memory.shape[-1], len(memory.shape), memory.dtype, memory.device,
        memory.shape[batch_second] == batch, attn_mask is None, tuple(masks), tuple(modules), tuple(across_modules),
        tuple([None if t is None else (t.shape, t.dtype, t.device) for t in weights]),
    )  # fmt: skip


def _check(tensors: Any, options: Any, sizes: Any, autocast: bool) -> tuple[Prepare, _Options]:
    src, *rest, attn_mask, memory_mask = tensors
    weights, memory, across = LayerWeights(*rest[:_WEIGHTS]), rest[_WEIGHTS], LayerWeights(*rest[_WEIGHTS + 1 :])
    *given, is_causal, scale, dropout_p, eps, projection_p = options
    modules, across_modules, _ = sizes
    if scale is not None and not (isinstance(scale, (int, float)) and scale > 0.0):
        checks.fail_value("memory_scale", "a number above 0, or None", scale)
    checks.not_negative("across_eps", eps)
    for name, p in (("memory_dropout_p", dropout_p), ("across_dropout_p", projection_p)):
        checks.dropout_probability(p, name)
    _, o = op.checked((src, *weights, attn_mask, *_NO_OTHERS), tuple(given), 0)
    checks.floating_tensor("memory", memory)
    if memory.device != src.device:
        checks.fail_value("memory", f"device {src.device}, that of src", memory)
    if not autocast:
        checks.same_kind("memory", memory, "src", src)
    batch = 0 if o.batch_first else 1
    if memory.dim() != 3 or memory.shape[batch] != src.shape[batch] or memory.shape[2] != src.shape[2]:
        checks.fail_value("memory", f"the batch and the width of src, {tuple(src.shape)}", memory)
    if (across.post_norm1_weight is None) != (weights.post_norm1_weight is None):
        expected = "a tensor just where weights.post_norm1_weight is one"
        checks.fail_value("across.post_norm1_weight", expected, across.post_norm1_weight)
    others = {name: getattr(weights, name) for name in _OF_FEED_FORWARD}
    head_dim, kv_nhead = op.check_weights(src, across._replace(**others), o.nhead, o.gated, autocast, "across")
    op.require_modules(modules, weights)
    op.require_modules(across_modules, across)
    if "in_proj" in across_modules and across.k_proj_weight is None:
        checks.fail_value("across_modules", "no in_proj without weights of their own for key and value", "in_proj")
    if memory_mask is not None:
        full = (src.shape[batch], o.nhead, src.shape[1 - batch], memory.shape[1 - batch])
        check_mask(memory_mask, src, full, "memory_mask")
    return (), _Options(o, o._replace(
        kv_nhead=kv_nhead, head_dim=head_dim, scale=head_dim**-0.5 if scale is None else float(scale),
        is_causal=bool(is_causal), left=-1, right=-1, softcap=0.0, attention_p=float(dropout_p),
        projection_p=float(projection_p), eps1=float(eps),
    ))  # fmt: skip


def _parts(t: Any, o: _Options, autocast: bool) -> Callable[..., Tensor]:
    def run(src: Tensor, *rest: Any) -> Tensor:
        *weights, attn_mask, memory_mask, modules, across_modules, _ = rest
        of_layer = Tensors(src, *weights[:_WEIGHTS], attn_mask, *_NO_OTHERS)  # type: ignore[call-arg]
        of_memory = Tensors(*weights[_WEIGHTS:], memory_mask, *_NO_OTHERS)  # type: ignore[call-arg]
        return parts.encoder_layer(of_layer, o.of_layer, 0, modules, (of_memory, o.of_memory, across_modules))

    return run


_DECODER_LAYER = Operation(
    "decoder_layer", collections.namedtuple("_Tensors", (
        "src", *LayerWeights._fields, "memory", *(f"across_{name}" for name in LayerWeights._fields), "attn_mask",
        "memory_mask",
    )),
    _Options, differentiable=0, outputs=1, results=1, signature=_signature, check=_check, instead=_parts,
    sizes=("modules", "across_modules", "batch_second"),
)  # fmt: skip
"""All calls run part by part; what is kept of a signature is that its arguments are good."""
