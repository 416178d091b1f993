"""Fused Transformer kernels: functions on tensors, no nn.Module.

Triton on CUDA and ROCm tensors, eager PyTorch elsewhere; `set_backend` forces one and `last_backend` tells
which one ran.
"""

from .add_norm import add_norm
from .attention import (
    BlockMask,
    SdpaReport,
    alibi_slopes,
    attention,
    attention_varlen,
    attention_weights,
    attention_with_weights,
    sdpa_replacement,
    t5_relative_bias,
)
from .common.backend import get_backend, last_backend, set_backend, use_backend
from .embed_norm import embed_norm, sinusoidal_positions
from .encoder_layer import LayerWeights, decoder_layer, encoder_layer
from .ffn import ffn, linear_act
from .rotary import rotary, rotary_tables

__all__ = [
    "BlockMask",
    "LayerWeights",
    "SdpaReport",
    "add_norm",
    "alibi_slopes",
    "attention",
    "attention_varlen",
    "attention_weights",
    "attention_with_weights",
    "decoder_layer",
    "embed_norm",
    "encoder_layer",
    "ffn",
    "get_backend",
    "last_backend",
    "linear_act",
    "rotary",
    "rotary_tables",
    "sdpa_replacement",
    "set_backend",
    "sinusoidal_positions",
    "t5_relative_bias",
    "use_backend",
]
