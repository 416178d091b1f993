"""Rotary position embedding: one kernel for query and key, forward and backward, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import device as gpu


@triton.jit
def rotate_heads(
    x_ptr, out_ptr, batch, token, token_ok, strides, out_strides, first, last, cos, sin, half, head_size,
    INTERLEAVED: tl.constexpr, REST: tl.constexpr, FAR: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate heads `first` to `last` of some tokens and copy the columns beyond the rotated ones."""
    half = tl.cast(half, tl.int64 if FAR else tl.int32)
    x_rows = x_ptr + batch * strides[0] + token[:, None] * strides[2]
    out_rows = out_ptr + batch * out_strides[0] + token[:, None] * out_strides[2]
    dtype = out_ptr.dtype.element_ty
    for head in range(first, last):
        at = tl.cast(head, tl.int64)
        x_head, out_head = x_rows + at * strides[1], out_rows + at * out_strides[1]
        if INTERLEAVED:
            column = tl.arange(0, 2 * BLOCK_H).to(half.dtype)
            inside = token_ok[:, None] & (column < 2 * half)[None, :]
            x = tl.load(x_head + column[None, :] * strides[3], mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(x.reshape(token.shape[0], BLOCK_H, 2))
            out = tl.join(a * cos - b * sin, b * cos + a * sin).reshape(token.shape[0], 2 * BLOCK_H)
            tl.store(out_head + column[None, :] * out_strides[3], out.to(dtype), mask=inside)
        else:
            column = tl.arange(0, BLOCK_H).to(half.dtype)
            inside = token_ok[:, None] & (column < half)[None, :]
            a_ptrs, a_out = x_head + column[None, :] * strides[3], out_head + column[None, :] * out_strides[3]
            b_ptrs, b_out = a_ptrs + half * strides[3], a_out + half * out_strides[3]
            a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptrs, mask=inside, other=0.0).to(tl.float32)
            tl.store(a_out, (a * cos - b * sin).to(dtype), mask=inside)
            tl.store(b_out, (b * cos + a * sin).to(dtype), mask=inside)
        if REST:
            column = 2 * half + tl.arange(0, BLOCK_REST)
            there = token_ok[:, None] & (column < head_size)[None, :]
            rest = tl.load(x_head + column[None, :] * strides[3], mask=there, other=0.0)
            tl.store(out_head + column[None, :] * out_strides[3], rest, mask=there)


@triton.jit(do_not_specialize=["tokens", "tiles", "heads_per_program", "positions"])
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, ids_ptr, q_out_ptr, k_out_ptr, q_strides, k_strides, q_out_strides, k_out_strides,
    table_strides, ids_strides, tokens, tiles, heads_q, heads_k, heads_per_program, positions, half, head_size,
    HAS_IDS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr,
    FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    # One program takes BLOCK_M tokens of a sequence and some of the heads, query's first and key's after them. It reads
    # the tokens' cosines and sines once, and each of its elements once, and writes each once.
    #   (a, b) -> (a cos - b sin, b cos + a sin)    (Su et al., "RoFormer", 2021, equation 34)
    # The pairs (a, b) are the two halves of the rotated columns, or neighbours (INTERLEAVED). The backward pass is the
    # rotation by the negative angle (INVERSE). A position out of range reads nothing and gives NaN. With FAR the
    # columns of a row lie so far apart that their offsets take 64 bits.
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_ok = token < tokens
    pair = tl.arange(0, BLOCK_H).to(tl.int64)
    row, row_ok = token, token_ok
    if HAS_IDS:
        row = tl.load(ids_ptr + batch * ids_strides[0] + token * ids_strides[1], mask=token_ok, other=0).to(tl.int64)
        row_ok = token_ok & (row >= 0) & (row < positions)
    inside = row_ok[:, None] & (pair < half)[None, :]
    offsets = batch * table_strides[0] + row[:, None] * table_strides[1] + pair[None, :] * table_strides[2]
    cos = tl.load(cos_ptr + offsets, mask=inside, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=inside, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin
    first = tl.program_id(1) * heads_per_program
    last = tl.minimum(first + heads_per_program, heads_q + heads_k)
    rotate_heads(
        q_ptr, q_out_ptr, batch, token, token_ok, q_strides, q_out_strides, first, tl.minimum(last, heads_q),
        cos, sin, half, head_size, INTERLEAVED, REST, FAR, BLOCK_H, BLOCK_REST,
    )  # fmt: skip
    rotate_heads(
        k_ptr, k_out_ptr, batch, token, token_ok, k_strides, k_out_strides, tl.maximum(first - heads_q, 0),
        last - heads_q, cos, sin, half, head_size, INTERLEAVED, REST, FAR, BLOCK_H, BLOCK_REST,
    )  # fmt: skip


_PROGRAMS_PER_UNIT = 8


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, head, token and column."""
    return (0, x.stride(1), x.stride(0), x.stride(2)) if x.dim() == 3 else x.stride()


def rotate(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Launch the kernel: query and key rotated, each in its memory order."""
    out = torch.empty_like(query)
    key_out = None if key is None else torch.empty_like(key)
    if query.dim() == 3:
        batch, (tokens, heads_q, head_size) = 1, query.shape
    else:
        batch, heads_q, tokens, head_size = query.shape
    heads_k = 0 if key is None else key.shape[-2 if key.dim() == 3 else 1]
    if batch * tokens * (heads_q + heads_k) == 0:
        return out, key_out
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    doubled = cos.dim() == 3
    half = cos.shape[-1] // 2 if doubled else cos.shape[-1]
    table_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, *cos.stride()[1:]) if doubled else (0, *cos.stride())
    ids = query if position_ids is None else position_ids
    ids_strides = (0, 0) if position_ids is None else (0, *ids.stride()) if ids.dim() == 1 else ids.stride()
    if position_ids is not None and ids.dim() == 2 and ids.shape[0] == 1:
        ids_strides = (0, ids.stride(1))
    rest = head_size - 2 * half
    block_h = max(16, gpu.power_of_2(half))
    block_m = max(1, 1024 // block_h)
    tiles = triton.cdiv(tokens, block_m)
    splits = max(1, _PROGRAMS_PER_UNIT * gpu.compute_units(query.device.index) // (batch * tiles))
    heads_per_program = triton.cdiv(heads_q + heads_k, splits)
    grid = (batch * tiles, triton.cdiv(heads_q + heads_k, heads_per_program))
    k, k_out = (query, out) if key is None or key_out is None else (key, key_out)
    far = (
        max(t.stride(-1) for t in (query, k, out, k_out)) * head_size >= 2**31
    )  # from a row's first column to its last
    with gpu.on_device_of(query):
        rotary_kernel[grid](
            query, k, cos, sin, ids, out, k_out, _strides(query), _strides(k), _strides(out), _strides(k_out),
            table_strides, ids_strides, tokens, tiles, heads_q, heads_k, heads_per_program, cos.shape[0], half,
            head_size, HAS_IDS=position_ids is not None, INTERLEAVED=interleaved, INVERSE=inverse, REST=rest > 0,
            FAR=far, BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_REST=max(16, gpu.power_of_2(rest)), num_warps=4,
            **gpu.COMPILE_OPTIONS,
        )  # fmt: skip
    return out, key_out
