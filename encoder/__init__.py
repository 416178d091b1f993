"""fusenc: Transformer encoders on fused Triton kernels, drop-in for torch.nn."""

from . import kernels
from .surgery import FuseReport, fuse, unfuse
from .transformer_encoder_layer import TransformerEncoderLayer

__version__ = "0.1.0"

__all__ = ["FuseReport", "TransformerEncoderLayer", "fuse", "kernels", "unfuse"]
