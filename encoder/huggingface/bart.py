"""BART and Marian: encoders and decoders, post-norm; and Whisper's, pre-norm, whose keys have no bias. Whisper has no
padding: each recording fills the row."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter, causal_without_mask
from .layout import Layout, at
from .stock import Family, Replaced

_ATTENTION = "dropout head_dim k_proj out_proj q_proj scaling v_proj"
_NAMES = "activation_dropout activation_fn dropout fc1 fc2 final_layer_norm self_attn self_attn_layer_norm"
_DECODER_ARGUMENTS = "hidden_states attention_mask encoder_hidden_states encoder_attention_mask **kwargs"
_DECODER_NAMES = f"{_NAMES} encoder_attn encoder_attn_layer_norm"
_ENCODER_LAYER = {
    "Attention self_attn": _ATTENTION,
    "EncoderLayer": f"{_NAMES} all clamp finfo float16 isfinite max",
}
_DECODER_LAYER = {
    "Attention self_attn encoder_attn": _ATTENTION,
    "DecoderLayer": f"{_DECODER_ARGUMENTS}: {_DECODER_NAMES}",
}
_ENCODER = (
    "input_ids attention_mask **kwargs: create_bidirectional_mask dropout embed_positions embed_tokens layerdrop rand"
)
_ENCODER_LAYER_OF_WHISPER = {
    "Attention self_attn": f"{_ATTENTION} num_heads",
    "EncoderLayer": f"{_NAMES} clamp finfo float16 max",
}
_DECODER_LAYER_OF_WHISPER = {
    "Attention self_attn encoder_attn": f"{_ATTENTION} num_heads",
    "DecoderLayer": _DECODER_NAMES,
}

_layout = functools.partial(
    Layout, "self_attn", "q_proj k_proj v_proj out_proj", norm1="self_attn_layer_norm", norm2="final_layer_norm",
    weight1="fc1", activation="activation_fn", weight2="fc2", dropout1_p="dropout", dropout_p="activation_dropout",
    dropout2_p="dropout",
)  # fmt: skip
_ACROSS = {
    "scale": "memory_scale", "attn_dropout_p": "memory_dropout_p", "eps1": "across_eps",
    "dropout1_p": "across_dropout_p",
}  # fmt: skip
"""Options of cross-attention, by their names in a `Layout`."""


class _Encoder(Adapter):
    """Of encoder layers."""

    layout = _layout()
    served = frozenset({"hidden_states", "attention_mask", "is_causal"})

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        return _clamped(out) if out.dtype == torch.float16 and not out.isfinite().all() else out


class DecoderAdapter(Adapter):
    """Of decoder layers. With a cache the stock layer runs."""

    layout = _layout()
    across: ClassVar[Layout] = Layout(
        "encoder_attn", "q_proj k_proj v_proj out_proj", norm1="encoder_attn_layer_norm", dropout1_p="dropout"
    )
    served = frozenset(
        {"hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "is_causal"}
    )

    def why_not_more(self, layer: Any) -> str:
        return self.across.why_not(layer, self.norm_kind)

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        mask = given.get("encoder_attention_mask")
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        options = super().options_of_call(layer, x, given, call)
        source = given.get("encoder_hidden_states")
        if source is None:
            return options
        mask, found = given.get("encoder_attention_mask"), self.across.options(layer)
        weights, modules = self.across.parameters(layer)
        return options | {name: found[its] for its, name in _ACROSS.items()} | {
            "memory": source, "across": weights, "across_modules": modules, "memory_mask": mask,
            "memory_is_causal": causal_without_mask(at(layer, "encoder_attn"), mask, given),
        }  # fmt: skip

    def run(self, layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        if "memory" not in options:
            return super().run(layer, x, options)
        weights, modules = self.parameters(layer)
        return kernels.decoder_layer(x, weights, at(layer, "self_attn").num_heads, modules=modules, **options)


class _WhisperEncoder(_Encoder):
    """Of Whisper's encoder layers."""

    layout = _layout(norm_first=True)

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        return _clamped(out) if out.dtype == torch.float16 else out


class _WhisperDecoder(DecoderAdapter):
    """Of Whisper's decoder layers."""

    layout = _layout(norm_first=True)


def _clamped(out: Tensor) -> Tensor:
    limit = torch.finfo(out.dtype).max - 1000
    return out.clamp(-limit, limit)


def _of(more: str) -> tuple[Replaced, ...]:
    encoder = {"layer_list": "layers", "own_positions": True}
    return (
        Replaced("EncoderLayer", _Encoder, _ENCODER_LAYER),
        Replaced("Encoder", PaddingFree, {"Encoder": f"{_ENCODER} {more}"}, "EncoderLayer", encoder),
        Replaced("DecoderLayer", DecoderAdapter, _DECODER_LAYER),
    )


FAMILIES = {
    "bart": Family("Bart", _of("layernorm_embedding")),
    "marian": Family("Marian", _of("embed_scale")),
    "whisper": Family("Whisper", (
        Replaced("EncoderLayer", _WhisperEncoder, _ENCODER_LAYER_OF_WHISPER),
        Replaced("DecoderLayer", _WhisperDecoder, _DECODER_LAYER_OF_WHISPER),
    )),
}  # fmt: skip
