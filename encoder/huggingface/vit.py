"""ViT."""

from __future__ import annotations

from transformers.models.vit import modeling_vit as vit

from .common import fused_class
from .pre_norm import PreNormLayer

_NAMES = {
    "attention": "attention", "norm1": "layernorm_before", "norm2": "layernorm_after", "out": "o_proj",
    "nhead": "num_attention_heads", "scale": "scaling", "dropout": "attention_dropout",
}  # fmt: skip

REPLACEMENTS: dict[type, type] = {
    vit.ViTLayer: fused_class(
        PreNormLayer, vit.ViTLayer, names=_NAMES, stock={"attention": vit.ViTAttention, "mlp": vit.ViTMLP}
    )
}
"""Each class that `fuse` knows here, and the class that takes its place."""
