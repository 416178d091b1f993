"""What every attention launcher derives from the arguments of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import checks, dropout
from ..common import device as gpu
from .arguments import Inputs, Options, sequences
from .blocks import Switches
from .eager import MAX_HEAD_DIM


class Call(NamedTuple):
    """The kernels' arguments that are the same in all of them."""

    sequences: int
    nhead: int
    len_q: int
    """Of the longest sequence."""
    switches: Switches
    pointers: tuple[Tensor | None, ...]
    strides: tuple[tuple[int, ...], ...]
    strides_of_terms: tuple[tuple[int, ...], ...]
    strides_of_map: tuple[int, ...]
    sizes: tuple[object, ...]


def describe(inputs: Inputs, options: Options, start_position: int = 0) -> Call:
    """Pointers, strides (0 where a tensor broadcasts), numbers and compile-time switches of a call.

    Raises:
        ValueError: a head size that the kernels do not take.
    """
    query, key, value, attn_mask = inputs.query, inputs.key, inputs.value, inputs.attn_mask
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > MAX_HEAD_DIM:
            checks.fail_value(name, f"a head size of at most {MAX_HEAD_DIM} on the kernels", tensor)
    batch, nhead = sequences(inputs, options), query.shape[1]
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    mask = "none"
    if attn_mask is not None:
        mask = "bool" if attn_mask.dtype == torch.bool else "float"
        mask_strides = broadcast_strides(attn_mask)
    relative, slopes = inputs.relative_bias, inputs.alibi_slopes
    relative_stride = 0 if relative is None or relative.shape[0] == 1 else relative.stride(0)
    slope_strides = (0, 0) if slopes is None else broadcast_strides(slopes)
    block_map = inputs.block_map
    added = mask == "float" or relative is not None or slopes is not None or options.softcap > 0.0
    switches = Switches(
        SEQUENCES="packed" if options.packed else "dense" if inputs.seqlens_q is None else "lengths",
        LEFT=options.left >= 0,
        RIGHT=options.right >= 0,
        BOTTOM_RIGHT=options.bottom_right,
        MASK=mask,
        MASK_ROWS=mask_strides[2] != 0,
        RELATIVE=relative is not None,
        ALIBI=slopes is not None,
        SOFTCAP=options.softcap > 0.0,
        ADDED=added,
        SPARSE=0 if inputs.tiles is None else inputs.tiles.shape[1],
        GROUPED=key.shape[1] != nhead,
        DROPOUT=options.dropout_p > 0.0,
        FLOAT8=inputs.scales is not None,
        PRECISION=gpu.input_precision(query),
        WIDE=any(reaches_far(t) for t in (query, key, value, attn_mask) if t is not None),
        HEAD_DIM=query.shape[3],
        VALUE_DIM=value.shape[3],
        BLOCK_D=max(16 if inputs.scales is None else 32, gpu.power_of_2(query.shape[3])),
        BLOCK_DV=max(16, gpu.power_of_2(value.shape[3])),
    )
    reach = 0 if relative is None else relative.shape[1] // 2
    numbers = (options.softmax_scale, options.softcap, dropout.keep_scale(options.dropout_p))
    return Call(
        batch, nhead, options.max_len_q, switches,
        (attn_mask, relative, slopes, inputs.seed, inputs.seqlens_q, inputs.seqlens_k),
        (query.stride(), key.stride(), value.stride()),
        (mask_strides, (relative_stride, *slope_strides)),
        (0, 0, 0, 0) if block_map is None else broadcast_strides(block_map),
        (
            (nhead, nhead // key.shape[1]), (query.shape[2], key.shape[2]), options.max_len_q, options.max_len_k,
            (options.left, options.right, start_position, reach), numbers, dropout.threshold(options.dropout_p),
        ),
    )  # fmt: skip


def reaches_far(t: Tensor) -> bool:
    """Whether an offset inside one sequence and head passes 31 bits. A block may begin at the last element."""
    return sum((size + 128) * abs(stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True)) >= 2**31


def strides_of_list(blocks: Tensor | None) -> tuple[int, ...]:
    """Batch, head and row strides of one of a block mask's lists."""
    return (0, 0, 0) if blocks is None else broadcast_strides(blocks)[:3]


def broadcast_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of a tensor, 0 in dimensions of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))


def empty_in_order_of(like: Tensor, last: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor shaped as `like` but for its last dimension, with dimensions in like's memory order."""
    order = sorted(range(3), key=lambda i: like.stride(i), reverse=True)
    shape = [like.shape[i] for i in order] + [last]
    back = [order.index(i) for i in range(3)] + [3]
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device).permute(back)
