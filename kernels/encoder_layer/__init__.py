"""A whole Transformer encoder layer in one call."""

from .api import encoder_layer
from .arguments import LayerWeights

__all__ = ["LayerWeights", "encoder_layer"]
