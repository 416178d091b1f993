"""DistilBERT: BERT with names of its own and without token types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from .bert import BertKind
from .embeddings import PostNormEmbeddings
from .encoders import PaddingFreeStates
from .layers import FusedLayer, activation, at, rate
from .stock import Stock

FAMILIES = {"distilbert": ""}

_EMBEDDINGS = {
    "Embeddings": "input_ids position_ids: LayerNorm dropout position_embeddings position_ids word_embeddings",
}
_LAYER = {
    "TransformerBlock": "hidden_states attention_mask **kwargs: attention ffn output_layer_norm sa_layer_norm",
    "DistilBertSelfAttention": "hidden_states attention_mask **kwargs: "
                               "attention_head_size dropout k_lin out_lin q_lin scaling v_lin",
    "FFN": "input:",
    "FFN.ff_chunk": "input: activation dropout lin1 lin2",
}  # fmt: skip


class _Adapter(BertKind):
    """Of DistilBERT's layers."""

    weights: ClassVar = {
        "in_proj": "attention.q_lin", "k_proj": "attention.k_lin", "v_proj": "attention.v_lin",
        "out_proj": "attention.out_lin", "norm1": "sa_layer_norm", "weight1": "ffn.lin1", "weight2": "ffn.lin2",
        "norm2": "output_layer_norm",
    }  # fmt: skip
    attention = "attention"
    dropouts = ("attention.dropout", "ffn.dropout")

    def options_of(self, layer: Any) -> dict[str, Any]:
        return {
            "scale": at(layer, "attention").scaling, "activation": activation(at(layer, "ffn").activation),
            "eps1": at(layer, "sa_layer_norm").eps, "eps2": at(layer, "output_layer_norm").eps,
            "attn_dropout_p": rate(layer, "attention.dropout", at(layer, "attention")),
            "dropout2_p": rate(layer, "ffn.dropout"),
        }  # fmt: skip


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of DistilBERT's."""
    parts = {"attention": stock["DistilBertSelfAttention"], "ffn": stock["FFN"]}
    layer = stock.fused(FusedLayer, "TransformerBlock", _LAYER, adapter=_Adapter(parts))
    yield layer
    encoder = {"Transformer": "hidden_states attention_mask **kwargs: layer"}
    yield stock.fused(PaddingFreeStates, "Transformer", encoder, fused_layer=layer)
    yield stock.fused(PostNormEmbeddings, "Embeddings", _EMBEDDINGS)
