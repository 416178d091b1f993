"""Ragged batches without their padding: the tokens of all sequences, one after the other, in one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from .kernels import attention


class Packing:
    """Where each sequence lies among packed tokens ``[T, ...]``.

    Neighbouring sequences of equal length form one group, which attention takes as one dense batch.

    Args:
        lengths: tokens of each sequence, in the order in which they are packed.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.groups: list[tuple[int, int, int]] = []
        """First token, number of sequences and length of each group; empty sequences have none."""
        start = 0
        for length, sequences in itertools.groupby(lengths):
            count = len(list(sequences))
            if length:
                self.groups.append((start, count, length))
            start += count * length

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, scale: float | None = None
    ) -> Tensor:
        """Attention inside each sequence; ``[T, H, D]`` each, as is the result."""
        parts = []
        for start, count, length in self.groups:
            q, k, v = (
                t[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)
                for t in (query, key, value)
            )
            out = attention(q, k, v, dropout_p=dropout_p, scale=scale)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else value


class PaddedPacking(Packing):
    """The packing of a padded batch, longest sequences last; it can go there and back.

    Args:
        keep: bool ``[B, L]``, True where a token is real. Real tokens may lie anywhere in a row.
    """

    def __init__(self, keep: Tensor) -> None:
        lengths = keep.sum(1)
        order = lengths.argsort(stable=True)
        sequence, position = keep[order].nonzero(as_tuple=True)
        self._tokens = order[sequence] * keep.shape[1] + position
        self._shape = keep.shape
        super().__init__(lengths[order].tolist())

    def pack(self, padded: Tensor) -> Tensor:
        """``[B, L, ...]`` to the real tokens ``[T, ...]``; differentiable."""
        return padded.flatten(0, 1).index_select(0, self._tokens)

    def unpack(self, packed: Tensor) -> Tensor:
        """``[T, ...]`` to ``[B, L, ...]`` with zeros at the padding; differentiable."""
        padded = packed.new_zeros(self._shape.numel(), *packed.shape[1:])
        return padded.index_copy(0, self._tokens, packed).unflatten(0, self._shape)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False,
    dropout_p: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.attention` with heads after tokens: ``[B, L, H, D]`` each, as is the result."""
    out = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p, is_causal, scale
    )
    return out.transpose(1, 2)
