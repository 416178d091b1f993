"""Scaled dot-product attention."""

from .api import attention, attention_varlen, attention_weights, attention_with_weights
from .block_mask import BlockMask
from .positions import alibi_slopes, t5_relative_bias
from .sdpa import SdpaReport, sdpa_replacement

__all__ = [
    "BlockMask", "SdpaReport", "alibi_slopes", "attention", "attention_varlen", "attention_weights",
    "attention_with_weights", "sdpa_replacement", "t5_relative_bias",
]  # fmt: skip
