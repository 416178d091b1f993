"""wav2vec 2.0 and HuBERT: post-norm layers, and pre-norm ones ("stable layer norm"), and their encoders, which leave
the padding of recordings out between their convolution over positions and their end."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .calls import Call
from .encoders import PaddingFree, PaddingFreeStates
from .layers import Adapter
from .layout import Layout
from .stock import Family, Replaced

_LAYER = "attention dropout feed_forward final_layer_norm layer_norm"
_PARTS = {
    "Attention attention": "dropout head_dim k_proj out_proj q_proj scaling v_proj",
    "FeedForward feed_forward":
        "hidden_states: intermediate_act_fn intermediate_dense intermediate_dropout output_dense output_dropout",
}  # fmt: skip
_ENCODER = (
    "create_bidirectional_mask dropout is_deepspeed_zero3_enabled is_fsdp_managed_module layer_norm layerdrop "
    "pos_conv_embed rand repeat"
)


class _Adapter(Adapter):
    """Of post-norm layers."""

    _layout = functools.partial(
        Layout, "attention", "q_proj k_proj v_proj out_proj", norm1="layer_norm", norm2="final_layer_norm",
        weight1="feed_forward.intermediate_dense", activation="feed_forward.intermediate_act_fn",
        weight2="feed_forward.output_dense", dropout1_p="dropout.p", dropout_p="feed_forward.intermediate_dropout.p",
        dropout2_p="feed_forward.output_dropout.p",
    )  # fmt: skip
    layout = _layout()

    def why_not_more(self, layer: Any) -> str:
        return "there is an adapter behind the layer" if getattr(layer, "adapter_layer", None) is not None else ""


class _StableAdapter(_Adapter):
    """Of layers with "stable layer norm"."""

    layout = _Adapter._layout(norm_first=True)


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


_REPLACED = (
    Replaced("EncoderLayer", _Adapter, {**_PARTS, "EncoderLayer": _LAYER}),
    Replaced("Encoder", _FusedEncoder, {"Encoder": _ENCODER}, "EncoderLayer"),
    Replaced(
        "EncoderLayerStableLayerNorm", _StableAdapter,
        {**_PARTS, "EncoderLayerStableLayerNorm": f"{_LAYER} adapter_layer"},
    ),
    Replaced(
        "EncoderStableLayerNorm", _FusedEncoder, {"EncoderStableLayerNorm": _ENCODER}, "EncoderLayerStableLayerNorm"
    ),
)  # fmt: skip
_CONVOLUTIONS = ("NoLayerNormConvLayer", "LayerNormConvLayer", "GroupNormConvLayer")
FAMILIES = {
    "wav2vec2": Family("Wav2Vec2", _REPLACED, _CONVOLUTIONS),
    "hubert": Family("Hubert", _REPLACED, _CONVOLUTIONS),
}
