"""Embedding lookups, their sum, normalisation and dropout in one pass."""

from .api import embed_norm, sinusoidal_positions

__all__ = ["embed_norm", "sinusoidal_positions"]
