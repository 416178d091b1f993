"""BART and Marian: encoders and decoders, post-norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from ..packing import PaddedPacking
from .common import (
    PaddingFree,
    asks_for_more,
    attention,
    by_name,
    causal_without_mask,
    feed_forward,
    serves,
    why_not_activation,
    why_not_attention,
    why_not_linear,
)
from .stock import CAPTURE, Stock

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


class _FusedLayer(nn.Module):
    """What the layers of encoder and decoder share."""

    stock_attention: ClassVar[type]
    attentions: ClassVar[tuple[str, ...]]
    served: ClassVar[frozenset[str]]
    """Arguments of the stock forward that the fused one serves."""

    @classmethod
    def why_not_fused(cls, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        parts = layer._modules
        reason = why_not_plain(((name, parts[name], cls.stock_attention) for name in cls.attentions), except_of=CAPTURE)
        for name in cls.attentions:
            reason = reason or why_not_attention(
                parts[name], ("q_proj", "k_proj", "v_proj", "out_proj"), name, parts[name].head_dim
            )
        norms = (*(f"{name}_layer_norm" for name in cls.attentions), "final_layer_norm")
        return (
            reason
            or why_not_linear((name, parts[name]) for name in ("fc1", "fc2"))
            or why_not_activation(layer.activation_fn)
            or why_not_plain((name, parts[name], nn.LayerNorm) for name in norms)
        )

    def _attend(
        self, x: Tensor, name: str, attention_mask: Tensor | None, given: dict[str, Any], **options: Any
    ) -> Tensor:
        """One attention with what follows it: dropout, the residual sum and the norm."""
        module: Any = self._modules[name]
        attended = attention(
            x, (module.q_proj, module.k_proj, module.v_proj), module.head_dim,
            attn_mask=attention_mask, is_causal=causal_without_mask(module, attention_mask, given),
            dropout_p=module.dropout if module.training else 0.0, scale=module.scaling, **options,
        )  # fmt: skip
        return self._add_norm(module.out_proj(attended), x, self._modules[f"{name}_layer_norm"])

    def _feed_forward(self, x: Tensor) -> Tensor:
        parts: Any = self._modules
        dropout_p: Any = self.activation_dropout if self.training else 0.0
        out = feed_forward(x, parts["fc1"], self.activation_fn, parts["fc2"], dropout_p=dropout_p)
        return self._add_norm(out, x, parts["final_layer_norm"])

    def _add_norm(self, x: Tensor, residual: Tensor, norm: Any) -> Tensor:
        return kernels.add_norm(
            x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=self.dropout, training=self.training
        )  # type: ignore[call-overload]


class _FusedEncoderLayer(_FusedLayer):
    """An encoder layer on the fused kernels; mixed into a subclass of the family's own."""

    attentions = ("self_attn",)
    served = frozenset({"hidden_states", "attention_mask", "is_causal"})

    def forward(self, *args: Any, packing: PaddedPacking | None = None, **kwargs: Any) -> Tensor:
        """As the family's own layer; with `packing` the result is packed, ``[T, width]``, and there is no mask."""
        given = by_name(self, args, kwargs)
        x: Any = given.get("hidden_states")
        attention_mask = given.get("attention_mask")
        if packing is None:
            weight: Any = self._modules["final_layer_norm"].weight  # type: ignore[union-attr]
            if asks_for_more(given, self.served) or not serves(x, attention_mask, weight) or self.why_not_fused(self):
                return super().forward(**given)
        elif x.dim() == 3:
            x = packing.pack(x)
        x = self._feed_forward(self._attend(x, "self_attn", attention_mask, given, packing=packing))
        if x.dtype == torch.float16 and not x.isfinite().all():
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class _FusedDecoderLayer(_FusedLayer):
    """A decoder layer on the fused kernels; mixed into a subclass of the family's own. With a cache the stock layer
    runs."""

    attentions = ("self_attn", "encoder_attn")
    served = frozenset(
        {"hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "is_causal"}
    )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the family's own layer."""
        given = by_name(self, args, kwargs)
        x: Any = given.get("hidden_states")
        attention_mask, encoder_mask = given.get("attention_mask"), given.get("encoder_attention_mask")
        weight: Any = self._modules["final_layer_norm"].weight  # type: ignore[union-attr]
        if (
            asks_for_more(given, self.served)
            or not serves(x, attention_mask, weight)
            or not serves(x, encoder_mask, weight)
            or self.why_not_fused(self)
        ):
            return super().forward(**given)
        x = self._attend(x, "self_attn", attention_mask, given)
        source = given.get("encoder_hidden_states")
        if source is not None:
            x = self._attend(x, "encoder_attn", encoder_mask, given, source=source)
        return self._feed_forward(x)


class _FusedEncoder(PaddingFree):
    """An encoder; mixed into a subclass of the family's own."""

    layer_list = "layers"


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    attention = stock["Attention"]
    layer = stock.fused(_FusedEncoderLayer, "EncoderLayer", _ENCODER_LAYER, stock_attention=attention)
    yield layer
    yield stock.fused(_FusedDecoderLayer, "DecoderLayer", _DECODER_LAYER, stock_attention=attention)
    yield stock.fused(_FusedEncoder, "Encoder", _ENCODERS[stock.prefix], fused_layer=layer)
