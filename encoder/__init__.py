"""fusenc: Transformer encoders on fused Triton kernels, drop-in for torch.nn."""

from . import kernels

__all__ = ["kernels"]
