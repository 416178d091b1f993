"""add_norm in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import dropout


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The normalised sum and the sum itself; differentiable."""
    if seed is not None:
        x = dropout.dropout(x, seed, dropout_p)
    total = x if residual is None else x + residual
    return torch.layer_norm(total, (total.shape[-1],), weight, bias, eps), total


def statistics(total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each row, float32 or wider, ``[rows]``."""
    rows = total.reshape(-1, total.shape[-1]).to(torch.promote_types(total.dtype, torch.float32))
    variance, mean = torch.var_mean(rows, -1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def add_norm_backward(
    dout: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    seed: Tensor | None, dropout_p: float, needs_dweight: bool, needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients as formulas: dx, dresidual, dweight, dbias. With xhat the normalised row and g = dout * weight:
    dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum (Ba et al., "Layer Normalization", 2016)."""
    shape, width = total.shape, total.shape[-1]
    wide = mean.dtype
    xhat = (total.reshape(-1, width).to(wide) - mean[:, None]) * rstd[:, None]
    do = dout.reshape(-1, width).to(wide)
    g = do if weight is None else do * weight.to(wide)
    dz = rstd[:, None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    if dsum is not None:
        dz = dz + dsum.reshape(-1, width)
    dx = dropout.dropout(dz, seed, dropout_p).to(total.dtype).view(shape)
    dweight = (do * xhat).sum(0).to(total.dtype) if needs_dweight else None
    dbias = None if not needs_dbias else do.sum(0).to(total.dtype)
    return dx, dz.to(total.dtype).view(shape), dweight, dbias
