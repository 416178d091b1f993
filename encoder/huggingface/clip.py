"""CLIP: the layers of both towers, and the encoder, which leaves the padding of texts out on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip as clip

from ..packing import PaddedPacking
from .common import PreNormLayer, all_fused, collected, fused_class, may_pack, why_a_layer_is_not_fused

_NAMES = {
    "attention": "self_attn", "norm1": "layer_norm1", "norm2": "layer_norm2", "out": "out_proj",
    "nhead": "num_heads", "scale": "scale", "dropout": "dropout",
}  # fmt: skip
_STOCK = {"attention": clip.CLIPAttention, "mlp": clip.CLIPMLP}
_LAYER = fused_class(PreNormLayer, clip.CLIPEncoderLayer, names=_NAMES, stock=_STOCK)


class _FusedEncoder(nn.Module):
    """CLIP's encoder; mixed into a subclass of it."""

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why an encoder cannot run fused, or "": it needs each of its layers fused."""
        return why_a_layer_is_not_fused(encoder.layers, _LAYER)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As CLIP's own encoder; hidden states at padded positions may come back as 0."""
        keep = self._padding(inputs_embeds, attention_mask, kwargs)
        if keep is None:
            return super().forward(inputs_embeds, attention_mask, **kwargs)
        packing = PaddedPacking(keep)
        out = super().forward(packing.pack(inputs_embeds), None, packing=packing, **kwargs)
        out.last_hidden_state = packing.unpack(out.last_hidden_state)
        return out

    def _padding(self, x: Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """Which tokens are real, bool ``[B, L]``, if this call can and should leave the others out, else None."""
        if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.bool or not kwargs.get("is_causal"):
            return None
        batch, length = x.shape[:2]
        if attention_mask.shape != (batch, 1, length, length) or not may_pack(x) or collected():
            return None
        keep = attention_mask[:, 0, -1]  # the last query sees all that is real
        if not torch.equal(attention_mask[:, 0], keep[:, None].expand(-1, length, -1).tril()):
            return None  # more than a causal and a padding mask
        layers: Any = self.layers
        return keep if all_fused(layers, _LAYER) else None


REPLACEMENTS: dict[type, type] = {
    clip.CLIPEncoderLayer: _LAYER,
    clip.CLIPEncoder: fused_class(_FusedEncoder, clip.CLIPEncoder),
}
"""Each class that `fuse` knows here, and the class that takes its place."""
