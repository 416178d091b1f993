"""A whole Transformer layer in one call."""

from .api import encoder_layer
from .arguments import LayerWeights
from .decoder import decoder_layer

__all__ = ["LayerWeights", "decoder_layer", "encoder_layer"]
