"""ViT."""

from __future__ import annotations

from collections.abc import Iterator

from .pre_norm import PreNormLayer
from .stock import Stock

FAMILIES = {"vit": "ViT"}

_NAMES = {
    "attention": "attention", "norm1": "layernorm_before", "norm2": "layernorm_after", "out": "o_proj",
    "scale": "scaling", "dropout": "attention_dropout",
}  # fmt: skip
_LAYER = {
    "Layer": "hidden_states attention_mask **kwargs: attention dropout layernorm_after layernorm_before mlp",
    "Attention": "hidden_states attention_mask **kwargs: "
                 "attention_dropout head_dim k_proj o_proj q_proj scaling v_proj",
    "MLP": "hidden_states: activation_fn fc1 fc2",
}  # fmt: skip


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of ViT's."""
    parts = {"attention": stock["Attention"], "mlp": stock["MLP"]}
    yield stock.fused(PreNormLayer, "Layer", _LAYER, names=_NAMES, parts=parts)
