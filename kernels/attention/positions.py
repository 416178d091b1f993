"""Biases that depend on the distance of query and key alone, as the functions of this library take them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import checks


def alibi_slopes(nhead: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of attention with linear biases, float32 ``[nhead]``, for `attention(alibi_slopes=...)`.

    Press et al., "Train short, test long" (2022), with the interpolation of the authors' code for numbers of heads that
    are no power of two.

    Raises:
        ValueError: `nhead` below 1.

    Example:
        >>> import fusenc
        >>> fusenc.kernels.alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if not isinstance(nhead, int) or nhead < 1:
        checks.fail_value("nhead", "a number of heads, at least 1", nhead)
    power = 2 ** int(math.log2(nhead))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(nhead - power)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def t5_relative_bias(table: Tensor, *, bidirectional: bool = True, max_distance: int = 128) -> Tensor:
    """T5's bucketed bias as the `relative_bias` of `attention`: ``[H, 2 max_distance + 1]``, by distance.

    All distances from `max_distance` on share a bucket, so this is the whole bias of sequences of any length, and no
    ``L x L`` tensor arises. Differentiable in `table`. Raffel et al., 2020, section 2.1; buckets as in
    `transformers.T5Attention`.

    Args:
        table: ``[buckets, H]``, the weight of T5's ``relative_attention_bias`` embedding. Floating, any device.
        bidirectional: whether buckets tell keys before from keys after the query (encoders); else all keys after the
            query share the first bucket (decoders).
        max_distance: from this distance on, in tokens, all are alike.

    Raises:
        TypeError: `table` is no floating tensor.
        ValueError: another number of dimensions, fewer than 2 buckets (4 if bidirectional), or a `max_distance` that
            does not pass the exact buckets.

    Example:
        >>> import torch, fusenc
        >>> table = torch.randn(32, 8, requires_grad=True)
        >>> q, k, v = torch.randn(3, 1, 8, 50, 64).unbind(0)
        >>> bias = fusenc.kernels.t5_relative_bias(table)
        >>> fusenc.kernels.attention(q, k, v, scale=1.0, relative_bias=bias).shape
        torch.Size([1, 8, 50, 64])
    """
    checks.floating_tensor("table", table)
    least = 4 if bidirectional else 2
    if table.dim() != 2 or table.shape[0] < least:
        checks.fail_value("table", f"two dimensions, [buckets, H], with at least {least} buckets", table)
    buckets = table.shape[0] // (2 if bidirectional else 1)
    exact = buckets // 2
    if not isinstance(max_distance, int) or max_distance <= exact:
        checks.fail_value("max_distance", f"a distance past the {exact} exact buckets", max_distance)
    distance = torch.arange(-max_distance, max_distance + 1)  # of key - query
    far = distance.abs() if bidirectional else (-distance).clamp(min=0)
    ratio = (far.float() / exact).log() / math.log(max_distance / exact)
    wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    bucket = torch.where(far < exact, far, wide)
    if bidirectional:
        bucket = bucket + (distance > 0).long() * buckets
    return torch.nn.functional.embedding(bucket.to(table.device), table).t()
