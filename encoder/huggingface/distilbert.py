"""DistilBERT: BERT with names of its own and without token types."""

from __future__ import annotations

from collections.abc import Iterator

from .common import PaddingFreeStates
from .post_norm import Names, PostNormEmbeddings, PostNormLayer
from .stock import Stock

FAMILIES = {"distilbert": ""}

_NAMES = Names(
    attention="attention", projections=("q_lin", "k_lin", "v_lin"),
    attention_dropout="attention.dropout", out="attention.out_lin", dropout1=None, norm1="sa_layer_norm",
    up="ffn.lin1", activation="ffn.activation", down="ffn.lin2", dropout2="ffn.dropout", norm2="output_layer_norm",
)  # fmt: skip
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


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of DistilBERT's."""
    parts = {"attention": stock["DistilBertSelfAttention"], "ffn": stock["FFN"]}
    layer = stock.fused(PostNormLayer, "TransformerBlock", _LAYER, names=_NAMES, parts=parts)
    yield layer
    encoder = {"Transformer": "hidden_states attention_mask **kwargs: layer"}
    yield stock.fused(PaddingFreeStates, "Transformer", encoder, fused_layer=layer)
    yield stock.fused(PostNormEmbeddings, "Embeddings", _EMBEDDINGS)
