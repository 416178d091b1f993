"""``attn_implementation="fusenc"``: attention on the fused kernels in any model that lets one choose it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .. import kernels
from .stock import collected

NAME = "fusenc"
_NOT_SERVED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cache", "s_aux")
"""Arguments that would change the result: of flattened batches, a paged cache, and sinks of attention."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fusenc.kernels.attention` as transformers' `AttentionInterface` calls it, under the name ``"fusenc"``.

    The same as ``"sdpa"``, and it takes `softcap` and gives the attention weights to a call that asks for them
    (``output_attentions=True``; without dropout and gradient). Masks are those of sdpa: windows come in them.

    Args:
        module: the attention; its `is_causal` counts where the call says nothing.
        query: ``[B, H, Lq, D]``.
        key: ``[B, Hk, Lk, D]``; Hk divides H.
        value: ``[B, Hk, Lk, Dv]``.
        attention_mask: bool (True takes part) or added to the scores, broadcastable to ``[B, H, Lq, Lk]``, or None.
        dropout: as `dropout_p` of `attention`.
        scaling: as `scale` of `attention`.
        is_causal: without a mask, a query attends to keys up to its position.
        position_bias: added to the scores, broadcastable to ``[B, H, Lq, Lk]``; differentiable.
        softcap: as in `attention`.
        kwargs: what else transformers hands on.

    Returns:
        ``[B, Lq, H, Dv]``, and the attention weights ``[B, H, Lq, Lk]`` or None.

    Raises:
        ValueError: a flattened batch, a paged cache or attention sinks; what `attention` raises.
    """
    for name in _NOT_SERVED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with attn_implementation={NAME!r}, got {kwargs[name]!r:.80}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    length = query.shape[2]
    causal = bool(is_causal) and attention_mask is None and length > 1
    if position_bias is not None and attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            position_bias = position_bias.masked_fill(~attention_mask, float("-inf"))
        else:
            position_bias = position_bias + attention_mask
    mask = attention_mask if position_bias is None else position_bias
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": key.shape[1] != query.shape[1], "softcap": softcap}
    out = kernels.attention(query, key, value, mask, dropout, causal, **options)
    weights = None
    if kwargs.get("output_attentions") or not collected().keys().isdisjoint(("attentions", "cross_attentions")):
        weights = kernels.attention_weights(query, key, mask, causal, **options).to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def attention_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask of `attention_forward`: that of sdpa, for transformers' `AttentionMaskInterface`.

    Raises:
        ValueError: the model's attention is not one that can be chosen, and would misread this mask.
    """
    if config is not None and not torch.compiler.is_compiling() and not _can_choose_attention(config.__class__):
        raise ValueError(
            f"attn_implementation={NAME!r}: {type(config).__name__} is of a model that computes attention in its own "
            'way; load it with "eager" (fusenc.fuse may know it)'
        )
    return sdpa_mask(*args, config=config, **kwargs)


@functools.cache
def _can_choose_attention(kind: type) -> bool:
    """False for the configuration of a model whose attention does not look at `attn_implementation`."""
    if kind not in MODEL_MAPPING:
        return True
    models = MODEL_MAPPING[kind]
    return any(
        model._supports_sdpa or model._supports_attention_backend
        for model in (models if isinstance(models, (list, tuple)) else [models])
    )


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)  # without it models would pass no mask at all
