"""A Transformer decoder layer: an encoder layer that attends to a memory too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attention.op import check_mask
from ..common import backend, checks
from . import op, parts
from .arguments import LayerWeights, Tensors
from .parts import NONE, Modules

_DEFAULTS: dict[str, Any] = {
    "batch_first": True, "norm_first": False, "norm": "layer", "activation": "gelu", "gated": False, "eps1": 1e-5,
    "eps2": 1e-5, "scale": None, "is_causal": False, "window": None, "softcap": None, "no_norm1": False,
    "recompute": False, "attn_dropout_p": 0.0, "dropout1_p": 0.0, "dropout_p": 0.0, "dropout2_p": 0.0,
}  # fmt: skip
"""In the order in which the operation takes them."""


def decoder_layer(
    src: Tensor, weights: LayerWeights, nhead: int, memory: Tensor, across: LayerWeights, *,
    memory_mask: Tensor | None = None, memory_is_causal: bool = False, memory_scale: float | None = None,
    memory_dropout_p: float = 0.0, across_eps: float = 1e-5, across_dropout_p: float = 0.0, modules: Modules = NONE,
    across_modules: Modules = NONE, attn_mask: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """`encoder_layer` with an attention to `memory` between the other one and the feed-forward, part by part.

    Args:
        src: as in `encoder_layer`, not packed.
        memory: ``[B, M, E]``, or ``[M, B, E]``.
        across: the parameters of the attention to `memory`, with weights of their own for key and value, and in the
            place of the first norm the one that goes with it.
        memory_mask, memory_is_causal, memory_scale, memory_dropout_p: of that attention, as in `attention`.
        across_eps: of that norm.
        across_dropout_p: of an element of that attention's projection.
        across_modules: as `modules`.
        options: of `encoder_layer`, but for those of positions.

    Returns:
        A tensor of the shape of `src`; differentiable.

    Raises:
        TypeError: an option that is not known; as `encoder_layer`.
        ValueError: as `encoder_layer` and `attention`.

    Example:
        >>> import torch, fusenc
        >>> from fusenc.kernels import LayerWeights, decoder_layer
        >>> torch_layer = torch.nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        >>> norm1, norm2, norm3 = torch_layer.norm1, torch_layer.norm2, torch_layer.norm3
        >>> up, down = torch_layer.linear1, torch_layer.linear2
        >>> def of(attn, norm):
        ...     (q, k, v), (q_bias, k_bias, v_bias) = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        ...     return LayerWeights(
        ...         q, q_bias, attn.out_proj.weight, attn.out_proj.bias, norm.weight, norm.bias, up.weight, up.bias,
        ...         down.weight, down.bias, norm3.weight, norm3.bias, k, k_bias, v, v_bias)
        >>> weights, across = of(torch_layer.self_attn, norm1), of(torch_layer.multihead_attn, norm2)
        >>> x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
        >>> torch.allclose(decoder_layer(x, weights, 4, memory, across), torch_layer(x, memory), atol=1e-5)
        True
    """
    if unknown := options.keys() - _DEFAULTS.keys():
        raise TypeError(f"decoder_layer: unexpected arguments {', '.join(sorted(unknown))}")
    if options.get("no_norm1"):
        checks.fail_value("no_norm1", "False in a decoder layer", True)
    for name, of in (("weights", weights), ("across", across)):
        if not isinstance(of, LayerWeights):
            checks.fail_type(name, "a LayerWeights", of)
    if across.k_proj_weight is None or across.v_proj_weight is None:
        checks.fail_value("across", "weights of their own for key and value, k_proj_weight and v_proj_weight", None)
    if memory_scale is not None and not memory_scale > 0.0:
        checks.fail_value("memory_scale", "a number above 0, or None", memory_scale)
    checks.not_negative("across_eps", across_eps)
    for name, p in (("memory_dropout_p", memory_dropout_p), ("across_dropout_p", across_dropout_p)):
        checks.dropout_probability(p, name)
    op.require_modules(modules, weights)
    op.require_modules(across_modules, across)
    given = tuple({**_DEFAULTS, **options}.values())
    t, o = op.checked((src, *weights, attn_mask, None, None, None, None, None), (nhead, *given), 0)
    autocast = backend.autocast_enabled(src)
    checks.floating_tensor("memory", memory)
    if not autocast:
        checks.same_kind("memory", memory, "src", src)
    batch = 0 if o.batch_first else 1
    if memory.dim() != 3 or memory.shape[batch] != src.shape[batch] or memory.shape[2] != src.shape[2]:
        checks.fail_value("memory", f"the batch and the width of src, {tuple(src.shape)}", memory)
    others = {n: getattr(weights, n) for n in ("weight1", "bias1", "weight2", "bias2", "up_weight", "up_bias")}
    op.check_weights(src, across._replace(**others), nhead, o.gated, autocast)
    if memory_mask is not None:
        full = (src.shape[batch], nhead, src.shape[1 - batch], memory.shape[1 - batch])
        check_mask(memory_mask, src, full, "memory_mask")
    of_memory = Tensors(memory, *across, memory_mask, None, None, None, None, None)
    memory_options = o._replace(
        scale=o.scale if memory_scale is None else float(memory_scale), is_causal=memory_is_causal, left=-1, right=-1,
        softcap=0.0, attention_p=memory_dropout_p, projection_p=across_dropout_p, eps1=across_eps,
    )  # fmt: skip
    return parts.decoder_layer(t, o, of_memory, memory_options, modules, across_modules)
