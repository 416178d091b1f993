"""BART and Marian: encoders and decoders, post-norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter, FusedLayer, activation, at, causal_without_mask, parameters, why_not_linear
from .stock import Stock

FAMILIES = {"bart": "Bart", "marian": "Marian"}
"""Model types of transformers and the prefix of their classes. Their layers are the same but for the name."""

_ATTENTION = {"Attention": "hidden_states attention_mask **kwargs: "
                           "dropout head_dim k_proj out_proj q_proj scaling v_proj"}  # fmt: skip
_ENCODER_LAYER = {
    **_ATTENTION,
    "EncoderLayer": "hidden_states attention_mask **kwargs: activation_dropout activation_fn all clamp dropout fc1 fc2 "
                    "final_layer_norm finfo float16 isfinite max self_attn self_attn_layer_norm",
}  # fmt: skip
_DECODER_LAYER = {
    **_ATTENTION,
    "DecoderLayer": "hidden_states attention_mask encoder_hidden_states encoder_attention_mask **kwargs: "
                    "activation_dropout activation_fn dropout encoder_attn encoder_attn_layer_norm fc1 fc2 "
                    "final_layer_norm self_attn self_attn_layer_norm",
}  # fmt: skip
_ENCODER = "input_ids attention_mask **kwargs: create_bidirectional_mask dropout embed_positions embed_tokens layerdrop"
_ENCODERS = {
    "Bart": {"Encoder": f"{_ENCODER} rand layernorm_embedding"},
    "Marian": {"Encoder": f"{_ENCODER} rand embed_scale"},
}


def _weights(attention: str) -> dict[str, str]:
    """An attention's, with the norm that follows it."""
    return {
        "in_proj": f"{attention}.q_proj", "k_proj": f"{attention}.k_proj", "v_proj": f"{attention}.v_proj",
        "out_proj": f"{attention}.out_proj", "norm1": f"{attention}_layer_norm",
    }  # fmt: skip


class EncoderAdapter(Adapter):
    """Of encoder layers."""

    weights: ClassVar = {**_weights("self_attn"), "weight1": "fc1", "weight2": "fc2", "norm2": "final_layer_norm"}
    attention = "self_attn"
    served = frozenset({"hidden_states", "attention_mask", "is_causal"})

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention, training = at(layer, "self_attn"), layer.training
        return {
            "scale": attention.scaling, "activation": activation(layer.activation_fn),
            "eps1": at(layer, "self_attn_layer_norm").eps, "eps2": at(layer, "final_layer_norm").eps,
            "attn_dropout_p": attention.dropout if attention.training else 0.0,
            "dropout1_p": layer.dropout if training else 0.0,
            "dropout_p": layer.activation_dropout if training else 0.0,
            "dropout2_p": layer.dropout if training else 0.0,
        }  # fmt: skip

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        if out.dtype == torch.float16 and not out.isfinite().all():
            limit = torch.finfo(out.dtype).max - 1000
            out = out.clamp(-limit, limit)
        return out


class DecoderAdapter(EncoderAdapter):
    """Of decoder layers. With a cache the stock layer runs."""

    across: ClassVar = _weights("encoder_attn")
    served = frozenset(
        {"hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "is_causal"}
    )

    def why_not_more(self, layer: Any) -> str:
        linears = ((path, at(layer, path)) for name, path in self.across.items() if name != "norm1")
        return why_not_linear(linears) or why_not_plain(
            [("encoder_attn_layer_norm", at(layer, "encoder_attn_layer_norm"), nn.LayerNorm)]
        )

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        mask = given.get("encoder_attention_mask")
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        options = super().options_of_call(layer, x, given, call)
        source = given.get("encoder_hidden_states")
        if source is None:
            return options
        attention = at(layer, "encoder_attn")
        mask = given.get("encoder_attention_mask")
        weights, modules = parameters(layer, self.across)
        return options | {
            "memory": source, "across": weights, "across_modules": modules, "memory_mask": mask,
            "memory_is_causal": causal_without_mask(attention, mask, given), "memory_scale": attention.scaling,
            "memory_dropout_p": attention.dropout if attention.training else 0.0,
            "across_eps": at(layer, "encoder_attn_layer_norm").eps,
            "across_dropout_p": layer.dropout if layer.training else 0.0,
        }  # fmt: skip

    def run(self, layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        if "memory" not in options:
            return super().run(layer, x, options)
        weights, modules = parameters(layer, self.weights)
        return kernels.decoder_layer(x, weights, at(layer, "self_attn").num_heads, modules=modules, **options)

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        return out


class _FusedEncoder(PaddingFree):
    """An encoder; mixed into a subclass of the family's own."""

    layer_list = "layers"
    own_positions = True


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    attention = stock["Attention"]
    layer = stock.fused(FusedLayer, "EncoderLayer", _ENCODER_LAYER, adapter=EncoderAdapter({"self_attn": attention}))
    yield layer
    both = {"self_attn": attention, "encoder_attn": attention}
    yield stock.fused(FusedLayer, "DecoderLayer", _DECODER_LAYER, adapter=DecoderAdapter(both))
    yield stock.fused(_FusedEncoder, "Encoder", _ENCODERS[stock.prefix], fused_layer=layer)
