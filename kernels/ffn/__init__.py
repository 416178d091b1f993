"""The feed-forward block."""

from .api import ffn

__all__ = ["ffn"]
