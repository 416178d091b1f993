"""fusenc.kernels.common.column_sums: several matrices in one launch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fusenc.kernels.common.column_sums import ColumnSums, Job

pytestmark = [pytest.mark.kernel, pytest.mark.interpreter]


@pytest.fixture(autouse=True)
def _on_kernels(request):
    if request.config.getoption("--device") == "cpu":
        pytest.skip("a kernel without an eager twin: callers have their own")


def test_matrices_of_any_shape_and_dtype(device):
    wide = torch.randn(40, 300, device=device)
    partials = [(torch.randn(shape, device=device), 0) for shape in ((70, 100), (1, 5), (33, 64), (216, 1))]
    partials.append((wide, 100))  # a part of the columns
    widths = [100, 5, 64, 1, 100]
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.float16]
    sums = ColumnSums()
    for fewer in (0, 1):  # the second launch is the first one's, with other numbers of rows
        jobs = [
            Job(partial, offset, max(0, partial.shape[0] - fewer), torch.empty(width, dtype=dtype, device=device))
            for (partial, offset), width, dtype in zip(partials, widths, dtypes, strict=True)
        ]
        sums(jobs)
        for partial, offset, rows, out in jobs:
            expected = partial[:rows, offset : offset + out.shape[0]].sum(0).to(out.dtype)
            torch.testing.assert_close(out.cpu(), expected.cpu())


def test_nothing_to_sum(device):
    ColumnSums()([])
    out = torch.ones(8, device=device)
    ColumnSums()([Job(torch.ones(3, 8, device=device), 0, 0, out)])
    assert not out.any()
