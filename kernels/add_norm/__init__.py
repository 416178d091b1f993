"""Dropout, residual addition and normalisation in one pass."""

from .api import add_norm

__all__ = ["add_norm"]
