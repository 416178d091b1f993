"""Sums over rows of several matrices in one launch: how the gradients of weights and biases come together.

Each program of a backward kernel keeps its share of such a gradient in registers and writes it as one row of a
`partial` matrix; one more launch adds the rows up, or the programs of a later kernel do it on the side. Always in the
same order, without atomics: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .plan import launch

BLOCK_P = tl.constexpr(32)
BLOCK_N = tl.constexpr(64)


@triton.jit
def add_up_columns(partial_ptrs, out_ptrs, rows, offsets, strides, widths, JOBS: tl.constexpr):
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
                    ptrs = partial_ptrs[job] + offs_p.to(tl.int64)[:, None] * strides[job]
                    ptrs += offsets[job] + offs_n[None, :]
                    total += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
                out_ptr = out_ptrs[job]
                tl.store(out_ptr + offs_n, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column_ok)
            first += here


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(partial_ptrs, out_ptrs, rows, offsets, strides, widths, JOBS: tl.constexpr):
    # One program sums BLOCK_N columns of one matrix over its rows: it reads each element once and writes each sum once.
    add_up_columns(partial_ptrs, out_ptrs, rows, offsets, strides, widths, JOBS)


class Job(NamedTuple):
    """One sum."""

    partial: Tensor
    """``[rows, ...]``, contiguous; a row holds the shares of one program."""
    offset: int
    """Of the first column to sum, in elements."""
    rows: int
    """So many of them are added up."""
    out: Tensor
    """``[width]``, filled."""


def changing(jobs: list[Job]) -> tuple[Any, ...]:
    """The arguments of `add_up_columns` that change from call to call; of at least one job."""
    partials, _, rows, outs = zip(*jobs, strict=True)
    return partials, outs, rows


def fixed(jobs: list[Job]) -> tuple[Any, ...]:
    """Those that do not."""
    strides, widths = tuple([job.partial.stride(0) for job in jobs]), tuple([job.out.shape[0] for job in jobs])
    return tuple([job.offset for job in jobs]), strides, widths


class ColumnSums:
    """Does jobs whose number and forms are always the same, in one launch."""

    def __init__(self) -> None:
        self._launch: Callable[..., None] | None = None
        self._programs = 0

    def __call__(self, jobs: list[Job]) -> None:
        """Launch the kernel."""
        if not jobs:
            return
        if self._launch is None:
            self._programs = sum(triton.cdiv(job.out.shape[0], BLOCK_N.value) for job in jobs)
            self._launch = launch(column_sums_kernel, jobs[0].out.device.index, *fixed(jobs), JOBS=len(jobs))
        self._launch(self._programs, 1, *changing(jobs))


def with_sums(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `launch` with a list as its last argument and then does the jobs that it put there."""
    sums = ColumnSums()

    def run(*arguments: Any) -> Any:
        jobs: list[Job] = []
        found = launch(*arguments, jobs)
        sums(jobs)
        return found

    return run
