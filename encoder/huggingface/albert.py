"""ALBERT: layers that share their weights, in groups, and embeddings narrower than they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.models.albert import modeling_albert as albert

from ..modules import why_not_plain
from .common import PaddingFreeStates, fused_class
from .post_norm import Names, PostNormEmbeddings, PostNormLayer

_NAMES = Names(
    attention="attention", projections=("query", "key", "value"), nhead="num_attention_heads",
    attention_dropout="attention.attention_dropout", out="attention.dense", dropout1="attention.output_dropout",
    norm1="attention.LayerNorm", up="ffn", activation="activation", down="ffn_output", dropout2=None,
    norm2="full_layer_layer_norm",
)  # fmt: skip
_LAYER = fused_class(PostNormLayer, albert.AlbertLayer, names=_NAMES, stock={"attention": albert.AlbertAttention})


class _FusedTransformer(PaddingFreeStates):
    """ALBERT's encoder; mixed into a subclass of it."""

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why the encoder cannot run fused, or ""."""
        return _why_not_groups(encoder) or super().why_not_fused(encoder)

    @classmethod
    def layers_of(cls, encoder: Any) -> Iterable[Any]:
        """The layers of all groups, once each."""
        return [layer for group in encoder.albert_layer_groups for layer in group.albert_layers]

    def _all_fused(self) -> bool:
        return super()._all_fused() and not _why_not_groups(self)


def _why_not_groups(encoder: Any) -> str:
    return why_not_plain(
        (f"albert_layer_groups.{i}", group, albert.AlbertLayerGroup)
        for i, group in enumerate(encoder.albert_layer_groups)
    )


REPLACEMENTS: dict[type, type] = {
    albert.AlbertEmbeddings: fused_class(PostNormEmbeddings, albert.AlbertEmbeddings),
    albert.AlbertLayer: _LAYER,
    albert.AlbertTransformer: fused_class(_FusedTransformer, albert.AlbertTransformer, fused_layer=_LAYER),
}
"""Each class that `fuse` knows here, and the class that takes its place."""
