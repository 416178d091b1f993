"""DistilBERT: BERT with names of its own and without token types."""

from __future__ import annotations

from transformers.models.distilbert import modeling_distilbert as distilbert

from .common import PaddingFreeStates, fused_class
from .post_norm import Names, PostNormEmbeddings, PostNormLayer

_NAMES = Names(
    attention="attention", projections=("q_lin", "k_lin", "v_lin"), nhead="n_heads",
    attention_dropout="attention.dropout", out="attention.out_lin", dropout1=None, norm1="sa_layer_norm",
    up="ffn.lin1", activation="ffn.activation", down="ffn.lin2", dropout2="ffn.dropout", norm2="output_layer_norm",
)  # fmt: skip
_LAYER = fused_class(
    PostNormLayer, distilbert.TransformerBlock, names=_NAMES,
    stock={"attention": distilbert.DistilBertSelfAttention, "ffn": distilbert.FFN},
)  # fmt: skip

REPLACEMENTS: dict[type, type] = {
    distilbert.Embeddings: fused_class(
        PostNormEmbeddings, distilbert.Embeddings, arguments=("inputs_embeds", "position_ids")
    ),
    distilbert.TransformerBlock: _LAYER,
    distilbert.Transformer: fused_class(PaddingFreeStates, distilbert.Transformer, fused_layer=_LAYER),
}
"""Each class that `fuse` knows here, and the class that takes its place."""
