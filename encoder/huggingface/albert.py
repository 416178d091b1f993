"""ALBERT: layers that share their weights, in groups, and embeddings narrower than they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from ..modules import why_not_plain
from .bert import EMBEDDINGS
from .common import PaddingFreeStates
from .post_norm import Names, PostNormEmbeddings, PostNormLayer
from .stock import Stock

FAMILIES = {"albert": "Albert"}

_NAMES = Names(
    attention="attention", projections=("query", "key", "value"),
    attention_dropout="attention.attention_dropout", out="attention.dense", dropout1="attention.output_dropout",
    norm1="attention.LayerNorm", up="ffn", activation="activation", down="ffn_output", dropout2=None,
    norm2="full_layer_layer_norm",
)  # fmt: skip
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

    def _all_fused(self) -> bool:
        return super()._all_fused() and not self._why_not_groups(self)

    @classmethod
    def _why_not_groups(cls, encoder: Any) -> str:
        return why_not_plain(
            (f"albert_layer_groups.{i}", group, cls.layer_group) for i, group in enumerate(encoder.albert_layer_groups)
        )


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of ALBERT's."""
    layer = stock.fused(PostNormLayer, "Layer", _LAYER, names=_NAMES, parts={"attention": stock["Attention"]})
    yield layer
    group = stock["LayerGroup"]
    yield stock.fused(_FusedTransformer, "Transformer", _ENCODER, fused_layer=layer, layer_group=group)
    yield stock.fused(PostNormEmbeddings, "Embeddings", EMBEDDINGS)
