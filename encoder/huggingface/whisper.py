"""Whisper: BART's layers, pre-norm, whose keys have no bias. There is no padding: each recording fills the row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .bart import DecoderAdapter, EncoderAdapter
from .layers import FusedLayer
from .stock import Stock

FAMILIES = {"whisper": "Whisper"}

_ATTENTION = {"Attention": "hidden_states attention_mask **kwargs: "
                           "dropout head_dim k_proj num_heads out_proj q_proj scaling v_proj"}  # fmt: skip
_COMMON = "activation_dropout activation_fn dropout fc1 fc2 final_layer_norm self_attn self_attn_layer_norm"
_ENCODER_LAYER = {
    **_ATTENTION,
    "EncoderLayer": f"hidden_states attention_mask **kwargs: {_COMMON} clamp finfo float16 max",
}
_DECODER_LAYER = {
    **_ATTENTION,
    "DecoderLayer": f"hidden_states attention_mask **kwargs: {_COMMON} encoder_attn encoder_attn_layer_norm",
}


class _Encoder(EncoderAdapter):
    """Of encoder layers."""

    def options_of(self, layer: Any) -> dict[str, Any]:
        return super().options_of(layer) | {"norm_first": True}

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        if out.dtype == torch.float16:
            limit = torch.finfo(out.dtype).max - 1000
            out = out.clamp(-limit, limit)
        return out


class _Decoder(DecoderAdapter):
    """Of decoder layers."""

    def options_of(self, layer: Any) -> dict[str, Any]:
        return super().options_of(layer) | {"norm_first": True}


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of Whisper's."""
    attention = stock["Attention"]
    yield stock.fused(FusedLayer, "EncoderLayer", _ENCODER_LAYER, adapter=_Encoder({"self_attn": attention}))
    both = {"self_attn": attention, "encoder_attn": attention}
    yield stock.fused(FusedLayer, "DecoderLayer", _DECODER_LAYER, adapter=_Decoder(both))
