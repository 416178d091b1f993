"""add_norm backward: one pass over the rows, one reduction of the weight gradients, and their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import dropout, launch
from ..common.triton_blocks import dropout_keep
from .triton_forward import as_rows, block_shape


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def add_norm_backward_kernel(
    dout_ptr, dsum_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, dz_ptr, partial_ptr,
    stride_do, stride_ds, stride_z, rows, width, rows_per_program, dropout_threshold, keep_scale,
    HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, WEIGHT_GRADIENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program walks over rows_per_program neighbouring rows, BLOCK_M at a time. It reads dout and the saved
    # sum z once, writes the gradients of residual and x, and keeps its share of the weight gradients in
    # registers until the end, when it writes it as one row of `partial`: nothing is shared between programs.
    #   xhat = (z - mean) * rstd    g = dout * weight
    #   dz = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum      dx = dropout(dz)
    #   dweight = sum over rows of dout * xhat      dbias = sum over rows of dout     (Ba et al., 2016)
    program = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    column_ok = (offs_n < width)[None, :]
    weight = tl.full((1, BLOCK_N), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        row_ok = offs_m < last
        inside = row_ok[:, None] & column_ok
        mean = tl.load(mean_ptr + offs_m, mask=row_ok, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=row_ok, other=0.0)[:, None]
        z = tl.load(z_ptr + offs_m[:, None] * stride_z + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + offs_m[:, None] * stride_do + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        xhat = tl.where(inside, (z - mean) * rstd, 0.0)
        if WEIGHT_GRADIENTS:
            dweight += dout * xhat
            dbias += dout
        g = dout * weight
        mean_g = tl.sum(g, 1)[:, None] / width
        mean_gx = tl.sum(g * xhat, 1)[:, None] / width
        dz = rstd * (g - mean_g - xhat * mean_gx)
        if HAS_DSUM:
            ds_ptrs = dsum_ptr + offs_m[:, None] * stride_ds + offs_n[None, :]
            dz += tl.load(ds_ptrs, mask=inside, other=0.0).to(tl.float32)
        offsets = offs_m[:, None] * width + offs_n[None, :]
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, 0, dropout_threshold, BLOCK_N)
            dx = tl.where(keep, dz * keep_scale, 0.0)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WEIGHT_GRADIENTS:
        row = partial_ptr + program * 2 * width + offs_n
        tl.store(row, tl.sum(dweight, 0), mask=offs_n < width)
        tl.store(row + width, tl.sum(dbias, 0), mask=offs_n < width)


@triton.jit(do_not_specialize=["programs"])
def weight_gradient_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, programs, width,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program sums BLOCK_N columns of the partial weight gradients over all programs, always in the same order.
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, programs, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        inside = (offs_p < programs)[:, None] & (offs_n < width)[None, :]
        ptrs = partial_ptr + offs_p.to(tl.int64)[:, None] * 2 * width + offs_n[None, :]
        if HAS_WEIGHT:
            dweight += tl.load(ptrs, mask=inside, other=0.0)
        if HAS_BIAS:
            dbias += tl.load(ptrs + width, mask=inside, other=0.0)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + offs_n, tl.sum(dweight, 0).to(dweight_ptr.dtype.element_ty), mask=offs_n < width)
    if HAS_BIAS:
        tl.store(dbias_ptr + offs_n, tl.sum(dbias, 0).to(dbias_ptr.dtype.element_ty), mask=offs_n < width)


# A program takes at least this many rows, so that the partial sums stay a small part of the traffic.
_LEAST_ROWS = 16
_PROGRAMS_PER_UNIT = 2


def add_norm_backward(
    dout: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    seed: Tensor | None, dropout_p: float, needs_dweight: bool, needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Launch both kernels: dx, dresidual (the same tensor without dropout), dweight, dbias."""
    flat_do, flat_z = as_rows(dout), as_rows(total)
    flat_ds = flat_do if dsum is None else as_rows(dsum)
    rows, width = flat_z.shape
    dz = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dx = torch.empty_like(dz) if seed is not None else dz
    dweight = torch.empty(width, dtype=total.dtype, device=total.device) if needs_dweight else None
    dbias = torch.empty(width, dtype=total.dtype, device=total.device) if needs_dbias else None
    if dz.numel() == 0:
        return dx, dz, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
    weight_gradients = needs_dweight or needs_dbias
    block_m, block_n, num_warps = block_shape(width)
    most = _PROGRAMS_PER_UNIT * launch.compute_units(total.device.index)
    rows_per_program = max(_LEAST_ROWS, triton.cdiv(triton.cdiv(rows, most), block_m) * block_m)
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty((programs, 2, width), dtype=torch.float32, device=total.device) if weight_gradients else dz
    with launch.on_device_of(total):
        add_norm_backward_kernel[(programs,)](
            flat_do, flat_ds, flat_z, dz if weight is None else weight.contiguous(), mean, rstd,
            dz if seed is None else seed, dx, dz, partial,
            flat_do.stride(0), flat_ds.stride(0), flat_z.stride(0), rows, width, rows_per_program,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            HAS_DSUM=dsum is not None, HAS_WEIGHT=weight is not None, DROPOUT=seed is not None,
            WEIGHT_GRADIENTS=weight_gradients, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps, **launch.COMPILE_OPTIONS,
        )  # fmt: skip
        if weight_gradients:
            weight_gradient_kernel[(triton.cdiv(width, 64),)](
                partial, partial if dweight is None else dweight, partial if dbias is None else dbias, programs, width,
                HAS_WEIGHT=needs_dweight, HAS_BIAS=needs_dbias, BLOCK_P=32, BLOCK_N=64,
                **launch.COMPILE_OPTIONS,
            )  # fmt: skip
    return dx, dz, dweight, dbias
