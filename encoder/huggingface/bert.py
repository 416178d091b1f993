"""BERT and the families whose layers are the same but for the name."""

from __future__ import annotations

import importlib

from .common import PaddingFreeStates, fused_class
from .post_norm import Names, PostNormEmbeddings, PostNormLayer

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
}
"""Module names of transformers and the prefix of their classes."""

_NAMES = Names(
    attention="attention.self", projections=("query", "key", "value"), nhead="num_attention_heads",
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


def _families() -> dict[type, type]:
    replacements: dict[type, type] = {}
    for module_name, prefix in FAMILIES.items():
        module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
        layer, encoder = getattr(module, prefix + "Layer"), getattr(module, prefix + "Encoder")
        stock = {path: getattr(module, prefix + name) for path, name in _PARTS.items()}
        replacements[layer] = fused_class(PostNormLayer, layer, names=_NAMES, stock=stock)
        replacements[encoder] = fused_class(PaddingFreeStates, encoder, fused_layer=replacements[layer])
        if prefix in ("Bert", "Electra"):  # RoBERTa's kind has positions of its own, one of them without gradient
            embeddings = getattr(module, prefix + "Embeddings")
            replacements[embeddings] = fused_class(PostNormEmbeddings, embeddings)
    return replacements


REPLACEMENTS = _families()
"""Each class that `fuse` knows here, and the class that takes its place."""
