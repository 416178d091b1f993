"""`F.scaled_dot_product_attention` of any existing model, sent to this library."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..common import backend, checks
from .api import attention
from .eager import MAX_HEAD_DIM


@dataclass
class SdpaReport:
    """What `sdpa_replacement` did."""

    served: int = 0
    """Calls that ran on `attention`."""
    left: Counter[str] = field(default_factory=Counter)
    """Calls that torch ran itself, by reason."""


@contextlib.contextmanager
def sdpa_replacement() -> Iterator[SdpaReport]:
    """Inside, calls of `F.scaled_dot_product_attention` run on `attention`, whoever makes them.

    A call that cannot be served goes to torch as it is. Dropout draws other random numbers than torch's, and a query
    with every key masked gives 0 where some of torch's implementations give NaN. In force for the whole process; code
    that holds the function itself (``from torch.nn.functional import scaled_dot_product_attention``) keeps torch's.

    Yields:
        A report of what was served and what was left, and why.

    Example:
        >>> import torch, fusenc
        >>> layer = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 64)
        >>> with fusenc.kernels.sdpa_replacement() as report:
        ...     _ = layer(x, x, x, need_weights=False)
        >>> report
        SdpaReport(served=1, left=Counter())
    """
    report = SdpaReport()
    torchs_own = F.scaled_dot_product_attention

    def replacement(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        reason = _why_not(query, key, value, attn_mask, is_causal, enable_gqa)
        if reason:
            report.left[reason] += 1
            return torchs_own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        report.served += 1
        return _serve(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    F.scaled_dot_product_attention = replacement
    try:
        yield report
    finally:
        F.scaled_dot_product_attention = torchs_own


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> str:
    """Why a call cannot be served; nothing if it can."""
    tensors = (query, key, value)
    if any(t.is_nested for t in tensors):
        return "nested tensors"
    if any(t.dtype not in checks.DTYPES or t.dtype != query.dtype or t.device != query.device for t in tensors):
        return "dtypes or devices that differ or are not served"
    if any(t.dim() != query.dim() for t in tensors) or not 2 <= query.dim() <= 4:
        return "not two to four dimensions"
    if backend.would_use_triton(query) and max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"a head size above {MAX_HEAD_DIM}"
    if attn_mask is not None and is_causal:
        return "attn_mask and is_causal, which torch refuses"
    batch = [t.shape[0] for t in tensors if t.dim() == 4]
    heads = [t.shape[-3] for t in tensors if t.dim() > 2]
    grouped = enable_gqa and query.dim() == 4 and heads[0] % max(heads[1], 1) == 0 and heads[1] == heads[2]
    if len(set(batch)) > 1 or (len(set(heads)) > 1 and not grouped):
        return "batches or heads that broadcast"
    if query.numel() == 0 or key.shape[-1] != query.shape[-1] or key.shape[-2] != value.shape[-2]:
        return "empty or ill-fitting tensors"
    return ""


def _serve(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, *rest: Any
) -> Tensor:
    from torch.nn.attention.bias import CausalBias, CausalVariant  # here, since its import is slow

    alignment: Any = "top_left"
    if isinstance(attn_mask, CausalBias):  # a tensor in name only
        alignment = "bottom_right" if attn_mask.variant == CausalVariant.LOWER_RIGHT else "top_left"
        attn_mask, is_causal = None, True
    leading = query.shape[:-2]
    if query.dim() == 3:  # its first dimension is torch's batch, so a mask's first one is too
        query, key, value = (t[:, None] for t in (query, key, value))
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask[:, None]
    elif query.dim() == 2:
        query, key, value = (t[None, None] for t in (query, key, value))
    out = attention(query, key, value, attn_mask, dropout_p, is_causal, *rest, alignment=alignment)
    return out.view(*leading, *out.shape[-2:]) if len(leading) < 2 else out
