"""add_norm in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import dropout
from .arguments import Options, Tensors, sum_dtype

TINY = 1.1754944e-38
"""Least normal float32: a variance with eps below it counts as 0."""


def add_norm(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """The normalised sum, the sum itself, and the second copy of the first if there is one; differentiable."""
    x, residual, weight, bias, x_bias, seed = tensors
    dtype = sum_dtype(x, options)
    total = _as(dtype, x)
    if x_bias is not None:
        total = total + x_bias
    total = dropout.dropout(total, seed, options.dropout_p)
    if residual is not None:
        total = total + residual
    total = _as(dtype, total)
    normed = _norm(total, weight, bias, options)
    also = None if options.also_dtype is None else _as(options.also_dtype, normed)
    return _as(options.out_dtype or x.dtype, normed), total, also


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    """`t.to(dtype)`, which takes the host a microsecond even where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def _norm(total: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    mixed = any(t is not None and t.dtype is not total.dtype for t in (weight, bias))
    if mixed or (options.zero_centered and weight is not None):
        total, weight, bias = (None if t is None else t.to(wide_dtype(total)) for t in (total, weight, bias))  # type: ignore[assignment]
        if options.zero_centered and weight is not None:
            weight = weight + 1.0
    width = (total.shape[-1],)
    if options.eps < TINY:
        return _norm_without_eps(total, weight, bias, options)
    if not options.rms:
        return torch.layer_norm(total, width, weight, bias, options.eps)
    out = torch.rms_norm(total, width, weight, options.eps)
    if bias is None:
        return out
    return out + bias if torch.is_grad_enabled() else out.add_(bias)


def _norm_without_eps(total: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """As torch's, but a row without variance gives 0 and finite gradients, not NaN."""
    wide = total.to(wide_dtype(total))
    centred = wide if options.rms else wide - wide.mean(-1, keepdim=True)
    out = centred * _reciprocal_deviation(centred.square().mean(-1, keepdim=True), options.eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(total.dtype)


def _reciprocal_deviation(variance: Tensor, eps: float) -> Tensor:
    none = variance + eps < TINY
    return torch.rsqrt((variance + eps).masked_fill(none, 1.0)).masked_fill(none, 0.0)


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 of a float64 tensor."""
    return torch.promote_types(x.dtype, torch.float32)
