"""wav2vec 2.0 and HuBERT: post-norm layers, and pre-norm ones ("stable layer norm"), and their encoders, which leave
the padding of recordings out between their convolution over positions and their end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from .calls import Call
from .encoders import PaddingFree, PaddingFreeStates
from .layers import Adapter, FusedLayer, activation, at, rate
from .stock import Stock

FAMILIES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}
"""Model types of transformers and the prefix of their classes. Their layers are the same but for the name."""

PLAIN = ("NoLayerNormConvLayer", "LayerNormConvLayer", "GroupNormConvLayer")
"""The convolutions of the feature encoder."""

_COMMON = "hidden_states attention_mask **kwargs: attention dropout feed_forward final_layer_norm layer_norm"
_PARTS = {
    "Attention": "hidden_states attention_mask **kwargs: dropout head_dim k_proj out_proj q_proj scaling v_proj",
    "FeedForward": "hidden_states: intermediate_act_fn intermediate_dense intermediate_dropout output_dense "
                   "output_dropout",
}  # fmt: skip
_ENCODER = (
    "hidden_states attention_mask **kwargs: create_bidirectional_mask dropout is_deepspeed_zero3_enabled "
    "is_fsdp_managed_module layer_norm layerdrop pos_conv_embed rand repeat"
)


class _Adapter(Adapter):
    """Of layers of either kind."""

    weights: ClassVar = {
        "in_proj": "attention.q_proj", "k_proj": "attention.k_proj", "v_proj": "attention.v_proj",
        "out_proj": "attention.out_proj", "norm1": "layer_norm", "weight1": "feed_forward.intermediate_dense",
        "weight2": "feed_forward.output_dense", "norm2": "final_layer_norm",
    }  # fmt: skip
    attention = "attention"
    dropouts = ("dropout", "feed_forward.intermediate_dropout", "feed_forward.output_dropout")
    norm_first = False

    def why_not_more(self, layer: Any) -> str:
        return "there is an adapter behind the layer" if getattr(layer, "adapter_layer", None) is not None else ""

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention, feed_forward = at(layer, "attention"), at(layer, "feed_forward")
        return {
            "norm_first": self.norm_first, "scale": attention.scaling,
            "activation": activation(feed_forward.intermediate_act_fn),
            "eps1": at(layer, "layer_norm").eps, "eps2": at(layer, "final_layer_norm").eps,
            "attn_dropout_p": attention.dropout if attention.training else 0.0,
            "dropout1_p": rate(layer, "dropout"), "dropout_p": rate(feed_forward, "intermediate_dropout"),
            "dropout2_p": rate(feed_forward, "output_dropout"),
        }  # fmt: skip


class _PreNorm(_Adapter):
    """Of layers with "stable layer norm"."""

    norm_first = True


class _FusedEncoder(PaddingFreeStates):
    """An encoder of either kind; mixed into a subclass of the family's own. Its mask is ``[B, L]``, and it reads that
    itself too: the convolution needs 0 at the padding."""

    layer_list = "layers"
    _real_tokens = PaddingFree._real_tokens

    def _plan(self, inputs: Tensor, given: dict[str, Any], flattened: dict[str, Any]) -> tuple[Any, Call] | None:
        if flattened:
            return None  # the convolution would mix the recordings
        plan = super()._plan(inputs, given, flattened)
        return None if plan is None else (given.get("attention_mask"), plan[1])


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    parts = {"attention": stock["Attention"], "feed_forward": stock["FeedForward"]}
    for name, more, adapter in (("", "", _Adapter), ("StableLayerNorm", " adapter_layer", _PreNorm)):
        layer_needs = {**_PARTS, f"EncoderLayer{name}": _COMMON + more}
        layer = stock.fused(FusedLayer, f"EncoderLayer{name}", layer_needs, adapter=adapter(parts))
        yield layer
        yield stock.fused(_FusedEncoder, f"Encoder{name}", {f"Encoder{name}": _ENCODER}, fused_layer=layer)
