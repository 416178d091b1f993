"""fusenc.kernels.sdpa_replacement: calls of torch's attention on ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusenc.kernels import sdpa_replacement
from tolerances import SAME_ALGORITHM
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

KEEP = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.3


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 1 + shape[-1]) / 8


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)], {}),
        ([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {"attn_mask": KEEP}),
        ([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {"attn_mask": randn(5, 7), "scale": 0.2}),
        ([(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {"is_causal": True}),
        ([(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)], {"enable_gqa": True}),
        ([(2, 5, 8), (2, 7, 8), (2, 7, 8)], {"attn_mask": KEEP[:, 0]}),
        ([(5, 8), (7, 8), (7, 8)], {"attn_mask": KEEP[0, 0]}),
    ],
)
def test_the_same_result(shapes, options):
    inputs = [randn(*shape) for shape in shapes]
    expected = F.scaled_dot_product_attention(*inputs, **options)
    with sdpa_replacement() as report:
        got = F.scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    assert report.served == 1 and not report.left


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_torchs_causal_biases(bias):
    q, k = randn(2, 3, 5, 8), randn(2, 3, 7, 8)
    expected = F.scaled_dot_product_attention(q, k, k, bias(5, 7))
    with sdpa_replacement() as report:
        got = F.scaled_dot_product_attention(q, k, k, bias(5, 7))
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    assert report.served == 1


def test_calls_that_cannot_be_served_go_to_torch():
    q = randn(2, 1, 5, 8)
    broadcast = randn(2, 3, 7, 8)
    with sdpa_replacement() as report:
        assert F.scaled_dot_product_attention(q, broadcast, broadcast).shape == (2, 3, 5, 8)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, q, q, KEEP, is_causal=True)
    assert report.served == 0 and report.left.total() == 2
    assert report.left["batches or heads that broadcast"] == 1


def test_a_model_trains_on_it():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = randn(2, 5, 16)

    def step():
        return torch.autograd.grad(layer(x).pow(2).sum(), list(layer.parameters()))

    expected = step()
    with sdpa_replacement() as report:
        got = step()
    assert report.served == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.kernel
def test_on_the_kernels(device, backend):
    from fusenc.kernels import last_backend

    q, k = randn(2, 3, 70, 16).to(device), randn(2, 3, 40, 16).to(device)
    expected = F.scaled_dot_product_attention(q, k, k)
    with sdpa_replacement() as report:
        got = F.scaled_dot_product_attention(q, k, k)
    assert report.served == 1 and last_backend() == backend
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
