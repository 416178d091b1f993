"""What the plans of all attention kernels are made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import checks, dropout
from ..common import device as gpu
from ..common.plan import launch
from .arguments import UNITS, Options, added
from .blocks import Numbers, Switches
from .eager import MAX_HEAD_DIM


class Call:
    """What a plan knows of calls with tensors like `like`, and how it finds the rest; `others` beside query, key and
    value are operands of its kernels too.

    Strides of rows and columns are part of the key. Those of batches and heads change with the lengths: the kernels get
    them, and all strides of results, in units of `Switches.UNIT`.

    Raises:
        ValueError: a head size that the kernels do not take.
    """

    def __init__(self, like: Any, options: Options, sizes: Sequence[int], *others: Tensor) -> None:
        query, key, value, mask = like.query, like.key, like.value, like.attn_mask
        head_dim, value_dim, nhead = query.shape[-1], value.shape[-1], query.shape[1]
        for name, t in (("query", query), ("value", value)):
            if t.shape[-1] > MAX_HEAD_DIM:
                checks.fail_value(name, f"a head size of at most {MAX_HEAD_DIM} on the kernels", t)
        operands = (query, key, value, *others)
        self.index, self.packed = query.device.index, query.dim() == 3
        self.rows = row = 0 if self.packed else 2
        """The dimension of the tensors that are rows."""
        low_bits = head_dim | value_dim
        for t in operands:
            low_bits |= t.stride(1) if self.packed else t.stride(0) | t.stride(1)
        # The largest of all lengths that share the key. A block may begin at the last element.
        longest = (1 << (max(sizes[:2]) - 1).bit_length()) + 128
        wide = any(longest * t.stride(row) + (t.shape[-1] + 128) * t.stride(-1) >= 2**31 for t in operands)
        mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        if mask is not None:
            *_, rows, columns = mask.shape
            mask_strides = broadcast_strides(mask)
            wide = wide or (rows + 128) * mask_strides[2] + (columns + 128) * mask_strides[3] >= 2**31
        ragged = not like.seqlens_q is like.seqlens_k is None
        self.unit, self.key_unit = UNITS[low_bits & 15], 1
        if not ragged or not mask is like.tiles is None or len(sizes) > 2:
            self.key_unit = 1 if (mask_strides[0] | mask_strides[1] | mask_strides[2] | sizes[1]) & 15 else 16
        self.longest_row = 2**62 if wide else (2**31 - 1 - 512) // longest // self.unit
        relative, slopes = like.relative_bias, like.alibi_slopes
        self.switches = Switches(
            SEQUENCES="packed" if options.packed else "lengths" if ragged else "dense", LEFT=options.left >= 0,
            RIGHT=options.right >= 0, BOTTOM_RIGHT=options.bottom_right,
            MASK="none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
            MASK_ROWS=mask_strides[2] != 0, RELATIVE=relative is not None, ALIBI=slopes is not None,
            SOFTCAP=options.softcap > 0.0, ADDED=added(like, options),
            SPARSE=0 if like.tiles is None else like.tiles.shape[1], GROUPED=key.shape[1] != nhead,
            DROPOUT=options.dropout_p > 0.0, PRECISION=gpu.input_precision(query), WIDE=wide, UNIT=self.unit,
            KEY_UNIT=self.key_unit, HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=max(16, gpu.power_of_2(head_dim)),
            BLOCK_DV=max(16, gpu.power_of_2(value_dim)),
        )  # fmt: skip
        blocks = (like.block_map, like.blocks_of_query, like.blocks_of_key)
        of_map, of_query, of_key = ((0,) * 4 if t is None else broadcast_strides(t) for t in blocks)
        self.numbers = Numbers(
            nhead, nhead // key.shape[1], options.left, options.right,
            0 if relative is None else relative.shape[1] // 2, options.softmax_scale, options.softcap,
            dropout.keep_scale(options.dropout_p), dropout.threshold(options.dropout_p),
            0 if relative is None else broadcast_strides(relative)[0],
            *((0, 0) if slopes is None else (0, *slopes.stride())[-2:]), *of_map, *of_query[:3], *of_key[:3],
        )  # fmt: skip
        inner = tuple([stride for t in operands for stride in (t.stride(row), t.stride(-1))])
        self.fixed = (inner, mask_strides[3], self.numbers)

    def launch(self, kernel: Any, config: Any, *fixed: Any, **constants: Any) -> Callable[..., None]:
        """A function that launches a kernel with the arguments that change: the others follow these."""
        switches = self.switches._replace(BLOCK_M=config.block_m, BLOCK_N=config.block_n)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return launch(kernel, self.index, *self.fixed, *fixed, **constants, S=switches, **options)

    def changing(self, tensors: Sequence[Any], max_len_q: int, max_len_k: int, *others: Tensor) -> tuple[Any, ...]:
        """The last of the arguments that change."""
        unit, key_unit, packed = self.unit, self.key_unit, self.packed
        strides: tuple[int, ...] = ()
        for t in (*tensors[:3], *others):
            of_t = t.stride()
            strides += (0 if packed else of_t[0] // unit, of_t[1] // unit)
        mask, strides_mask = tensors[3], (0, 0, 0)
        if mask is not None:
            b, h, m, _ = broadcast_strides(mask)
            strides_mask = (b // key_unit, h // key_unit, m // key_unit)
        totals = tensors[0].shape[self.rows], tensors[1].shape[self.rows]
        return strides, strides_mask, totals, max_len_q, max_len_k // key_unit

    def result(self, t: Tensor) -> tuple[int, int, int]:
        """Strides of batches, heads and rows of a result."""
        strides = t.stride()
        return 0 if self.packed else strides[0] // self.unit, strides[1] // self.unit, strides[self.rows] // self.unit

    def new_result(self, like: Tensor, last: int) -> tuple[Tensor, tuple[int, int, int]]:
        """An uninitialised tensor shaped as `like` but for its last size, with the other dimensions in like's memory
        order, and its strides."""
        shape = (*like.shape[:-1], last)
        out = torch.empty_like(like if like.shape[-1] == last else like[..., :1].expand(shape))
        strides = self.result(out)
        if strides[2] > self.longest_row or out.stride(-1) != 1:
            out = like.new_empty(shape)
            strides = self.result(out)
        return out, strides

    def rows_of(self, t: Tensor) -> tuple[int, ...]:
        """Batch, heads and rows of a tensor; of a packed one heads and rows."""
        return t.shape[1::-1] if self.packed else t.shape[:3]


def sequences(tensors: Sequence[Any], packed: bool) -> int:
    """How many sequences a call has."""
    return tensors[6].shape[0] - 1 if packed else tensors[0].shape[0]


def broadcast_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of a tensor, 0 in dimensions of size 1."""
    return tuple([0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)])
