"""CLIP: the layers of both towers, and the encoder, which leaves the padding of texts out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .common import PaddingFreeStates
from .pre_norm import PreNormLayer
from .stock import Stock

FAMILIES = {"clip": "CLIP"}

_NAMES = {
    "attention": "self_attn", "norm1": "layer_norm1", "norm2": "layer_norm2", "out": "out_proj",
    "scale": "scale", "dropout": "dropout",
}  # fmt: skip
_LAYER = {
    "EncoderLayer": "hidden_states attention_mask **kwargs: layer_norm1 layer_norm2 mlp self_attn",
    "Attention": "hidden_states attention_mask **kwargs: dropout head_dim k_proj out_proj q_proj scale v_proj",
    "MLP": "hidden_states: activation_fn fc1 fc2",
}


class _FusedEncoder(PaddingFreeStates):
    """CLIP's encoder; mixed into a subclass of it. That of texts is causal."""

    layer_list = "layers"
    served = frozenset({"inputs_embeds", "attention_mask", "is_causal"})

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

    def _asks_for_more(self, given: dict[str, Any]) -> bool:
        return not given.get("is_causal") or super()._asks_for_more(given)


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of CLIP's."""
    parts = {"attention": stock["Attention"], "mlp": stock["MLP"]}
    layer = stock.fused(PreNormLayer, "EncoderLayer", _LAYER, names=_NAMES, parts=parts)
    yield layer
    encoder = {"Encoder": "inputs_embeds attention_mask **kwargs:"}
    yield stock.fused(_FusedEncoder, "Encoder", encoder, fused_layer=layer)
