"""EuroBERT: rotary positions, RMSNorm, gated feed-forward, fewer heads of key and value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from .layers import FusedLayer, activation, at
from .rotary import ROTARY, RotaryAdapter, RotaryModel
from .stock import Stock

FAMILIES = {"eurobert": ""}

ATTENTION = "apply_rotary_pos_emb attention_dropout head_dim k_proj o_proj q_proj scaling v_proj"
MLP = "x: act_fn down_proj gate_proj up_proj"
_LAYER = {
    "EuroBertDecoderLayer": "hidden_states attention_mask position_ids position_embeddings **kwargs: "
                            "input_layernorm mlp post_attention_layernorm self_attn",
    "EuroBertAttention": f"hidden_states position_embeddings attention_mask **kwargs: {ATTENTION}",
    "EuroBertMLP": MLP,
    "EuroBertRMSNorm": "hidden_states: float32 mean pow rsqrt variance_epsilon weight",
    **ROTARY,
}  # fmt: skip
_MODEL = {
    "EuroBertModel": "input_ids attention_mask position_ids **kwargs: create_bidirectional_mask embed_tokens norm "
                     "num_hidden_layers rotary_emb",
}  # fmt: skip

PROJECTIONS = {
    "in_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.o_proj", "weight1": "mlp.gate_proj", "up": "mlp.up_proj", "weight2": "mlp.down_proj",
}  # fmt: skip


def options(layer: Any) -> dict[str, Any]:
    """Those of attention and of the feed-forward."""
    attention = at(layer, "self_attn")
    return {
        "gated": True, "scale": attention.scaling, "activation": activation(at(layer, "mlp").act_fn),
        "attn_dropout_p": attention.attention_dropout if attention.training else 0.0,
    }  # fmt: skip


class _Adapter(RotaryAdapter):
    """Of EuroBERT's layers."""

    weights: ClassVar = {**PROJECTIONS, "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    attention = "self_attn"

    def options_of(self, layer: Any) -> dict[str, Any]:
        return options(layer) | {
            "norm_first": True, "norm": "rms", "eps1": at(layer, "input_layernorm").variance_epsilon,
            "eps2": at(layer, "post_attention_layernorm").variance_epsilon,
        }  # fmt: skip


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of EuroBERT's."""
    parts = {"self_attn": stock["EuroBertAttention"], "mlp": stock["EuroBertMLP"]}
    adapter = _Adapter(parts, stock["EuroBertRMSNorm"])
    layer = stock.fused(FusedLayer, "EuroBertDecoderLayer", _LAYER, adapter=adapter)
    yield layer
    yield stock.fused(RotaryModel, "EuroBertModel", _MODEL, fused_layer=layer)
