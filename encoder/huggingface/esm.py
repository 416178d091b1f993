"""ESM-2, and ESM-1b, whose positions are absolute: BERT's parts, pre-norm."""

from __future__ import annotations

from typing import Any

from .bert import BertKind
from .encoders import PaddingFreeStates
from .layout import Layout, at
from .rotary import ROTARY, RotaryAdapter
from .stock import Family, Replaced

_ARGUMENTS = "hidden_states attention_mask position_embeddings **kwargs"
_LAYER = {
    "EsmLayer": f"{_ARGUMENTS}: AttributeError attention",
    "EsmLayer.feed_forward_chunk": "attention_output: LayerNorm intermediate output",
    "EsmAttention attention": f"{_ARGUMENTS}: LayerNorm output self",
    "EsmSelfAttention attention.self": f"{_ARGUMENTS}: apply_rotary_pos_emb attention_head_size dropout key "
                                       "position_embedding_type query scaling value",
    "EsmSelfOutput attention.output": "hidden_states input_tensor: dense dropout",
    "EsmIntermediate intermediate": "hidden_states: dense gelu",
    "EsmOutput output": "hidden_states input_tensor: dense dropout",
    "gelu": "x: erf math sqrt",
    **ROTARY,
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim: float rotate_half",
}  # fmt: skip
_ENCODER = {"EsmEncoder": f"{_ARGUMENTS}: BaseModelOutputWithCrossAttentions emb_layer_norm_after layer"}


class _Adapter(RotaryAdapter, BertKind):
    """Of ESM's layers."""

    layout = Layout(
        "attention.self", "query key value", out_proj="attention.output.dense", norm_first=True,
        norm1="attention.LayerNorm", norm2="LayerNorm", weight1="intermediate.dense", weight2="output.dense",
        dropout1_p="attention.output.dropout.p", dropout2_p="output.dropout.p",
    )  # fmt: skip

    def options_of(self, layer: Any) -> dict[str, Any]:
        options = super().options_of(layer)
        # The query is scaled before it is rotated, which is the same.
        options["scale"] *= at(layer, "attention.self").attention_head_size ** -0.5
        return options

    def rotates(self, layer: Any) -> bool:
        return at(layer, "attention.self").position_embedding_type == "rotary"  # type: ignore[no-any-return]


FAMILIES = {
    "esm": Family("", (
        Replaced("EsmLayer", _Adapter, _LAYER),
        Replaced("EsmEncoder", PaddingFreeStates, _ENCODER, "EsmLayer", {"served": RotaryAdapter.served}),
    )),
}  # fmt: skip
