"""add_norm forward: one kernel and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import checks, dropout, launch
from ..common.triton_blocks import dropout_keep


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def add_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr, sum_ptr, mean_ptr, rstd_ptr,
    stride_x, stride_r, rows, width, rows_per_program, eps, dropout_threshold, keep_scale,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    STORE_SUM: tl.constexpr, STORE_STATISTICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program walks over rows_per_program neighbouring rows, BLOCK_M whole rows at a time in registers. It reads
    # x and residual once and writes the result once (and the sum and two statistics per row where they are needed
    # later); weight and bias are read once a program.
    #   z = residual + dropout(x)    out = (z - mean) * rstd * weight + bias    rstd = 1 / sqrt(var + eps)
    # The variance is the mean square of the centred row: no cancellation (Ba et al., 2016, equation 3).
    offs_n = tl.arange(0, BLOCK_N)
    column_ok = offs_n < width
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=column_ok, other=0.0)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=column_ok, other=0.0)[None, :]
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        row_ok = offs_m < last
        inside = row_ok[:, None] & column_ok[None, :]
        z = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = dropout_keep(tl.load(seed_ptr), offs_m, 0, dropout_threshold, BLOCK_N)
            z = tl.where(keep, z * keep_scale, 0.0)
        if HAS_RESIDUAL:
            r_ptrs = residual_ptr + offs_m[:, None] * stride_r + offs_n[None, :]
            z += tl.load(r_ptrs, mask=inside, other=0.0).to(tl.float32)
        # As the sum is stored: the backward pass reads it back, and a row that is constant then must be so now.
        z = z.to(out_ptr.dtype.element_ty).to(tl.float32)  # [BM, BN]
        offsets = offs_m[:, None] * width + offs_n[None, :]
        if STORE_SUM:
            tl.store(sum_ptr + offsets, z.to(sum_ptr.dtype.element_ty), mask=inside)

        mean = tl.sum(z, 1) / width
        centred = tl.where(column_ok[None, :], z - mean[:, None], 0.0)
        rstd = tl.math.rsqrt(tl.sum(centred * centred, 1) / width + eps)
        out = centred * rstd[:, None]
        if HAS_WEIGHT:
            out *= weight.to(tl.float32)
        if HAS_BIAS:
            out += bias.to(tl.float32)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
        if STORE_STATISTICS:
            tl.store(mean_ptr + offs_m, mean, mask=row_ok)
            tl.store(rstd_ptr + offs_m, rstd, mask=row_ok)


# Enough programs to fill every unit with warps; with more rows than that each program takes more of them.
_PROGRAMS_PER_UNIT = 8


MAX_WIDTH = 16384


def block_shape(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's block, and its warps: about 8 elements of each row array a thread, up to 32."""
    block_n = max(16, launch.power_of_2(width))
    block_m = max(1, 1024 // block_n)
    return block_m, block_n, min(max(block_m * block_n // 256, 4), 16)


def as_rows(x: Tensor) -> Tensor:
    """`x` as ``[rows, width]`` with unit column stride; a view unless its memory order forbids."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def add_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float, store_sum: bool, store_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Launch the kernel: the output, and where asked for the sum, the means and the reciprocal deviations."""
    if x.shape[-1] > MAX_WIDTH:
        checks.fail_value("x", f"a width of at most {MAX_WIDTH} on the kernels", x)
    flat_x = as_rows(x)
    rows, width = flat_x.shape
    flat_r = flat_x if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if store_sum else None
    mean = torch.empty(rows, dtype=torch.float32, device=x.device) if store_statistics else None
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device) if store_statistics else None
    if out.numel() == 0:
        return out, total, mean, rstd
    block_m, block_n, num_warps = block_shape(width)
    most = _PROGRAMS_PER_UNIT * launch.compute_units(x.device.index)
    rows_per_program = triton.cdiv(triton.cdiv(rows, most), block_m) * block_m
    with launch.on_device_of(x):
        add_norm_forward_kernel[(triton.cdiv(rows, rows_per_program),)](
            flat_x, flat_r, out if weight is None else weight.contiguous(), out if bias is None else bias.contiguous(),
            out if seed is None else seed, out, out if total is None else total,
            out if mean is None else mean, out if rstd is None else rstd,
            flat_x.stride(0), flat_r.stride(0), rows, width, rows_per_program, eps,
            dropout.threshold(dropout_p), dropout.keep_scale(dropout_p),
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            DROPOUT=seed is not None, STORE_SUM=store_sum, STORE_STATISTICS=store_statistics,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, **launch.COMPILE_OPTIONS,
        )  # fmt: skip
    return out, total, mean, rstd
