"""The feed-forward block."""

from .api import ffn, linear_act

__all__ = ["ffn", "linear_act"]
