"""Ragged batches without their padding: the tokens of all sequences, one after the other, in one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import attention, attention_varlen


class Packing:
    """Where each sequence lies among packed tokens ``[T, ...]``.

    Args:
        lengths: tokens of each sequence, in the order in which they are packed.
        device: of the tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        self.longest = max(lengths, default=0)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False,
        dropout_p: float = 0.0, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention inside each sequence; ``[T, H, D]`` each, as is the result.

        `attn_mask` is that of `attention_varlen`, indexed by positions inside each sequence.
        """
        cu_seqlens, longest = self.cu_seqlens, self.longest
        out = attention_varlen(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, attn_mask, dropout_p, is_causal, scale
        )
        assert isinstance(out, Tensor)
        return out


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
        self.shape = keep.shape
        super().__init__(lengths[order].tolist(), keep.device)

    def pack(self, padded: Tensor) -> Tensor:
        """``[B, L, ...]`` to the real tokens ``[T, ...]``; differentiable."""
        return padded.flatten(0, 1).index_select(0, self._tokens)

    def unpack(self, packed: Tensor) -> Tensor:
        """``[T, ...]`` to ``[B, L, ...]`` with zeros at the padding; differentiable."""
        padded = packed.new_zeros(self.shape.numel(), *packed.shape[1:])
        return padded.index_copy(0, self._tokens, packed).unflatten(0, self.shape)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False,
    dropout_p: float = 0.0, scale: float | None = None, window: tuple[int, int] | None = None,
    relative_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.attention` with heads after tokens: ``[B, L, H, D]`` each, as is the result."""
    out = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p, is_causal, scale,
        window=window, relative_bias=relative_bias,
    )  # fmt: skip
    return out.transpose(1, 2)
