"""Sums over rows of several matrices in one launch: how the gradients of weights and biases come together.

Each program of a backward kernel keeps its share of such a gradient in registers and writes it as one row of a
`partial` matrix; one more launch adds the rows up, or the programs of a later kernel do it on the side. Always in the
same order, without atomics: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device as gpu

BLOCK_P = tl.constexpr(32)
BLOCK_N = tl.constexpr(64)


@triton.jit
def add_up_columns(partial_ptrs, out_ptrs, rows, strides, widths, JOBS: tl.constexpr):
    """Sum the rows of JOBS matrices; the programs of the launch share their columns, BLOCK_N at a time."""
    blocks = 0
    for job in tl.static_range(JOBS):
        blocks += tl.cdiv(widths[job], BLOCK_N)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        first = 0
        for job in tl.static_range(JOBS):
            here = tl.cdiv(widths[job], BLOCK_N)
            if (block >= first) & (block < first + here):
                offs_n = (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)
                column_ok = offs_n < widths[job]
                total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
                for start in range(0, rows[job], BLOCK_P):
                    offs_p = start + tl.arange(0, BLOCK_P)
                    inside = (offs_p < rows[job])[:, None] & column_ok[None, :]
                    ptrs = partial_ptrs[job] + offs_p.to(tl.int64)[:, None] * strides[job] + offs_n[None, :]
                    total += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
                out_ptr = out_ptrs[job]
                tl.store(out_ptr + offs_n, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column_ok)
            first += here


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(partial_ptrs, out_ptrs, rows, strides, widths, JOBS: tl.constexpr):
    # One program sums BLOCK_N columns of one matrix over its rows: it reads each element once and writes each sum once.
    add_up_columns(partial_ptrs, out_ptrs, rows, strides, widths, JOBS)


class ColumnSums:
    """Collects matrices to be summed over their rows; `launch` sums all of them at once.

    Example:
        >>> sums = ColumnSums()  # doctest: +SKIP
        >>> dbias = sums.add(partial, torch.float16)  # filled by the launch
        >>> sums.launch()
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[Tensor, Tensor]] = []

    def add(self, partial: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The sum of `partial` ``[rows, width]`` (unit column stride) over its rows, ``[width]``, not yet filled: `out`
        if that is given, else a new tensor."""
        if out is None:
            out = torch.empty(partial.shape[1], dtype=dtype, device=partial.device)
        self._jobs.append((partial, out))
        return out

    def take(self) -> tuple[tuple[Any, ...], int]:
        """All jobs as arguments of a kernel that calls `add_up_columns`, and their number; none are left here."""
        jobs = [(partial, out) for partial, out in self._jobs if out.numel()]
        self._jobs = []
        partials, outs = (tuple(side) for side in zip(*jobs, strict=True)) if jobs else ((), ())
        rows, strides, widths = (
            tuple(p.shape[0] for p in partials), tuple(p.stride(0) for p in partials), tuple(o.shape[0] for o in outs),
        )  # fmt: skip
        return (partials, outs, rows, strides, widths), len(jobs)

    def launch(self) -> None:
        """Fill what `add` returned."""
        arguments, jobs = self.take()
        if not jobs:
            return
        outs = arguments[1]
        programs = sum(triton.cdiv(out.shape[0], BLOCK_N.value) for out in outs)
        with gpu.on_device_of(outs[0]):
            column_sums_kernel[(programs,)](*arguments, JOBS=jobs, **gpu.COMPILE_OPTIONS)
