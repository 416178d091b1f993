"""What one add_norm call is made of, in the one form that every path takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of a call. None where it has none."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    x_bias: Tensor | None
    seed: Tensor | None = None
    """Key of the dropout, int64 ``[1]``."""


class Options(NamedTuple):
    """The numbers of a call."""

    dropout_p: float = 0.0
    eps: float = 1e-5
    rms: bool = False
    """RMSNorm instead of LayerNorm."""
    zero_centered: bool = False
    """The weight counts as 1 + weight."""
    float32_sum: bool = False
    """The sum is float32 beside a half-precision `x`."""
    float32_residual: bool = False
    """The residual is float32 beside a half-precision `x`."""
    return_sum: bool = False
    recompute: bool = False
    """The backward pass forms the sum again."""
    dtype: torch.dtype = torch.float32
    """Of `x`."""
    out_dtype: torch.dtype | None = None
    """Of the result; None: that of `x`."""
    also_dtype: torch.dtype | None = None
    """Of a second copy of the result; None: there is none. Only a caller of `add_norm_forward` gets it."""


class Saved(NamedTuple):
    """What the backward pass is given."""

    x: Tensor
    """The sum, or if it is formed again, `x`."""
    residual: Tensor | None
    """Only if the sum is formed again."""
    weight: Tensor | None
    bias: Tensor | None
    x_bias: Tensor | None
    statistics: Tensor
    """float32: the reciprocal deviation of each row, then (of LayerNorm) the mean of each."""
    seed: Tensor | None


def sum_dtype(x: Tensor, options: Options) -> torch.dtype:
    """In which dtype the sum is rounded, returned and saved."""
    return torch.promote_types(x.dtype, torch.float32) if options.float32_sum else x.dtype


def sum_is_input(tensors: Tensors) -> bool:
    """True where nothing is added to `x` or dropped from it, so that it need not be stored again."""
    return tensors.residual is None and tensors.x_bias is None and tensors.seed is None


def stores_sum(tensors: Tensors, options: Options, needs: tuple[bool, ...]) -> bool:
    """True if the forward pass writes the sum, for the caller or for the backward pass."""
    return (options.return_sum or (len(needs) > 0 and not options.recompute)) and not sum_is_input(tensors)
