"""What one add_norm call is made of besides its tensors, in the one form that every path takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


class Wanted(NamedTuple):
    """The gradients to compute: the dtype of each, None for those that nobody needs."""

    x: torch.dtype | None = None
    residual: torch.dtype | None = None
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    x_bias: torch.dtype | None = None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, residual, weight, bias and x_bias."""


def sum_dtype(x: Tensor, options: Options) -> torch.dtype:
    """In which dtype the sum is rounded, returned and saved."""
    return torch.promote_types(x.dtype, torch.float32) if options.float32_sum else x.dtype


def sum_is_input(residual: Tensor | None, x_bias: Tensor | None, seed: Tensor | None) -> bool:
    """True where nothing is added to `x` or dropped from it, so that it need not be stored again."""
    return residual is None and x_bias is None and seed is None
