"""BERT and its kind: families whose layers are the same but for names, DistilBERT, and ALBERT, whose layers share their
weights, in groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from ..modules import why_not_plain
from .embeddings import PostNormEmbeddings
from .encoders import PaddingFreeStates
from .layers import Adapter
from .layout import Layout, at
from .stock import Family, Replaced, Stock

_LAYER = {
    "Layer": "attention",
    "Layer.feed_forward_chunk": "attention_output: intermediate output",
    "Attention attention": "output self",
    "SelfAttention attention.self": "attention_head_size dropout key query scaling value",
    "SelfOutput attention.output": "hidden_states input_tensor: LayerNorm dense dropout",
    "Intermediate intermediate": "hidden_states: dense intermediate_act_fn",
    "Output output": "hidden_states input_tensor: LayerNorm dense dropout",
}
_EMBEDDINGS = {
    "Embeddings": "input_ids token_type_ids position_ids: LayerNorm dropout position_embeddings position_ids "
                  "token_type_embeddings token_type_ids word_embeddings",
}  # fmt: skip
_LAYER_OF_DISTILBERT = {
    "TransformerBlock": "attention ffn output_layer_norm sa_layer_norm",
    "DistilBertSelfAttention attention": "attention_head_size dropout k_lin out_lin q_lin scaling v_lin",
    "FFN ffn": "input:",
    "FFN.ff_chunk": "input: activation dropout lin1 lin2",
}
_EMBEDDINGS_OF_DISTILBERT = {
    "Embeddings": "input_ids position_ids: LayerNorm dropout position_embeddings position_ids word_embeddings",
}
_LAYER_OF_ALBERT = {
    "Layer": "attention full_layer_layer_norm",
    "Layer.ff_chunk": "attention_output: activation ffn ffn_output",
    "Attention attention":
        "LayerNorm attention_dropout attention_head_size dense key output_dropout query scaling value",
}  # fmt: skip
_ENCODER_OF_ALBERT = {
    "LayerGroup": "albert_layers",
    "Transformer": "albert_layer_groups embedding_hidden_mapping_in num_hidden_groups num_hidden_layers",
}


class BertKind(Adapter):
    """Of layers of BERT's kind."""

    head_dim = "attention_head_size"

    def why_not_more(self, layer: Any) -> str:
        if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
            return "a decoder layer"
        holders = (layer, *(at(layer, path) for path in self.kinds))
        if any(part.__dict__.get("chunk_size_feed_forward") for part in holders):
            return "the feed-forward is chunked"
        return ""


class _Bert(BertKind):
    """Of BERT's layers."""

    layout = Layout(
        "attention.self", "query key value", out_proj="attention.output.dense", norm1="attention.output.LayerNorm",
        weight1="intermediate.dense", activation="intermediate.intermediate_act_fn", weight2="output.dense",
        norm2="output.LayerNorm", dropout1_p="attention.output.dropout.p", dropout2_p="output.dropout.p",
    )  # fmt: skip


class _DistilBert(BertKind):
    """Of DistilBERT's layers."""

    layout = Layout(
        "attention", "q_lin k_lin v_lin out_lin", norm1="sa_layer_norm", weight1="ffn.lin1",
        activation="ffn.activation", weight2="ffn.lin2", norm2="output_layer_norm", dropout2_p="ffn.dropout.p",
    )  # fmt: skip


class _Albert(BertKind):
    """Of ALBERT's layers."""

    layout = Layout(
        "attention", "query key value dense", attention_dropout="attention_dropout", norm1="attention.LayerNorm",
        weight1="ffn", activation="activation", weight2="ffn_output", norm2="full_layer_layer_norm",
        dropout1_p="attention.output_dropout.p",
    )  # fmt: skip


class _FusedAlbert(PaddingFreeStates):
    """ALBERT's encoder; mixed into a subclass of it."""

    stock: ClassVar[Stock]

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
        kind = cls.stock["LayerGroup"]
        return why_not_plain(
            (f"albert_layer_groups.{i}", group, kind) for i, group in enumerate(encoder.albert_layer_groups)
        )


_LAYERS = (
    Replaced("Layer", _Bert, _LAYER),
    Replaced("Encoder", PaddingFreeStates, {"Encoder": "layer"}, "Layer"),
)
_WITH_EMBEDDINGS = (*_LAYERS, Replaced("Embeddings", PostNormEmbeddings, _EMBEDDINGS))
FAMILIES = {
    "bert": Family("Bert", _WITH_EMBEDDINGS),
    "electra": Family("Electra", _WITH_EMBEDDINGS),
    # These have positions of their own, one of them without gradient.
    "roberta": Family("Roberta", _LAYERS),
    "xlm_roberta": Family("XLMRoberta", _LAYERS),
    "camembert": Family("Camembert", _LAYERS),
    "distilbert": Family("", (
        Replaced("TransformerBlock", _DistilBert, _LAYER_OF_DISTILBERT),
        Replaced("Transformer", PaddingFreeStates, {"Transformer": "layer"}, "TransformerBlock"),
        Replaced("Embeddings", PostNormEmbeddings, _EMBEDDINGS_OF_DISTILBERT),
    )),
    "albert": Family("Albert", (
        Replaced("Layer", _Albert, _LAYER_OF_ALBERT),
        Replaced("Transformer", _FusedAlbert, _ENCODER_OF_ALBERT, "Layer"),
        Replaced("Embeddings", PostNormEmbeddings, _EMBEDDINGS),
    )),
}  # fmt: skip
"""By model type of transformers."""
