"""What the forward and backward kernels share: how a row lies in registers, and how the sum is formed."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks
from ..common import device as gpu
from ..common.blocks import load_block

MAX_WIDTH = 65536


class Shape(NamedTuple):
    """A block of whole rows: `chunks` neighbouring pieces of ``[block_m, block_n]``, each read in wide accesses."""

    block_m: int
    block_n: int
    chunks: int
    num_warps: int

    @property
    def columns(self) -> int:
        """Columns that the block covers."""
        return self.chunks * self.block_n


_WARPS = 4
_MOST_WARPS = 16
_ELEMENTS = 24  # of a row that a thread holds at most, where it can be helped


@functools.cache
def row_shape(width: int, itemsize: int, lanes: int) -> Shape:
    """How whole rows lie in registers: 16 bytes a thread and chunk, as few columns beyond the row as can be.

    Rows up to 24 elements a lane belong to one warp, which reduces them without shared memory; several narrow rows
    share a warp, and wide rows have 2 to 16 warps.
    """
    vector = 16 // itemsize
    whole = lanes * vector  # columns of a warp's access
    if width <= whole:
        shapes = [(n, -(-width // n)) for n in (whole >> i for i in range(8)) if n >= 16]
        block_n, chunks = min(
            ((n, c) for n, c in shapes if c * vector <= _ELEMENTS), key=lambda shape: (shape[0] * shape[1], shape[1])
        )
        return Shape(_WARPS * whole // block_n, block_n, chunks, _WARPS)
    warps = min(gpu.power_of_2(-(-width // (lanes * _ELEMENTS))), _MOST_WARPS * 32 // lanes)
    num_warps = max(warps, _WARPS)
    block_n = whole * warps
    return Shape(num_warps // warps, block_n, -(-width // block_n), num_warps)


def check_width(x: Tensor) -> None:
    """Raise ValueError for rows that the kernels do not take."""
    if x.shape[-1] > MAX_WIDTH:
        checks.fail_value("x", f"a width of at most {MAX_WIDTH} on the kernels", x)


def unit_of(width: int, *strides: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides all: kernels count in it, so that the compiler knows of it."""
    return math.gcd(8, width, *strides)


def smallest_item(*matrices: Tensor | torch.dtype | None) -> int:
    """Bytes of the narrowest element among the matrices of a launch, given as tensors or dtypes."""
    return min(of.itemsize for of in matrices if of is not None)


@triton.jit
def first_chunk(ptr, rows, stride, UNIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers ``[len(rows), BLOCK_N]`` to the first columns of `rows`, whose stride is given in units."""
    return ptr + (rows.to(tl.int64) * stride * UNIT)[:, None] + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def load_columns(ptr, first_column, width, CHECK: tl.constexpr, BLOCK_N: tl.constexpr):
    """A piece of a parameter as float32 ``[1, BLOCK_N]``, zero outside."""
    offs_n = first_column + tl.arange(0, BLOCK_N)
    if CHECK:
        return tl.load(ptr + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.load(ptr + offs_n).to(tl.float32)[None, :]


@triton.jit
def load_weight(ptr, first_column, width, ZERO_CENTERED: tl.constexpr, CHECK: tl.constexpr, BLOCK_N: tl.constexpr):
    """As `load_columns`; 1 + weight where the weight is centred at zero."""
    weight = load_columns(ptr, first_column, width, CHECK, BLOCK_N)
    if ZERO_CENTERED:
        weight += 1.0
    return weight


@triton.jit
def load_sum(
    x_ptrs, residual_ptrs, x_bias, keep, keep_scale, row_ok, column_ok,
    FLOAT32_SUM: tl.constexpr, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x + x_bias) in float32, as the sum is stored, whether it is or not: what is normalised now
    is what the backward pass reads or forms again. What is None is left out."""
    z = load_block(x_ptrs, row_ok, column_ok, CHECK_ROWS, CHECK_COLUMNS).to(tl.float32)
    if x_bias is not None:
        z += x_bias
    if keep is not None:
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptrs is not None:
        z += load_block(residual_ptrs, row_ok, column_ok, CHECK_ROWS, CHECK_COLUMNS).to(tl.float32)
    if not FLOAT32_SUM:
        z = z.to(x_ptrs.dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def store_block(ptrs, value, row_ok, column_ok, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """Store a block in the dtype of its tensor; a check that is off costs nothing."""
    value = value.to(ptrs.dtype.element_ty)
    if CHECK_ROWS and CHECK_COLUMNS:
        tl.store(ptrs, value, mask=row_ok & column_ok)
    elif CHECK_ROWS:
        tl.store(ptrs, value, mask=row_ok)
    elif CHECK_COLUMNS:
        tl.store(ptrs, value, mask=column_ok)
    else:
        tl.store(ptrs, value)


@triton.jit
def reciprocal_deviation(variance, eps):
    """1 / sqrt(variance + eps); 0 for a constant row without eps, whose normalised values then are 0. Keeps a NaN."""
    return tl.where(variance + eps < 1.1754944e-38, 0.0, tl.math.rsqrt(variance + eps))
