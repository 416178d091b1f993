"""fusenc.kernels.common.column_sums: several matrices in one launch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fusenc.kernels.common.column_sums import ColumnSums

pytestmark = [pytest.mark.kernel, pytest.mark.interpreter]


@pytest.fixture(autouse=True)
def _on_kernels(request):
    if request.config.getoption("--device") == "cpu":
        pytest.skip("a kernel without an eager twin: callers have their own")


def test_matrices_of_any_shape_and_dtype(device):
    partials = [torch.randn(shape) for shape in ((70, 100), (1, 5), (33, 64), (216, 1))]
    partials.append(torch.randn(40, 300)[:, 100:200])  # a part of the columns
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.float16]
    sums = ColumnSums()
    outs = [sums.add(p.to(device), dtype) for p, dtype in zip(partials, dtypes, strict=True)]
    sums.launch()
    for out, partial, dtype in zip(outs, partials, dtypes, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out.cpu(), partial.sum(0).to(dtype))


def test_nothing_to_sum(device):
    sums = ColumnSums()
    sums.launch()
    assert (sums.add(torch.ones(0, 8, device=device), torch.float32)).shape == (8,)
    empty = sums.add(torch.ones(3, 0, device=device), torch.float32)
    sums.launch()
    assert empty.shape == (0,)
