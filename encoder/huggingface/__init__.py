"""Fused layers and encoders of Hugging Face's models. Imported only where transformers already is."""

from . import bert

REPLACEMENTS: dict[type, type] = {**bert.REPLACEMENTS}
"""Each class that `fuse` knows here, and the class that takes its place."""
