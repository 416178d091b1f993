"""CLIP and SigLIP: the layers of both towers, and the encoders, which leave the padding of texts out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..padding import RealTokens
from .encoders import PaddingFreeStates
from .layers import Adapter, FusedLayer, activation, at
from .stock import Stock

FAMILIES = {"clip": "CLIP", "siglip": "Siglip"}

_LAYER = {
    "EncoderLayer": "hidden_states attention_mask **kwargs: layer_norm1 layer_norm2 mlp self_attn",
    "MLP": "hidden_states: activation_fn fc1 fc2",
}
_ATTENTION = "hidden_states attention_mask **kwargs: dropout head_dim k_proj out_proj q_proj scale v_proj"
_ENCODER = {"Encoder": "inputs_embeds attention_mask **kwargs:"}


class _Adapter(Adapter):
    """Of CLIP's layers."""

    weights: ClassVar = {
        "in_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
        "out_proj": "self_attn.out_proj", "norm1": "layer_norm1", "weight1": "mlp.fc1", "weight2": "mlp.fc2",
        "norm2": "layer_norm2",
    }  # fmt: skip
    attention = "self_attn"
    served = frozenset({"hidden_states", "attention_mask", "is_causal"})

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention = at(layer, "self_attn")
        return {
            "norm_first": True, "scale": attention.scale, "activation": activation(at(layer, "mlp").activation_fn),
            "eps1": at(layer, "layer_norm1").eps, "eps2": at(layer, "layer_norm2").eps,
            "attn_dropout_p": attention.dropout if attention.training else 0.0,
        }  # fmt: skip


class _FusedClipEncoder(PaddingFreeStates):
    """CLIP's encoder; mixed into a subclass of it. That of texts is causal."""

    layer_list = "layers"
    served = frozenset({"inputs_embeds", "attention_mask", "is_causal"})

    def _padding(self, inputs: Tensor, attention_mask: Any, given: dict[str, Any]) -> RealTokens | None:
        return super()._padding(inputs, attention_mask, given) if given.get("is_causal") else None

    def _real_tokens(self, inputs: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...] | None:
        batch, length = inputs.shape[:2]
        if attention_mask.shape != (batch, 1, length, length):
            return None
        dtype = attention_mask.dtype
        keep = attention_mask[:, 0, -1]  # the last query sees all that is real
        keep = keep if dtype == torch.bool else keep == 0
        causal = keep[:, None].expand(-1, length, -1).tril()
        if dtype != torch.bool:  # as eager attention adds it to the scores
            causal = torch.where(causal, 0.0, torch.finfo(dtype).min).to(dtype)
        return keep, (attention_mask[:, 0] == causal).all()


class _FusedSiglipEncoder(PaddingFreeStates):
    """SigLIP's encoder; mixed into a subclass of it."""

    layer_list = "layers"
    served = frozenset({"inputs_embeds", "attention_mask"})


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    parts, clip = {"self_attn": stock["Attention"], "mlp": stock["MLP"]}, stock.prefix == "CLIP"
    attention = {"Attention": _ATTENTION if clip else f"{_ATTENTION} is_causal"}
    layer = stock.fused(FusedLayer, "EncoderLayer", {**_LAYER, **attention}, adapter=_Adapter(parts))
    yield layer
    encoder: Any = _FusedClipEncoder if clip else _FusedSiglipEncoder
    yield stock.fused(encoder, "Encoder", _ENCODER, fused_layer=layer)
