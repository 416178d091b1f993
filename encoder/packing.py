"""Ragged batches without their padding: the tokens of all sequences, one after the other, in one tensor.

`pack` and `unpack` go from a padded batch to a `PackedTokens` and back. The encoder modules of this library take a
`PackedTokens` in the place of a padded batch and return one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .kernels.attention.eager import require_starts
from .kernels.attention.op import check_starts
from .kernels.common import checks
from .padding import RealTokens

__all__ = ["PackedTokens", "pack", "unpack"]


class PaddedPacking:
    """Where the real tokens of a padded batch lie, there and when packed.

    Args:
        tokens: bool ``[B, L]``, True where a token is real, or what is known of them. Real tokens may lie anywhere in a
            row. A GPU is waited for once, unless they are known.
        batch_first: whether padded tensors are ``[B, L, ...]`` or ``[L, B, ...]``.
        sort: pack the longest sequences last, so that those of equal length are neighbours, whose attention eager
            PyTorch computes at once; else in the order of the batch.
    """

    def __init__(self, tokens: Tensor | RealTokens, *, batch_first: bool = True, sort: bool = True) -> None:
        known = tokens if isinstance(tokens, RealTokens) else RealTokens.read(tokens)
        assert known is not None  # there is no condition
        keep, lengths, counts = known
        (batch, length), total = keep.shape, sum(counts)
        self.order: Tensor | None = None
        """``[B]``: the row of the batch that each packed sequence is; None: in the order of the batch."""
        if sort:
            self.order = lengths.argsort(stable=True)
            keep, lengths = keep[self.order], lengths[self.order]
        # Real token n is where the running number of real tokens reaches n; nonzero would wait for a GPU.
        ordinals = torch.arange(1, total + 1, device=keep.device)
        found = torch.searchsorted(keep.flatten().cumsum(0), ordinals)
        row, position = found // max(length, 1), found % max(length, 1)
        row = row if self.order is None else self.order[row]
        self.indices = row * length + position if batch_first else position * batch + row
        """``[T]``: where in the flattened padded batch each packed token lies."""
        self.shape, self.batch_first = (batch, length) if batch_first else (length, batch), batch_first
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.max_length: int = max(counts, default=0)

    @classmethod
    def behind(cls, cu_seqlens: Tensor, max_length: int, total: int) -> Self:
        """Of packed sequences with the padding behind each. A GPU is not waited for."""
        self = cls.__new__(cls)
        batch, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
        row = torch.arange(batch, device=device).repeat_interleave(cu_seqlens.diff(), output_size=total)
        position = torch.arange(total, device=device) - cu_seqlens[row]
        self.order, self.indices = None, row * max_length + position
        self.shape, self.batch_first = (batch, max_length), True
        self.cu_seqlens, self.max_length = cu_seqlens, max_length
        return self

    def to(self, device: torch.device) -> PaddedPacking:
        """The same for tensors on another device."""
        moved = copy.copy(self)
        moved.order = None if self.order is None else self.order.to(device)
        moved.indices, moved.cu_seqlens = self.indices.to(device), self.cu_seqlens.to(device)
        return moved

    def pack(self, padded: Tensor) -> Tensor:
        """``[B, L, ...]`` to the real tokens ``[T, ...]``; differentiable."""
        return padded.flatten(0, 1).index_select(0, self.indices)

    def unpack(self, packed: Tensor, padding_value: float = 0.0) -> Tensor:
        """``[T, ...]`` to ``[B, L, ...]`` with one value at the padding; differentiable."""
        padded = packed.new_full((self.shape[0] * self.shape[1], *packed.shape[1:]), padding_value)
        return padded.index_copy(0, self.indices, packed).unflatten(0, self.shape)

    def key_padding_mask(self) -> Tensor:
        """Bool ``[B, L]``, True at the padding, as in torch.nn."""
        mask = torch.ones(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.indices.device)
        mask = mask.index_fill(0, self.indices, False).view(self.shape)
        return mask if self.batch_first else mask.t()


class FlattenedPacking(PaddedPacking):
    """Sequences that lie one after the other in a batch of one row already."""

    def __init__(self, cu_seqlens: Tensor, max_length: int, total: int) -> None:
        self.order, self.shape, self.batch_first = None, (1, total), True
        self.cu_seqlens, self.max_length = cu_seqlens, max_length
        self.indices = torch.arange(total, device=cu_seqlens.device)

    def pack(self, padded: Tensor) -> Tensor:
        """``[1, T, ...]`` to ``[T, ...]``"""
        return padded.squeeze(0)

    def unpack(self, packed: Tensor, padding_value: float = 0.0) -> Tensor:
        """And back."""
        return packed.unsqueeze(0)

    def positions(self) -> Tensor:
        """``[T]``: the place of each token in its sequence."""
        return PaddedPacking.behind(self.cu_seqlens, self.max_length, self.shape[1]).indices % self.max_length


class UnflattenedPacking(PaddedPacking):
    """Of a batch of one row whose sequences were each given a row: back to the one row."""

    def padded(self, packed: Tensor) -> Tensor:
        """``[T, ...]`` to ``[B, L, ...]`` with 0 at the padding."""
        return super().unpack(packed)

    def unpack(self, packed: Tensor, padding_value: float = 0.0) -> Tensor:
        """``[T, ...]`` to ``[1, T, ...]``"""
        return packed.unsqueeze(0)


@dataclass(frozen=True, eq=False, slots=True)
class PackedTokens:
    """A ragged batch: the tokens of all sequences, one after the other, and where each sequence begins.

    What `torch.nn.utils.rnn.PackedSequence` is to time steps this is to tokens: made by `pack`, from sequences or from
    nested tensors, taken and returned by the encoder modules, turned back by `unpack`. Iterating gives the sequences
    ``[L_i, ...]``, views of `data`, and ``len`` their number. It does not change; `with_data` makes another.

    Args:
        data: ``[T, ...]``, the tokens.
        cu_seqlens: int32 or int64 ``[B + 1]`` on the device of `data`, kept as int32: the first token of each sequence,
            and T at the end, as in `fusenc.kernels.attention_varlen`.
        max_length: tokens of the longest sequence. None: found out, for which a GPU is waited for.
        padding: how to get back to the padded batch; `pack` sets it.

    Raises:
        TypeError: `data` is no tensor, or `cu_seqlens` no tensor of integers.
        ValueError: `cu_seqlens` that do not begin at 0, descend, do not end at T or lie on another device; a
            `max_length` below the longest sequence. On a GPU values are looked at only if `max_length` is None.

    Example:
        >>> import torch, fusenc
        >>> packed = fusenc.packing.PackedTokens(torch.randn(7, 16), torch.tensor([0, 4, 7]))
        >>> packed.lengths.tolist(), packed.max_length, [len(sequence) for sequence in packed]
        ([4, 3], 4, [4, 3])
    """

    data: Tensor
    cu_seqlens: Tensor
    max_length: int = None  # type: ignore[assignment] # never after construction
    padding: PaddedPacking | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data, Tensor):
            checks.fail_type("data", "a tensor", self.data)
        if self.data.dim() == 0:
            checks.fail_value("data", "at least one dimension, [T, ...]", self.data)
        starts, total = self.cu_seqlens, self.data.shape[0]
        if self.max_length is None:
            longest = 0
            if isinstance(starts, Tensor) and starts.dim() == 1 and starts.shape[0] > 1:
                host = starts.cpu()  # whoever waits for the longest sequence may as well look at all
                longest = max(0, int(host.diff().max()))
                require_starts("cu_seqlens", host, total, "max_length", longest)
            object.__setattr__(self, "max_length", longest)
        check_starts("cu_seqlens", starts, "max_length", self.max_length, self.data)
        if not torch.compiler.is_compiling():
            require_starts("cu_seqlens", starts, total, "max_length", self.max_length)  # type: ignore[arg-type]
        object.__setattr__(self, "cu_seqlens", starts.int())

    @classmethod
    def _of(cls, data: Tensor, cu_seqlens: Tensor, max_length: int, padding: PaddedPacking | None) -> PackedTokens:
        """Without the checks."""
        self = object.__new__(cls)
        put = object.__setattr__
        put(self, "data", data)
        put(self, "cu_seqlens", cu_seqlens)
        put(self, "max_length", max_length)
        put(self, "padding", padding)
        return self

    @classmethod
    def of_padded(cls, padded: Tensor, packing: PaddedPacking) -> PackedTokens:
        """A padded batch in a packing that is made for it."""
        return cls._of(packing.pack(padded), packing.cu_seqlens, packing.max_length, packing)

    @classmethod
    def from_sequences(cls, sequences: Iterable[Tensor]) -> PackedTokens:
        """From sequences ``[L_i, ...]`` with equal trailing dimensions; differentiable.

        Raises:
            TypeError: an element that is no tensor.
            ValueError: no sequence at all, or dimensions that do not agree.
        """
        sequences = list(sequences)
        if not sequences:
            checks.fail_value("sequences", "at least one tensor", sequences)
        for i, t in enumerate(sequences):
            if not isinstance(t, Tensor):
                checks.fail_type(f"sequences[{i}]", "a tensor", t)
            if t.dim() == 0 or t.shape[1:] != sequences[0].shape[1:]:
                expected = ", ".join(["length", *map(str, sequences[0].shape[1:])])
                checks.fail_value(f"sequences[{i}]", f"shape [{expected}]", t)
        lengths = [t.shape[0] for t in sequences]
        data = torch.cat(sequences)
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=data.device)
        return cls._of(data, starts, max(lengths), None)

    @classmethod
    def from_nested(cls, nested: Tensor) -> PackedTokens:
        """From a nested tensor of torch, ``[B, *, ...]``, of strided or jagged layout; differentiable.

        Raises:
            TypeError: not a nested tensor.
            ValueError: a jagged one whose ragged dimension is not the second; a strided one of no sequence, or with
                several ragged dimensions.
        """
        if not isinstance(nested, Tensor) or not nested.is_nested:
            checks.fail_type("nested", "a nested tensor", nested)
        if nested.layout != torch.jagged:
            return cls.from_sequences(nested.unbind())
        jagged: Any = nested
        if jagged._ragged_idx != 1:
            raise ValueError(f"nested: expected a ragged second dimension, got shape {tuple(nested.shape)}")
        if jagged.lengths() is not None:  # there are holes between the sequences
            jagged = jagged.contiguous()
        return cls._of(jagged.values(), jagged.offsets().int(), jagged._max_seqlen, None)

    def to_nested(self, layout: torch.layout = torch.jagged) -> Tensor:
        """The sequences as a nested tensor of torch, of jagged or strided layout; differentiable."""
        if layout == torch.strided:
            return torch.nested.as_nested_tensor(list(self), layout=torch.strided)
        if layout != torch.jagged:
            checks.fail_value("layout", "torch.jagged or torch.strided", layout)
        return torch.nested.nested_tensor_from_jagged(self.data, self.cu_seqlens.long(), max_seqlen=self.max_length)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 ``[B]``."""
        return self.cu_seqlens.diff()

    def with_data(self, data: Tensor) -> PackedTokens:
        """The same sequences with other data ``[T, ...]``.

        Raises:
            ValueError: another number of tokens.
        """
        if data.dim() == 0 or data.shape[0] != self.data.shape[0]:
            checks.fail_value("data", f"{self.data.shape[0]} tokens", data)
        return self._of(data, self.cu_seqlens, self.max_length, self.padding)

    def to(self, *args: Any, **kwargs: Any) -> PackedTokens:
        """`torch.Tensor.to` of the data; where that goes to another device, so does the rest."""
        data = self.data.to(*args, **kwargs)
        if data.device == self.data.device:
            return self.with_data(data)
        padding = None if self.padding is None else self.padding.to(data.device)
        return self._of(data, self.cu_seqlens.to(data.device), self.max_length, padding)

    def way_back(self) -> PaddedPacking:
        """To the padded batch that this was, else to one of ``[B, max_length, ...]`` with the padding behind."""
        if self.padding is not None:
            return self.padding
        return PaddedPacking.behind(self.cu_seqlens, self.max_length, self.data.shape[0])

    def key_padding_mask(self) -> Tensor:
        """Of the batch that `unpack` gives: bool ``[B, L]``, True at the padding, as in torch.nn."""
        return self.way_back().key_padding_mask()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"PackedTokens has no {name!r}. It is no tensor: TransformerEncoder and TransformerEncoderLayer take it, "
            "others its `data` or what `unpack` makes of it"
        )

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def __iter__(self) -> Iterator[Tensor]:
        """The sequences, views of `data`; on a GPU their lengths are waited for."""
        return iter(self.data.split(self.lengths.tolist()))


def pack(padded: Tensor, key_padding_mask: Tensor | None = None, *, batch_first: bool = True) -> PackedTokens:
    """The real tokens of a padded batch, without the padding; differentiable.

    Args:
        padded: ``[B, L, ...]``, or ``[L, B, ...]`` if `batch_first` is False.
        key_padding_mask: bool ``[B, L]``, **True is padding**, as in torch.nn; anywhere in a row. None: no padding.
        batch_first: the order of the first two dimensions of `padded`.

    Returns:
        The sequences in the order of the batch, which `unpack` gives back. On a GPU the number of tokens is waited for.

    Raises:
        TypeError: `padded` is no tensor, or the mask no bool tensor.
        ValueError: fewer than two dimensions, or a mask of another shape or device.

    Example:
        >>> import torch
        >>> from fusenc.packing import pack, unpack
        >>> x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
        >>> packed = pack(x, padding)
        >>> packed.data.shape, packed.cu_seqlens.tolist()
        (torch.Size([8, 8]), [0, 5, 8])
        >>> torch.equal(unpack(packed), x.masked_fill(padding[..., None], 0.0))
        True
    """
    if not isinstance(padded, Tensor):
        checks.fail_type("padded", "a tensor", padded)
    if padded.dim() < 2:
        checks.fail_value("padded", "at least two dimensions", padded)
    batch, length = padded.shape[:2] if batch_first else padded.shape[1::-1]
    if key_padding_mask is None:
        key_padding_mask = torch.zeros((batch, length), dtype=torch.bool, device=padded.device)
    elif not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        checks.fail_type("key_padding_mask", "a bool tensor, True at the padding", key_padding_mask)
    if tuple(key_padding_mask.shape) != (batch, length) or key_padding_mask.device != padded.device:
        checks.fail_value("key_padding_mask", f"shape [{batch}, {length}] on {padded.device}", key_padding_mask)
    return PackedTokens.of_padded(padded, PaddedPacking(~key_padding_mask, batch_first=batch_first, sort=False))


def unpack(packed: PackedTokens, padding_value: float = 0.0) -> Tensor:
    """The padded batch of packed tokens; differentiable.

    Args:
        packed: from `pack`, or any other.
        padding_value: what stands at the padding.

    Returns:
        The batch in the shape that `pack` was given; of another value ``[B, max_length, ...]``, the padding behind.

    Raises:
        TypeError: `packed` is no `PackedTokens`.

    Example:
        >>> import torch
        >>> from fusenc.packing import PackedTokens, unpack
        >>> unpack(PackedTokens.from_sequences([torch.ones(2), torch.ones(3)]), padding_value=-1.0)
        tensor([[ 1.,  1., -1.],
                [ 1.,  1.,  1.]])
    """
    if not isinstance(packed, PackedTokens):
        checks.fail_type("packed", "a PackedTokens", packed)
    return packed.way_back().unpack(packed.data, padding_value)


def in_the_kind_of(given: PackedTokens | Tensor, packed: PackedTokens) -> Any:
    """Packed results as what was given: packed, or a nested tensor of the same layout and sequences."""
    if isinstance(given, PackedTokens):
        return packed
    if given.layout == torch.jagged:
        jagged: Any = given
        # The same offsets make it of the same ragged shape for torch, so that the two can be added.
        starts = jagged.offsets() if jagged.lengths() is None else packed.cu_seqlens.long()
        return torch.nested.nested_tensor_from_jagged(packed.data, starts, max_seqlen=packed.max_length)
    sizes = given._nested_tensor_size()
    layout = torch._nested_compute_contiguous_strides_offsets(sizes)
    return torch._nested_view_from_buffer(packed.data.contiguous().view(-1), sizes, *layout)
