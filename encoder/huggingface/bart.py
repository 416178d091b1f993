"""BART and Marian: encoders and decoders, post-norm."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from ..packing import PaddedPacking
from .common import (
    CAPTURE,
    PaddingFree,
    attention,
    causal_without_mask,
    feed_forward,
    fused_class,
    serves,
    why_not_activation,
    why_not_attention,
    why_not_linear,
)

FAMILIES = {"bart": "Bart", "marian": "Marian"}
"""Module names of transformers and the prefix of their classes. Their layers are the same but for the name."""


class _FusedLayer(nn.Module):
    """What the layers of encoder and decoder share."""

    stock_attention: ClassVar[type]
    attentions: ClassVar[tuple[str, ...]]

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
        self, x: Tensor, name: str, attention_mask: Tensor | None, kwargs: dict[str, Any], **options: Any
    ) -> Tensor:
        """One attention with what follows it: dropout, the residual sum and the norm."""
        module: Any = self._modules[name]
        attended = attention(
            x, (module.q_proj, module.k_proj, module.v_proj), (module.num_heads, module.head_dim),
            attn_mask=attention_mask, is_causal=causal_without_mask(module, attention_mask, kwargs),
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

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *,
        packing: PaddedPacking | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """As the family's own layer; with `packing` the result is packed, ``[T, width]``, and there is no mask."""
        x = hidden_states
        if packing is None:
            weight: Any = self._modules["final_layer_norm"].weight  # type: ignore[union-attr]
            if not serves(x, attention_mask, weight) or self.why_not_fused(self):
                return super().forward(hidden_states, attention_mask, **kwargs)
        elif x.dim() == 3:
            x = packing.pack(x)
        x = self._feed_forward(self._attend(x, "self_attn", attention_mask, kwargs, packing=packing))
        if x.dtype == torch.float16 and not x.isfinite().all():
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class _FusedDecoderLayer(_FusedLayer):
    """A decoder layer on the fused kernels; mixed into a subclass of the family's own. With a cache the stock layer
    runs."""

    attentions = ("self_attn", "encoder_attn")

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """As the family's own layer."""
        weight: Any = self._modules["final_layer_norm"].weight  # type: ignore[union-attr]
        if (
            past_key_values is not None
            or not serves(hidden_states, attention_mask, weight)
            or not serves(hidden_states, encoder_attention_mask, weight)
            or self.why_not_fused(self)
        ):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values,
                *args, **kwargs,
            )  # fmt: skip
        x = self._attend(hidden_states, "self_attn", attention_mask, kwargs)
        if encoder_hidden_states is not None:
            x = self._attend(x, "encoder_attn", encoder_attention_mask, kwargs, source=encoder_hidden_states)
        return self._feed_forward(x)


class _FusedEncoder(PaddingFree):
    """An encoder; mixed into a subclass of the family's own."""

    layer_list = "layers"
    by_distance = False


def _families() -> dict[type, type]:
    replacements: dict[type, type] = {}
    for module_name, prefix in FAMILIES.items():
        module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
        stock_attention = getattr(module, prefix + "Attention")
        for mixin, name in ((_FusedEncoderLayer, "EncoderLayer"), (_FusedDecoderLayer, "DecoderLayer")):
            plain = getattr(module, prefix + name)
            replacements[plain] = fused_class(mixin, plain, stock_attention=stock_attention)
        encoder, layer = getattr(module, prefix + "Encoder"), getattr(module, prefix + "EncoderLayer")
        replacements[encoder] = fused_class(_FusedEncoder, encoder, fused_layer=replacements[layer])
    return replacements


REPLACEMENTS = _families()
"""Each class that `fuse` knows here, and the class that takes its place."""
