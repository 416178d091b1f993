"""Rotary position embedding in plain PyTorch: the path of the CPU and of float64, and the reference of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(query: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines as they broadcast to half of the rotated columns of `query`."""
    if cos.dim() == 3:  # Hugging Face's, of which the second half repeats the first
        cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
    elif position_ids is None:
        tokens = query.shape[0 if query.dim() == 3 else 2]
        if cos.shape[0] != tokens:
            cos, sin = cos[:tokens], sin[:tokens]
    elif position_ids.is_cpu:
        outside = (position_ids < 0) | (position_ids >= cos.shape[0])
        if outside.any():
            raise IndexError(
                f"position_ids: expected ids from 0 to {cos.shape[0] - 1}, got {int(position_ids[outside][0])}"
            )
        cos, sin = cos[position_ids], sin[position_ids]
    else:  # an id out of range would stop the device; its token becomes NaN
        inside = ((position_ids >= 0) & (position_ids < cos.shape[0]))[..., None]
        ids = position_ids.clamp(0, cos.shape[0] - 1)
        cos, sin = (torch.where(inside, t[ids], torch.nan) for t in (cos, sin))
    if query.dim() == 3:
        return cos.unsqueeze(-2), sin.unsqueeze(-2)  # [T, 1, R / 2]
    return (cos.unsqueeze(1), sin.unsqueeze(1)) if cos.dim() == 3 else (cos, sin)  # [B, 1, L, R / 2] or [L, R / 2]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """`x` rotated, in its memory order; computed in float32 or wider."""
    out = torch.empty_like(x)
    wide = x.dtype in (torch.float16, torch.bfloat16)
    source, work = (x.float(), torch.empty_like(x, dtype=torch.float32)) if wide else (x, out)
    if cos.dtype is not work.dtype:
        cos, sin = cos.to(work.dtype), sin.to(work.dtype)
    size = 2 * cos.shape[-1]
    a, b = _pairs(source, size, interleaved)
    new_a, new_b = _pairs(work, size, interleaved)
    sign = -1.0 if inverse else 1.0
    torch.mul(a, cos, out=new_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=new_b).addcmul_(a, sin, value=sign)
    if size < x.shape[-1]:
        work[..., size:] = source[..., size:]
    return out.copy_(work) if wide else out


def _pairs(x: Tensor, size: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second element of each pair."""
    if size < x.shape[-1]:
        x = x[..., :size]
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)  # type: ignore[return-value]


def rotary(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Query and key rotated, by the negative angles if `inverse`."""
    c, s = angles(query, cos, sin, position_ids)
    return (
        rotate(query, c, s, interleaved, inverse), None if key is None else rotate(key, c, s, interleaved, inverse)
    )  # fmt: skip
