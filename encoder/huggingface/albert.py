"""ALBERT: layers that share their weights, in groups, and embeddings narrower than they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from ..modules import why_not_plain
from .bert import EMBEDDINGS, BertKind
from .embeddings import PostNormEmbeddings
from .encoders import PaddingFreeStates
from .layers import FusedLayer, activation, at, rate
from .stock import Stock

FAMILIES = {"albert": "Albert"}

_LAYER = {
    "Layer": "hidden_states attention_mask **kwargs: attention full_layer_layer_norm",
    "Layer.ff_chunk": "attention_output: activation ffn ffn_output",
    "Attention": "hidden_states attention_mask **kwargs: LayerNorm attention_dropout attention_head_size dense key "
                 "output_dropout query scaling value",
}  # fmt: skip
_ENCODER = {
    "LayerGroup": "hidden_states attention_mask **kwargs: albert_layers",
    "Transformer": "hidden_states attention_mask **kwargs: "
                   "albert_layer_groups embedding_hidden_mapping_in num_hidden_groups num_hidden_layers",
}  # fmt: skip


class _Adapter(BertKind):
    """Of ALBERT's layers."""

    weights: ClassVar = {
        "in_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value",
        "out_proj": "attention.dense", "norm1": "attention.LayerNorm", "weight1": "ffn", "weight2": "ffn_output",
        "norm2": "full_layer_layer_norm",
    }  # fmt: skip
    attention = "attention"
    dropouts = ("attention.attention_dropout", "attention.output_dropout")

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention = at(layer, "attention")
        return {
            "scale": attention.scaling, "activation": activation(layer.activation),
            "eps1": at(attention, "LayerNorm").eps, "eps2": at(layer, "full_layer_layer_norm").eps,
            "attn_dropout_p": rate(attention, "attention_dropout", attention),
            "dropout1_p": rate(attention, "output_dropout"),
        }  # fmt: skip


class _FusedTransformer(PaddingFreeStates):
    """ALBERT's encoder; mixed into a subclass of it."""

    layer_group: ClassVar[type]

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why the encoder cannot run fused, or ""."""
        return cls._why_not_groups(encoder) or super().why_not_fused(encoder)

    @classmethod
    def layers_of(cls, encoder: Any) -> Iterable[Any]:
        """The layers of all groups, once each."""
        return [layer for group in encoder.albert_layer_groups for layer in group.albert_layers]

    def _ask_all(self) -> bool:
        return super()._ask_all() and not self._why_not_groups(self)

    @classmethod
    def _why_not_groups(cls, encoder: Any) -> str:
        return why_not_plain(
            (f"albert_layer_groups.{i}", group, cls.layer_group) for i, group in enumerate(encoder.albert_layer_groups)
        )


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of ALBERT's."""
    layer = stock.fused(FusedLayer, "Layer", _LAYER, adapter=_Adapter({"attention": stock["Attention"]}))
    yield layer
    group = stock["LayerGroup"]
    yield stock.fused(_FusedTransformer, "Transformer", _ENCODER, fused_layer=layer, layer_group=group)
    yield stock.fused(PostNormEmbeddings, "Embeddings", EMBEDDINGS)
