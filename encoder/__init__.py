"""fusenc: Transformer encoders on fused Triton kernels, drop-in for torch.nn."""

from . import kernels, packing
from .multihead_attention import MultiheadAttention
from .surgery import FuseReport, fuse, unfuse
from .transformer import Transformer, TransformerDecoder
from .transformer_decoder_layer import TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder
from .transformer_encoder_layer import TransformerEncoderLayer

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "fuse",
    "kernels",
    "packing",
    "unfuse",
]
