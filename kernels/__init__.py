"""Fused Transformer kernels: functions on tensors, no nn.Module.

Triton on CUDA and ROCm tensors, eager PyTorch elsewhere; `set_backend` forces one and `last_backend` tells
which one ran.
"""

from .add_norm import add_norm
from .attention import attention
from .common.backend import get_backend, last_backend, set_backend, use_backend
from .ffn import ffn

__all__ = ["add_norm", "attention", "ffn", "get_backend", "last_backend", "set_backend", "use_backend"]
