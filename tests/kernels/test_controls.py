"""The search itself: bugs planted in small kernels must be found in every run that claims there are none."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.kernel

BLOCK = 16


@triton.jit
def _unmasked_tail(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n + 1)


@triton.jit
def _read_past_the_end(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets), mask=offsets < n)


@triton.jit
def _race(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), 0)
    tl.store(out_ptr, total)  # every program leaves another value in the same element


@triton.jit
def _never_written(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n - 1)


@pytest.fixture
def x(request, device) -> torch.Tensor:
    if request.config.getoption("--device") != "ttsem":
        pytest.skip("controls of ttsem's search: run with --device ttsem")
    return torch.arange(37.0, device=device)


def _launch(kernel, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK)
    return out


@pytest.mark.parametrize(
    "kernel, kind",
    [(_unmasked_tail, "oob_write"), (_read_past_the_end, "oob_read"), (_race, "race")],
    ids=["a store past the end", "a load past the end", "two programs that write one element"],
)
def test_a_planted_fault_stops_the_launch(x, kernel, kind):
    from ttsem.sanitize import KernelFault

    with pytest.raises(KernelFault) as caught:
        _launch(kernel, x)
    assert caught.value.fault.kind == kind


def test_an_element_never_written_is_nan(x):
    out = _launch(_never_written, x)
    torch.testing.assert_close(out[:-1], x[:-1])
    assert out[-1].isnan()
