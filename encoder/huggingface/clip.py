"""CLIP: the layers of both towers, and the encoder, which leaves the padding of texts out on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.clip import modeling_clip as clip

from .common import PaddingFreeStates, fused_class
from .pre_norm import PreNormLayer

_NAMES = {
    "attention": "self_attn", "norm1": "layer_norm1", "norm2": "layer_norm2", "out": "out_proj",
    "nhead": "num_heads", "scale": "scale", "dropout": "dropout",
}  # fmt: skip
_STOCK = {"attention": clip.CLIPAttention, "mlp": clip.CLIPMLP}
_LAYER = fused_class(PreNormLayer, clip.CLIPEncoderLayer, names=_NAMES, stock=_STOCK)


class _FusedEncoder(PaddingFreeStates):
    """CLIP's encoder; mixed into a subclass of it. That of texts is causal."""

    layer_list = "layers"
    fused_layer = _LAYER

    def forward(self, inputs_embeds: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As CLIP's own encoder; hidden states at padded positions may come back as 0."""
        return super().forward(inputs_embeds, attention_mask, **kwargs)

    def _real_tokens(self, inputs: Tensor, attention_mask: Tensor) -> Tensor | None:
        batch, length = inputs.shape[:2]
        if attention_mask.shape != (batch, 1, length, length):
            return None
        dtype = attention_mask.dtype
        keep = attention_mask[:, 0, -1]  # the last query sees all that is real
        keep = keep if dtype == torch.bool else keep == 0
        causal = keep[:, None].expand(-1, length, -1).tril()
        if dtype != torch.bool:  # as eager attention adds it to the scores
            causal = torch.where(causal, 0.0, torch.finfo(dtype).min).to(dtype)
        return keep if torch.equal(attention_mask[:, 0], causal) else None

    def _asks_for_more(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return not kwargs.get("is_causal") or super()._asks_for_more(args, {**kwargs, "is_causal": None})


REPLACEMENTS: dict[type, type] = {
    clip.CLIPEncoderLayer: _LAYER,
    clip.CLIPEncoder: fused_class(_FusedEncoder, clip.CLIPEncoder),
}
"""Each class that `fuse` knows here, and the class that takes its place."""
