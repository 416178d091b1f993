"""BERT and the families whose layers are the same but for the name."""

from __future__ import annotations

from collections.abc import Iterator

from .common import PaddingFreeStates
from .post_norm import Names, PostNormEmbeddings, PostNormLayer
from .stock import Stock

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
}
"""Model types of transformers and the prefix of their classes."""

_NAMES = Names(
    attention="attention.self", projections=("query", "key", "value"),
    attention_dropout="attention.self.dropout", out="attention.output.dense", dropout1="attention.output.dropout",
    norm1="attention.output.LayerNorm", up="intermediate.dense", activation="intermediate.intermediate_act_fn",
    down="output.dense", dropout2="output.dropout", norm2="output.LayerNorm",
)  # fmt: skip
_PARTS = {
    "attention": "Attention",
    "attention.self": "SelfAttention",
    "attention.output": "SelfOutput",
    "intermediate": "Intermediate",
    "output": "Output",
}
EMBEDDINGS = {
    "Embeddings": "input_ids token_type_ids position_ids: LayerNorm dropout position_embeddings position_ids "
                  "token_type_embeddings token_type_ids word_embeddings",
}  # fmt: skip
_LAYER = {
    "Layer": "hidden_states attention_mask **kwargs: attention",
    "Layer.feed_forward_chunk": "attention_output: intermediate output",
    "Attention": "hidden_states attention_mask **kwargs: output self",
    "SelfAttention": "hidden_states attention_mask **kwargs: attention_head_size dropout key query scaling value",
    "SelfOutput": "hidden_states input_tensor: LayerNorm dense dropout",
    "Intermediate": "hidden_states: dense intermediate_act_fn",
    "Output": "hidden_states input_tensor: LayerNorm dense dropout",
}


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    parts = {path: stock[name] for path, name in _PARTS.items()}
    layer = stock.fused(PostNormLayer, "Layer", _LAYER, names=_NAMES, parts=parts)
    yield layer
    encoder = {"Encoder": "hidden_states attention_mask **kwargs: layer"}
    yield stock.fused(PaddingFreeStates, "Encoder", encoder, fused_layer=layer)
    if stock.prefix in ("Bert", "Electra"):  # RoBERTa's kind has positions of its own, one of them without gradient
        yield stock.fused(PostNormEmbeddings, "Embeddings", EMBEDDINGS)
