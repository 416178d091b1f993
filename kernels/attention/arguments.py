"""What one attention call is made of, in the one form that every path takes."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNITS = (16, *[1] * 7, 8, *[1] * 7)
"""By the last four bits of all its strides: what divides them, of 16, 8 and 1."""


class Tensors(NamedTuple):
    """The tensors of a call. None where it has none."""

    query: Tensor
    """``[B, H, Lq, D]``; of a packed batch ``[T, H, D]`` or ``[1, H, T, D]``."""
    key: Tensor
    """``[B, Hk, Lk, D]``, likewise; Hk divides H."""
    value: Tensor
    """``[B, Hk, Lk, Dv]``, likewise."""
    attn_mask: Tensor | None = None
    """bool or floating, four dimensions, each 1 or that of ``[B, H, Lq, Lk]`` (packed: of the longest sequences)."""
    relative_bias: Tensor | None = None
    """``[1 or H, 2 R + 1]``, contiguous: added to a score by the distance key - query, clipped to -R..R."""
    alibi_slopes: Tensor | None = None
    """``[H]`` or ``[B, H]``: ``-slope * |distance|`` is added."""
    seqlens_q: Tensor | None = None
    """Integers: ``[B]`` lengths of padded sequences, or ``[B + 1]`` first rows of packed ones."""
    seqlens_k: Tensor | None = None
    block_map: Tensor | None = None
    """int32 ``[1 or B, 1 or H, blocks of queries, blocks of keys]``; see `BlockMask`."""
    blocks_of_query: Tensor | None = None
    blocks_of_key: Tensor | None = None
    tiles: Tensor | None = None
    seed: Tensor | None = None
    """Key of the dropout, int64 ``[1]``."""


Saved = namedtuple(
    "Saved",
    "query key value attn_mask relative_bias alibi_slopes seqlens_q seqlens_k block_map blocks_of_query blocks_of_key "
    "tiles seed out statistics",
)
"""What the backward pass is given: the tensors, and what the forward pass made of them. `statistics` are float32: of
each row the log-sum-exp to base 2, or two parts of it; see `blocks.load_statistics`."""


class Options(NamedTuple):
    """The numbers of a call."""

    softmax_scale: float
    """Above 0; a scale of another sign is folded into the query."""
    dropout_p: float = 0.0
    softcap: float = 0.0
    """0: none."""
    left: int = -1
    """How many keys before its own position a query sees; -1: all."""
    right: int = -1
    bottom_right: bool = False
    """Position of query i among the keys: i, or with this i + Lk - Lq."""
    packed: bool = False
    """The sequences lie one after the other, without padding; else `seqlens` are the lengths of padded ones."""
    return_lse: bool = False
    average: bool = False
    """Softmax weights are averaged over the heads."""


def added(tensors: Any, options: Options) -> bool:
    """True if scores are more than products: softcap, or a term that is added."""
    mask = tensors.attn_mask is not None and tensors.attn_mask.dtype != torch.bool
    return mask or options.softcap > 0.0 or not tensors.relative_bias is tensors.alibi_slopes is None


def wide_dtype(query: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
