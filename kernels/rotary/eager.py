"""Rotary position embedding in plain PyTorch: the path of the CPU and of float64, and the reference of the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of a call; query and key have gradients."""

    query: Tensor
    key: Tensor | None
    cos: Tensor
    sin: Tensor
    position_ids: Tensor | None


class Options(NamedTuple):
    """The numbers of a call."""

    interleaved: bool
    inverse: bool
    """By the negative angles, as the backward pass does."""


def rotary(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    """Query and key rotated, in their memory order; differentiable. Computed in float32 or wider."""
    query, key, cos, sin, ids = tensors
    packed, rows = query.dim() == 3, cos.shape[0]
    if cos.dim() == 3:  # Hugging Face's, of which the second half repeats the first
        cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
    elif ids is None:
        cos, sin = (t[: query.shape[0 if packed else 2]] for t in (cos, sin))
    else:
        inside = (ids >= 0) & (ids < rows)
        if ids.is_cpu and not inside.all():
            raise IndexError(f"position_ids: expected ids from 0 to {rows - 1}, got {int(ids[~inside][0])}")
        # On another device a token out of range becomes NaN; the look-up itself would stop the device.
        cos, sin = (torch.where(inside[..., None], t[ids.clamp(0, rows - 1)], torch.nan) for t in (cos, sin))
    if cos.dim() == 3 or packed:  # a row for each token
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half, rest = cos.shape[-1], query.shape[-1] - 2 * cos.shape[-1]
    start, step = (1, 2) if options.interleaved else (half, 1)

    def pairs(a: Tensor, b: Tensor, beyond: float = 0.0) -> Tensor:
        joined = torch.stack((a, b), -1).flatten(-2) if options.interleaved else torch.cat((a, b), -1)
        return F.pad(joined, (0, rest), value=beyond) if rest else joined

    def rotated(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        a, b = wide[..., : step * half : step], wide[..., start : start + step * half : step]
        return torch.addcmul(wide * cos, pairs(b, a), sin).to(x.dtype)

    cos, sin = pairs(cos, cos, 1.0), pairs(sin, -sin) if options.inverse else pairs(-sin, sin)
    return rotated(query), None if key is None else rotated(key)
