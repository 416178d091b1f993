"""Sums over rows of several matrices in one launch: how the gradients of weights and biases come together.

Each program of a backward kernel keeps its share of such a gradient in registers and writes it as one row of a
`partial` matrix; one more launch adds the rows up. Always in the same order, without atomics: two runs give the same
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit(do_not_specialize=["rows", "first_programs"])
def column_sums_kernel(
    partial_ptrs, out_ptrs, rows, strides, widths, first_programs,
    JOBS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program sums BLOCK_N columns of one matrix over its rows: it reads each element once and writes each sum once.
    for job in tl.static_range(JOBS):
        block = tl.program_id(0) - first_programs[job]
        if (block >= 0) & (block < tl.cdiv(widths[job], BLOCK_N)):
            offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            column_ok = offs_n < widths[job]
            total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
            for start in range(0, rows[job], BLOCK_P):
                offs_p = start + tl.arange(0, BLOCK_P)
                inside = (offs_p < rows[job])[:, None] & column_ok[None, :]
                ptrs = partial_ptrs[job] + offs_p.to(tl.int64)[:, None] * strides[job] + offs_n[None, :]
                total += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            out_ptr = out_ptrs[job]
            tl.store(out_ptr + offs_n, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column_ok)


_BLOCK_P, _BLOCK_N = 32, 64


class ColumnSums:
    """Collects matrices to be summed over their rows; `launch` sums all of them at once.

    Example:
        >>> sums = ColumnSums()  # doctest: +SKIP
        >>> dbias = sums.add(partial, torch.float16)  # filled by the launch
        >>> sums.launch()
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[Tensor, Tensor]] = []

    def add(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of `partial` ``[rows, width]`` (unit column stride) over its rows, ``[width]``, not yet filled."""
        out = torch.empty(partial.shape[1], dtype=dtype, device=partial.device)
        self._jobs.append((partial, out))
        return out

    def launch(self) -> None:
        """Fill what `add` returned."""
        jobs = [(partial, out) for partial, out in self._jobs if out.numel()]
        self._jobs = []
        if not jobs:
            return
        partials, outs = zip(*jobs, strict=True)
        widths = tuple(out.shape[0] for out in outs)
        firsts, programs = [], 0
        for width in widths:
            firsts.append(programs)
            programs += triton.cdiv(width, _BLOCK_N)
        with launch.on_device_of(outs[0]):
            column_sums_kernel[(programs,)](
                partials, outs, tuple(p.shape[0] for p in partials), tuple(p.stride(0) for p in partials), widths,
                tuple(firsts), JOBS=len(jobs), BLOCK_P=_BLOCK_P, BLOCK_N=_BLOCK_N, **launch.COMPILE_OPTIONS,
            )  # fmt: skip
