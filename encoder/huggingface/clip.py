"""CLIP and SigLIP: the layers of both towers, and the encoders, which leave the padding of texts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..padding import RealTokens
from .encoders import PaddingFreeStates
from .layers import Adapter
from .layout import Layout
from .stock import Family, Replaced

_LAYER = {
    "EncoderLayer": "layer_norm1 layer_norm2 mlp self_attn",
    "MLP mlp": "hidden_states: activation_fn fc1 fc2",
    "Attention self_attn": "dropout head_dim k_proj out_proj q_proj scale v_proj",
}
_OF_SIGLIP = {**_LAYER, "Attention self_attn": f"{_LAYER['Attention self_attn']} is_causal"}
_ENCODER = {"Encoder": "inputs_embeds attention_mask **kwargs:"}


class _Adapter(Adapter):
    """Of CLIP's layers."""

    layout = Layout(
        "self_attn", "q_proj k_proj v_proj out_proj", scale="scale", norm_first=True, norm1="layer_norm1",
        norm2="layer_norm2", weight1="mlp.fc1", activation="mlp.activation_fn", weight2="mlp.fc2",
    )  # fmt: skip
    served = frozenset({"hidden_states", "attention_mask", "is_causal"})


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


FAMILIES = {
    "clip": Family("CLIP", (
        Replaced("EncoderLayer", _Adapter, _LAYER),
        Replaced("Encoder", _FusedClipEncoder, _ENCODER, "EncoderLayer"),
    )),
    "siglip": Family("Siglip", (
        Replaced("EncoderLayer", _Adapter, _OF_SIGLIP),
        Replaced("Encoder", PaddingFreeStates, _ENCODER, "EncoderLayer", {
            "layer_list": "layers", "served": frozenset({"inputs_embeds", "attention_mask"}),
        }),
    )),
}  # fmt: skip
