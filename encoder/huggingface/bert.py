"""BERT and the families whose layers are the same but for the name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from .embeddings import PostNormEmbeddings
from .encoders import PaddingFreeStates
from .layers import Adapter, FusedLayer, activation, at, rate
from .stock import Stock

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
}
"""Model types of transformers and the prefix of their classes."""

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


class BertKind(Adapter):
    """Of layers of BERT's kind."""

    def head_dim_of(self, layer: Any) -> int:
        return at(layer, self.attention).attention_head_size  # type: ignore[no-any-return]

    def why_not_more(self, layer: Any) -> str:
        if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
            return "a decoder layer"
        holders = (layer, *(at(layer, path) for path in self.parts))
        if any(part.__dict__.get("chunk_size_feed_forward") for part in holders):
            return "the feed-forward is chunked"
        return ""


class _Adapter(BertKind):
    """Of BERT's layers."""

    weights: ClassVar = {
        "in_proj": "attention.self.query", "k_proj": "attention.self.key", "v_proj": "attention.self.value",
        "out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        "weight1": "intermediate.dense", "weight2": "output.dense", "norm2": "output.LayerNorm",
    }  # fmt: skip
    attention = "attention.self"
    dropouts = ("attention.self.dropout", "attention.output.dropout", "output.dropout")

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention, intermediate = at(layer, "attention"), at(layer, "intermediate")
        return {
            "scale": at(attention, "self").scaling, "activation": activation(intermediate.intermediate_act_fn),
            "eps1": at(attention, "output.LayerNorm").eps, "eps2": at(layer, "output.LayerNorm").eps,
            "attn_dropout_p": rate(attention, "self.dropout", at(attention, "self")),
            "dropout1_p": rate(attention, "output.dropout"), "dropout2_p": rate(layer, "output.dropout"),
        }  # fmt: skip


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    parts = {path: stock[name] for path, name in _PARTS.items()}
    layer = stock.fused(FusedLayer, "Layer", _LAYER, adapter=_Adapter(parts))
    yield layer
    encoder = {"Encoder": "hidden_states attention_mask **kwargs: layer"}
    yield stock.fused(PaddingFreeStates, "Encoder", encoder, fused_layer=layer)
    if stock.prefix in ("Bert", "Electra"):  # RoBERTa's kind has positions of its own, one of them without gradient
        yield stock.fused(PostNormEmbeddings, "Embeddings", EMBEDDINGS)
