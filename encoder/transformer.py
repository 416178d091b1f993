"""torch.nn.TransformerDecoder and Transformer, of fused layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer_decoder_layer import TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder
from .transformer_encoder_layer import TransformerEncoderLayer


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: a stack of copies of a decoder layer, fused or not.

    Constructor, weights and forward are torch's own; what is fused is the layer.

    Example:
        >>> import torch, fusenc
        >>> layer = fusenc.TransformerDecoderLayer(d_model=32, nhead=4, batch_first=True)
        >>> decoder = fusenc.TransformerDecoder(layer, num_layers=2)
        >>> decoder(torch.randn(2, 10, 32), torch.randn(2, 7, 32)).shape
        torch.Size([2, 10, 32])
    """


class Transformer(nn.Transformer):
    """`torch.nn.Transformer` with the same constructor, weights, masks and results, of fused layers.

    A custom encoder or decoder is taken as it is; `fusenc.fuse` replaces the layers inside one.

    Example:
        >>> import torch, fusenc
        >>> model = fusenc.Transformer(d_model=32, nhead=4, num_encoder_layers=2, batch_first=True)
        >>> causal = model.generate_square_subsequent_mask(5)
        >>> model(torch.randn(2, 10, 32), torch.randn(2, 5, 32), tgt_mask=causal).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip
        # Fused classes differ in their forward alone, so torch's modules, as they were initialised, become them.
        if custom_encoder is None:
            self.encoder.__class__ = TransformerEncoder
            for layer in self.encoder.layers:
                layer.__class__ = TransformerEncoderLayer
        if custom_decoder is None:
            self.decoder.__class__ = TransformerDecoder
            for layer in self.decoder.layers:
                layer.__class__ = TransformerDecoderLayer
