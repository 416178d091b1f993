"""Scaled dot-product attention."""

from .api import attention

__all__ = ["attention"]
