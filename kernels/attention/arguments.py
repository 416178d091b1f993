"""What one attention call is made of, in the one form that every path takes: tensors and options."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import checks


class Inputs(NamedTuple):
    """The tensors of a call. None where it has none."""

    query: Tensor
    """``[B, H, Lq, D]``; of a packed batch ``[1, H, Tq, D]``."""
    key: Tensor
    """``[B, Hk, Lk, D]``, likewise; Hk divides H."""
    value: Tensor
    """``[B, Hk, Lk, Dv]``, likewise."""
    attn_mask: Tensor | None = None
    """bool or floating, four dimensions, each 1 or that of ``[B, H, Lq, Lk]`` (packed: of the longest sequences)."""
    relative_bias: Tensor | None = None
    """``[1 or H, 2 R + 1]``: what is added to a score by the distance key - query, clipped to -R..R."""
    alibi_slopes: Tensor | None = None
    """float32 ``[1 or B, H]``: ``-slope * |distance|`` is added."""
    seed: Tensor | None = None
    """Key of the dropout, int64 ``[1]``."""
    seqlens_q: Tensor | None = None
    """int32: ``[B]`` lengths of padded sequences, or ``[B + 1]`` first rows of packed ones."""
    seqlens_k: Tensor | None = None
    block_map: Tensor | None = None
    """int32 ``[1 or B, 1 or H, blocks of queries, blocks of keys]``; see `BlockMask`."""
    blocks_of_query: Tensor | None = None
    blocks_of_key: Tensor | None = None
    tiles: Tensor | None = None
    scales: Tensor | None = None
    """Of float8 inputs: float32 ``[B, H, 2]``, what products of query and key and what values are multiplied by."""


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
    max_len_q: int = 0
    """Longest sequence; of a dense batch Lq."""
    max_len_k: int = 0


def sequences(inputs: Inputs, options: Options) -> int:
    """How many sequences a call has, padded or packed."""
    if options.packed:
        assert inputs.seqlens_q is not None
        return inputs.seqlens_q.shape[0] - 1
    return inputs.query.shape[0]


def position_offset(options: Options, len_q: int, len_k: int) -> int:
    """Position of the first query among the keys."""
    return len_k - len_q if options.bottom_right else 0


def output_dtype(query: Tensor) -> torch.dtype:
    """The query's, or of a float8 call bfloat16."""
    return torch.bfloat16 if query.dtype in checks.FLOAT8 else query.dtype


def wide_dtype(query: Tensor) -> torch.dtype:
    """What is computed in: float32, or float64 for float64."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
