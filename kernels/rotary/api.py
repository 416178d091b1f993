"""The public functions: arguments, checks, documentation."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..common import checks
from . import op

ID_DTYPES = frozenset({torch.int64, torch.int32})


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
    try:
        wrong = _wrong(query, key, cos, sin, position_ids)
    except (AttributeError, TypeError, ValueError, IndexError):
        wrong = True
    if wrong:
        _explain(query, key, cos, sin, position_ids)
    arguments = (query, key, cos, sin, position_ids, interleaved, False)
    if torch.compiler.is_compiling():
        out, key_out = op.rotary_operator(*arguments)
        return out, None if key is None else key_out
    if torch.is_grad_enabled() and (query.requires_grad or (key is not None and key.requires_grad)):
        return op.Rotary.apply(*arguments)
    return op.rotate(*arguments)


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


def _wrong(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> bool:
    packed = query.dim() == 3
    if packed:
        tokens, _, head_size = query.shape
        batch = 1
    else:
        batch, _, tokens, head_size = query.shape
    dtype, device, table = query.dtype, query.device, cos.dim() == 2
    return (
        dtype not in checks.DTYPES or cos.dtype not in checks.DTYPES or sin.dtype is not cos.dtype
        or cos.device != device or sin.device != device or cos.requires_grad or sin.requires_grad
        or checks.differ(cos.shape, sin.shape) or cos.shape[-1] == 0
        or (key is not None
            and (key.dtype is not dtype or key.device != device or key.dim() != query.dim()
                 or (key.shape[0] != tokens if packed else key.shape[0] != batch or key.shape[2] != tokens)
                 or key.shape[-1] != head_size))
        or (2 * cos.shape[-1] > head_size or (position_ids is None and cos.shape[0] < tokens) if table
            else packed or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens
            or cos.shape[2] > head_size or cos.shape[2] % 2 != 0 or position_ids is not None)
        or (position_ids is not None
            and (position_ids.dtype not in ID_DTYPES or position_ids.device != device or cos.shape[0] == 0
                 or position_ids.shape[-1] != tokens or position_ids.dim() not in ((1,) if packed else (1, 2))
                 or (position_ids.dim() == 2 and position_ids.shape[0] not in (1, batch))))
    )  # fmt: skip


def _explain(query: Any, key: Any, cos: Any, sin: Any, position_ids: Any) -> NoReturn:
    checks.floating_tensor("query", query)
    if query.dim() not in (3, 4):
        checks.fail_value("query", "shape [B, H, L, D] or packed [T, H, D]", query)
    packed = query.dim() == 3
    batch, tokens = (1, query.shape[0]) if packed else (query.shape[0], query.shape[2])
    head_size = query.shape[-1]
    if key is not None:
        checks.same_kind("key", key, "query", query)
        shape = f"[{tokens}, heads, {head_size}]" if packed else f"[{batch}, heads, {tokens}, {head_size}]"
        fits = key.dim() == query.dim() and key.shape[-1] == head_size
        fits = fits and (key.shape[0] == tokens if packed else key.shape[0] == batch and key.shape[2] == tokens)
        if not fits:
            checks.fail_value("key", f"shape {shape}, to go with query", key)
    for name, value in (("cos", cos), ("sin", sin)):
        checks.floating_tensor(name, value)
        if value.device != query.device:
            checks.fail_value(name, f"device {query.device}, that of query", value)
        if value.requires_grad:
            checks.fail_value(name, "a tensor that requires no gradient, since it would get none", value)
        forms = "[positions, R / 2]" if packed else f"[positions, R / 2], [1, {tokens}, R] or [{batch}, {tokens}, R]"
        forms = f"shape {forms} with R from 2 to {head_size}"
        if value.dim() == 2:
            fits = 0 < 2 * value.shape[1] <= head_size and value.shape[0] >= (tokens if position_ids is None else 1)
            forms += f" and at least {tokens if position_ids is None else 1} positions"
        else:
            fits = value.dim() == 3 and not packed and value.shape[0] in (1, batch) and value.shape[1] == tokens
            fits = fits and 0 < value.shape[2] <= head_size and value.shape[2] % 2 == 0
        if not fits:
            checks.fail_value(name, forms, value)
    if sin.dtype != cos.dtype:
        checks.fail_type("sin", f"dtype {cos.dtype}, that of cos", sin)
    if sin.shape != cos.shape:
        checks.fail_value("sin", f"shape {list(cos.shape)}, that of cos", sin)
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in ID_DTYPES:
        checks.fail_type("position_ids", "an int64 or int32 tensor or None", position_ids)
    if cos.dim() == 3:
        checks.fail_value("position_ids", "None, since cos has a row for each token", position_ids)
    shapes = f"[{tokens}]" if packed else f"[{tokens}], [1, {tokens}] or [{batch}, {tokens}]"
    checks.fail_value("position_ids", f"shape {shapes} on {query.device}", position_ids)
