"""The public functions and their documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks
from .op import ROTARY


def rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of query and key in one launch (Su et al., "RoFormer", 2021).

    Each pair (a, b) of columns becomes ``(a cos - b sin, b cos + a sin)``; the backward pass, one launch too, is the
    rotation by the negative angle. Computed in float32, rounded once.

    Args:
        query: ``[B, H, L, D]``, or packed ``[T, H, D]``; float32, float16, bfloat16 or float64, any strides.
        key: the same with any number of heads, dtype and device of `query`, or None.
        cos: ``[positions, R / 2]``, a table as from `rotary_tables` (flash-attn's form), R at most D and even; or
            ``[B, L, R]`` or ``[1, L, R]``, Hugging Face's form for ``[B, H, L, D]``, whose second half repeats the
            first and is not read. Any floating dtype. The columns from R on pass through.
        sin: the same of the sines. Neither gets a gradient.
        interleaved: the pairs are neighbours (GPT-J) instead of the halves of the first R columns (GPT-NeoX, Hugging
            Face's ``rotate_half``).
        position_ids: the rows of a table that the tokens take: ``[L]``, ``[1, L]`` or ``[B, L]``, packed ``[T]``;
            int64 or int32; None for 0 to L - 1. One out of range raises on a CPU; on a GPU, where the check would wait,
            its token becomes NaN.

    Returns:
        Query and key rotated (None without a key), of their dtypes and in their memory order, also under autocast;
        differentiable any number of times.

    Raises:
        TypeError: a tensor that is not floating (ids: not an integer), a key of another dtype.
        ValueError: shapes or devices that do not fit, `cos` or `sin` that require a gradient.
        IndexError: a position out of range, on a CPU.

    Example:
        >>> import torch, fusenc
        >>> query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 1, 5, 16)
        >>> query, key = fusenc.kernels.rotary(query, key, *fusenc.kernels.rotary_tables(5, 16))
        >>> query.shape, key.shape
        (torch.Size([2, 4, 5, 16]), torch.Size([2, 1, 5, 16]))
    """
    out, key_out = ROTARY((query, key, cos, sin, position_ids), (interleaved, False))
    return out, None if key is None else key_out


def rotary_tables(
    length: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tables of `rotary`: cos and sin of ``position * base**(-2i / rotary_dim)``, ``[length, rotary_dim / 2]``.

    Args:
        length: how many positions, from 0.
        rotary_dim: R, the number of columns that are rotated; even.
        base: Su et al. (2021) take 10000.
        dtype: of the tables, as `rotary` takes them; the angles are float64.
        device: of the tables.

    Raises:
        TypeError: another dtype.
        ValueError: a negative length, a `rotary_dim` that is odd or below 2, a base that is not positive.

    Example:
        >>> import fusenc
        >>> cos, sin = fusenc.kernels.rotary_tables(128, 64)
        >>> cos.shape
        torch.Size([128, 32])
    """
    if not isinstance(length, int) or length < 0:
        checks.fail_value("length", "an integer that is not negative", length)
    if not isinstance(rotary_dim, int) or rotary_dim < 2 or rotary_dim % 2:
        checks.fail_value("rotary_dim", "an even integer of at least 2", rotary_dim)
    if not isinstance(base, (int, float)) or not base > 0.0:
        checks.fail_value("base", "a positive number", base)
    if dtype not in checks.DTYPES:
        checks.fail_type("dtype", "float32, float64, float16 or bfloat16", dtype)
    columns = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * base ** (-columns / rotary_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)
