"""add_norm in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import backend, dropout
from .arguments import Gradients, Options, Wanted, sum_dtype

TINY = 1.1754944e-38
"""Least normal float32: a variance with eps below it counts as 0."""


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The normalised sum and the sum itself; differentiable."""
    total = form_sum(x, residual, x_bias, seed, options)
    out = _norm(total, weight, bias, options)
    return out if out.dtype is x.dtype else out.to(x.dtype), total


def plain(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor] | None:
    """LayerNorm of tensors of one dtype on a CPU, checked with the least of the host's time; None for other calls and
    for bad ones, which the caller has to look at more closely."""
    try:
        if not backend.plain_cpu(x):
            return None
        shape, dtype = x.shape, x.dtype
        if residual is not None and (residual.dtype is not dtype or residual.shape != shape or not residual.is_cpu):
            return None
        if (weight is not None and weight.dtype is not dtype) or (bias is not None and bias.dtype is not dtype):
            return None
        if not eps >= TINY or shape[-1] == 0:
            return None
        total = x if residual is None else x + residual
        return torch.layer_norm(total, shape[-1:], weight, bias, eps), total
    except (
        AttributeError,
        TypeError,
        IndexError,
        RuntimeError,
    ):  # torch itself checks shapes and devices of parameters
        return None


def form_sum(
    x: Tensor, residual: Tensor | None, x_bias: Tensor | None, seed: Tensor | None, options: Options
) -> Tensor:
    """residual + dropout(x + x_bias)"""
    dtype = sum_dtype(x, options)
    total = x.to(dtype)
    if x_bias is not None:
        total = total + x_bias
    total = dropout.dropout(total, seed, options.dropout_p)
    if residual is not None:
        total = total + residual
    return total.to(dtype)


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


def statistics(total: Tensor, options: Options) -> tuple[Tensor | None, Tensor]:
    """Mean (of LayerNorm) and reciprocal standard deviation of each row, float32 or wider, ``[rows]``."""
    rows = total.reshape(-1, total.shape[-1]).to(wide_dtype(total))
    if options.rms:
        return None, _reciprocal_deviation(rows.square().mean(-1), options.eps)
    variance, mean = torch.var_mean(rows, -1, correction=0)
    return mean, _reciprocal_deviation(variance, options.eps)


def add_norm_backward(
    dout: Tensor, dsum: Tensor | None, x: Tensor, residual: Tensor | None, x_bias: Tensor | None,
    weight: Tensor | None, mean: Tensor | None, rstd: Tensor, seed: Tensor | None, options: Options, recompute: bool,
    wanted: Wanted,
) -> Gradients:  # fmt: skip
    """The gradients as formulas. With xhat the normalised row and g = dout * weight:
    dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum (Ba et al., "Layer Normalization", 2016), of
    RMSNorm without mean(g) (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019)."""
    total = form_sum(x, residual, x_bias, seed, options) if recompute else x
    shape, width = total.shape, total.shape[-1]
    wide = rstd.dtype
    rows = total.reshape(-1, width).to(wide)
    xhat = (rows if mean is None else rows - mean[:, None]) * rstd[:, None]
    do = dout.reshape(-1, width).to(wide)
    g = do if weight is None else do * (weight.to(wide) + options.zero_centered)
    dz = g - xhat * (g * xhat).mean(-1, keepdim=True)
    dz = rstd[:, None] * (dz if mean is None else dz - g.mean(-1, keepdim=True))
    if dsum is not None:
        dz = dz + dsum.reshape(-1, width)
    dx = dropout.dropout(dz, seed, options.dropout_p)
    return (
        None if wanted.x is None else dx.to(wanted.x).view(shape),
        None if wanted.residual is None else dz.to(wanted.residual).view(shape),
        None if wanted.weight is None else (do * xhat).sum(0).to(wanted.weight),
        None if wanted.bias is None else do.sum(0).to(wanted.bias),
        None if wanted.x_bias is None else dx.sum(0).to(wanted.x_bias),
    )
