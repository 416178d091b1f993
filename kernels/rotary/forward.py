"""Rotary position embedding: one kernel for query and key, forward and backward, and its launcher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu
from ..common.plan import launch
from .eager import Options, Tensors


@triton.jit(do_not_specialize=["x_strides", "out_strides", "batch_strides", "tokens", "heads_per_program", "positions"])
def rotary_kernel(
    x_ptrs, out_ptrs, cos_ptr, sin_ptr, ids_ptr, x_strides, out_strides, batch_strides, tokens, heads_per_program,
    positions, column_strides, table_strides, ids_stride, heads, half, head_size,
    COUNT: tl.constexpr, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, FAR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    # One program takes BLOCK_M tokens of a sequence and some of the heads, query's first and key's after them. It reads
    # the tokens' cosines and sines once, and each of its elements once, and writes each once.
    #   (a, b) -> (a cos - b sin, b cos + a sin)    (Su et al., "RoFormer", 2021, equation 34)
    # The pairs (a, b) are the halves of the rotated columns, or neighbours (INTERLEAVED); columns beyond are copied.
    # The backward pass is the rotation by the negative angle (INVERSE). A position out of range reads nothing and gives
    # NaN. `x_strides` and `out_strides` have those of batch, head and token, in units of UNIT, as are the tables'
    # strides of the batch. With FAR the columns of a row lie so far apart that their offsets take 64 bits.
    tiles = tl.cdiv(tokens, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_ok = token < tokens
    pair = tl.arange(0, BLOCK_H).to(tl.int64)
    row, row_ok = token, token_ok
    if ids_ptr is not None:
        row = tl.load(ids_ptr + batch * batch_strides[2] + token * ids_stride, mask=token_ok, other=0).to(tl.int64)
        row_ok = token_ok & (row >= 0) & (row < positions)
    pair_ok = row_ok[:, None] & (pair < half)[None, :]
    cos_ptrs = cos_ptr + batch * batch_strides[0] * UNIT + row[:, None] * table_strides[0]
    sin_ptrs = sin_ptr + batch * batch_strides[1] * UNIT + row[:, None] * table_strides[2]
    cos = tl.load(cos_ptrs + pair[None, :] * table_strides[1], mask=pair_ok, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptrs + pair[None, :] * table_strides[3], mask=pair_ok, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin
    half = tl.cast(half, tl.int64 if FAR else tl.int32)
    first = tl.program_id(1) * heads_per_program
    for i in tl.static_range(COUNT):
        step, out_step = column_strides[i], column_strides[COUNT + i]
        x_rows = x_ptrs[i] + (batch * x_strides[3 * i] + token[:, None] * x_strides[3 * i + 2]) * UNIT
        out_rows = out_ptrs[i] + (batch * out_strides[3 * i] + token[:, None] * out_strides[3 * i + 2]) * UNIT
        dtype = out_ptrs[i].dtype.element_ty
        for head in range(tl.maximum(first, 0), tl.minimum(first + heads_per_program, heads[i])):
            at = tl.cast(head, tl.int64)
            x_head, out_head = x_rows + at * x_strides[3 * i + 1] * UNIT, out_rows + at * out_strides[3 * i + 1] * UNIT
            if INTERLEAVED:
                column = tl.arange(0, 2 * BLOCK_H).to(half.dtype)
                inside = token_ok[:, None] & (column < 2 * half)[None, :]
                x = tl.load(x_head + column[None, :] * step, mask=inside, other=0.0).to(tl.float32)
                a, b = tl.split(x.reshape(BLOCK_M, BLOCK_H, 2))
                out = tl.join(a * cos - b * sin, b * cos + a * sin).reshape(BLOCK_M, 2 * BLOCK_H)
                tl.store(out_head + column[None, :] * out_step, out.to(dtype), mask=inside)
            else:
                column = tl.arange(0, BLOCK_H).to(half.dtype)
                inside = token_ok[:, None] & (column < half)[None, :]
                a_ptrs, a_out = x_head + column[None, :] * step, out_head + column[None, :] * out_step
                a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(a_ptrs + half * step, mask=inside, other=0.0).to(tl.float32)
                tl.store(a_out, (a * cos - b * sin).to(dtype), mask=inside)
                tl.store(a_out + half * out_step, (b * cos + a * sin).to(dtype), mask=inside)
            if BLOCK_REST > 0:
                rest = 2 * half + tl.arange(0, BLOCK_REST)
                there = token_ok[:, None] & (rest < head_size)[None, :]
                x = tl.load(x_head + rest[None, :] * step, mask=there, other=0.0)
                tl.store(out_head + rest[None, :] * out_step, x, mask=there)
        first -= heads[i]


_PROGRAMS_PER_UNIT = 8


def rotate(
    like: Tensors, options: Options, in_place: bool = False
) -> Callable[..., tuple[Tensor, Tensor | None]]:  # fmt: skip
    """A function of the tensors of a call that launches the kernel: query and key rotated, each in its memory order, or
    in its own memory."""
    query, key, cos, sin, ids = like
    index, head_size, packed, doubled = query.device.index, query.shape[-1], query.dim() == 3, cos.dim() == 3
    inputs = [t for t in (query, key) if t is not None]
    heads, places = tuple([t.shape[1] for t in inputs]), (0, 1, 0 if packed else 2)  # of batch, if any, head and token
    half = cos.shape[-1] // 2 if doubled else cos.shape[-1]
    block_h, rest = max(16, gpu.power_of_2(half)), head_size - 2 * half
    block_m, most = max(1, 1024 // block_h), _PROGRAMS_PER_UNIT * gpu.compute_units(index)
    own_tables, own_ids = doubled and cos.shape[0] != 1, ids is not None and ids.dim() == 2 and ids.shape[0] != 1
    every = inputs + (inputs if in_place else [torch.empty_like(t) for t in inputs])
    columns = tuple([t.stride(-1) for t in every])
    # Strides of results change with L, but all are multiples of the head size, or the signature has the shape.
    changing = [stride for t in every for stride in t.stride()[:-1]] + [t.stride(0) for t in (cos, sin) if own_tables]
    unit, count = math.gcd(16, head_size, *changing), sum(heads)
    go = launch(
        rotary_kernel, index, columns, (*cos.stride()[-2:], *sin.stride()[-2:]), 0 if ids is None else ids.stride(-1),
        heads, half, head_size, COUNT=len(heads), UNIT=unit, INTERLEAVED=options.interleaved, INVERSE=options.inverse,
        FAR=max(columns) * head_size >= 2**31,  # from a row's first column to its last
        BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_REST=max(16, gpu.power_of_2(rest)) if rest else 0, num_warps=4,
    )  # fmt: skip

    def run(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, ids: Any) -> tuple[Tensor, Tensor | None]:
        inputs = (query,) if key is None else (query, key)
        outs = inputs if in_place else tuple([torch.empty_like(x) for x in inputs])
        tokens = query.shape[places[2]]
        programs = -(-tokens // block_m) * (1 if packed else query.shape[0])
        if programs * count:
            heads_per_program = -(-count // max(1, most // programs))
            strides, out_strides = (tuple([t.stride(i) // unit for t in ts for i in places]) for ts in (inputs, outs))
            tables = (cos.stride(0) // unit, sin.stride(0) // unit) if own_tables else (0, 0)
            go(
                programs, -(-count // heads_per_program), inputs, outs, cos, sin, ids, strides,
                out_strides, (*tables, ids.stride(0) if own_ids else 0), tokens, heads_per_program, cos.shape[0],
            )  # fmt: skip
        return outs[0], None if key is None else outs[1]

    return run
