"""ESM-2, and ESM-1b, whose positions are absolute: BERT's parts, pre-norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from ..packing import PaddedPacking
from .bert import BertKind
from .calls import Call
from .encoders import PaddingFreeStates
from .layers import FusedLayer, at, rate
from .rotary import ROTARY, RotaryAdapter, RotaryCall
from .stock import Stock

FAMILIES = {"esm": ""}

_PARTS = {
    "attention": "EsmAttention",
    "attention.self": "EsmSelfAttention",
    "attention.output": "EsmSelfOutput",
    "intermediate": "EsmIntermediate",
    "output": "EsmOutput",
}
_ARGUMENTS = "hidden_states attention_mask position_embeddings **kwargs"
_LAYER = {
    "EsmLayer": f"{_ARGUMENTS}: AttributeError attention",
    "EsmLayer.feed_forward_chunk": "attention_output: LayerNorm intermediate output",
    "EsmAttention": f"{_ARGUMENTS}: LayerNorm output self",
    "EsmSelfAttention": f"{_ARGUMENTS}: apply_rotary_pos_emb attention_head_size dropout key position_embedding_type "
                     "query scaling value",
    "EsmSelfOutput": "hidden_states input_tensor: dense dropout",
    "EsmIntermediate": "hidden_states: dense gelu",
    "EsmOutput": "hidden_states input_tensor: dense dropout",
    "gelu": "x: erf math sqrt",
    **ROTARY,
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim: float rotate_half",
}  # fmt: skip
_ENCODER = {"EsmEncoder": f"{_ARGUMENTS}: BaseModelOutputWithCrossAttentions emb_layer_norm_after layer"}


class _Adapter(RotaryAdapter, BertKind):
    """Of ESM's layers."""

    weights: ClassVar = {
        "in_proj": "attention.self.query", "k_proj": "attention.self.key", "v_proj": "attention.self.value",
        "out_proj": "attention.output.dense", "norm1": "attention.LayerNorm", "weight1": "intermediate.dense",
        "weight2": "output.dense", "norm2": "LayerNorm",
    }  # fmt: skip
    attention = "attention.self"
    dropouts = ("attention.output.dropout", "output.dropout")

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention = at(layer, "attention.self")
        return {
            # The query is scaled before it is rotated, which is the same.
            "norm_first": True, "scale": attention.scaling * attention.attention_head_size**-0.5, "activation": "gelu",
            "eps1": at(layer, "attention.LayerNorm").eps, "eps2": at(layer, "LayerNorm").eps,
            "attn_dropout_p": attention.dropout if attention.training else 0.0,
            "dropout1_p": rate(layer, "attention.output.dropout"), "dropout2_p": rate(layer, "output.dropout"),
        }  # fmt: skip

    def rotates(self, layer: Any) -> bool:
        return at(layer, "attention.self").position_embedding_type == "rotary"  # type: ignore[no-any-return]


class _FusedEncoder(PaddingFreeStates):
    """ESM's encoder; mixed into a subclass of it."""

    served = frozenset({"hidden_states", "attention_mask", "position_embeddings"})

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        return RotaryCall(packing)


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of ESM's."""
    parts = {path: stock[name] for path, name in _PARTS.items()}
    layer = stock.fused(FusedLayer, "EsmLayer", _LAYER, adapter=_Adapter(parts))
    yield layer
    yield stock.fused(_FusedEncoder, "EsmEncoder", _ENCODER, fused_layer=layer)
