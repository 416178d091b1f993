"""ViT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from .layers import Adapter, FusedLayer, activation, at, rate
from .stock import Stock

FAMILIES = {"vit": "ViT"}

ATTENTION = "hidden_states attention_mask **kwargs: attention_dropout head_dim k_proj o_proj q_proj scaling v_proj"
_LAYER = {
    "Layer": "hidden_states attention_mask **kwargs: attention dropout layernorm_after layernorm_before mlp",
    "Attention": ATTENTION,
    "MLP": "hidden_states: activation_fn fc1 fc2",
}


class _Adapter(Adapter):
    """Of ViT's layers."""

    weights: ClassVar = {
        "in_proj": "attention.q_proj", "k_proj": "attention.k_proj", "v_proj": "attention.v_proj",
        "out_proj": "attention.o_proj", "norm1": "layernorm_before", "weight1": "mlp.fc1", "weight2": "mlp.fc2",
        "norm2": "layernorm_after",
    }  # fmt: skip
    attention = "attention"
    dropouts = ("dropout",)

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention = at(layer, "attention")
        return {
            "norm_first": True, "scale": attention.scaling, "activation": activation(at(layer, "mlp").activation_fn),
            "eps1": at(layer, "layernorm_before").eps, "eps2": at(layer, "layernorm_after").eps,
            "attn_dropout_p": attention.attention_dropout if attention.training else 0.0,
            "dropout1_p": rate(layer, "dropout"), "dropout2_p": rate(layer, "dropout"),
        }  # fmt: skip


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of ViT's."""
    parts = {"attention": stock["Attention"], "mlp": stock["MLP"]}
    yield stock.fused(FusedLayer, "Layer", _LAYER, adapter=_Adapter(parts))
