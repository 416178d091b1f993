"""What one encoder_layer call is made of, in the one form that every path takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerWeights(NamedTuple):
    """The parameters of a layer, shaped as in `torch.nn.TransformerEncoderLayer`. None where it has none."""

    in_proj_weight: Tensor
    """``[3 E, E]``: query, key and value projections, one below the other."""
    in_proj_bias: Tensor | None
    """``[3 E]``"""
    out_proj_weight: Tensor
    """``[E, E]``"""
    out_proj_bias: Tensor | None
    norm1_weight: Tensor | None
    """``[E]``, as are the norms' other parameters."""
    norm1_bias: Tensor | None
    weight1: Tensor
    """``[d_hidden, E]``"""
    bias1: Tensor | None
    weight2: Tensor
    """``[E, d_hidden]``"""
    bias2: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None


class Masks(NamedTuple):
    """What limits attention, as `attention` and `attention_varlen` take it."""

    attn_mask: Tensor | None = None
    is_causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0


class Dropouts(NamedTuple):
    """Probabilities: of attention's weights, of its projection, of the hidden activation, of the feed-forward."""

    attention: float = 0.0
    projection: float = 0.0
    hidden: float = 0.0
    output: float = 0.0


class Options(NamedTuple):
    """The numbers of a call."""

    nhead: int
    batch_first: bool
    norm_first: bool
    activation: str
    eps1: float
    eps2: float
    dropouts: Dropouts
