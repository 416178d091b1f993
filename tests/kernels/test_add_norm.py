"""fusenc.kernels.add_norm against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract
from fusenc.kernels import add_norm, last_backend
from fusenc.kernels.common import dropout
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(rows, width, device):
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, width), (rows, width), (width,), (width,))
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def plain(x, residual, weight, bias):
    return F.layer_norm(x + residual, x.shape[-1:], weight, bias)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 64, 100, 768])
def test_layer_norm_of_a_sum(device, backend, dtype, width):
    assert_contract(add_norm, plain, tensors(37, width, device), dtype)
    assert last_backend() == backend


@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_rows(device, rows):
    assert_contract(add_norm, plain, tensors(rows, 100, device), torch.float32)


@pytest.mark.parametrize("width", [4096, 5000, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows(device, width, dtype):
    assert_contract(add_norm, plain, tensors(3, width, device), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_uses_the_documented_mask(device, dtype, dropout_p):
    inputs = tensors(20, 50, device)
    torch.manual_seed(3)
    dropped = dropout.drop_mask(dropout.new_seed(inputs[0]), inputs[0].shape, dropout_p)
    factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0

    def kernel(x, *rest):
        torch.manual_seed(3)
        return add_norm(x, *rest, dropout_p=dropout_p)

    def reference(x, residual, weight, bias):
        return plain((x * factor).masked_fill(dropped, 0.0), residual, weight, bias)

    assert_contract(kernel, reference, inputs, dtype)


def test_no_dropout_in_evaluation(device):
    x, r, w, b = tensors(5, 8, device)
    torch.testing.assert_close(
        add_norm(x, r, w, b, dropout_p=0.9, training=False), add_norm(x, r, w, b), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_is_returned_and_differentiable(device, dtype):
    def kernel(x, r, w, b):
        normed, total = add_norm(x, r, w, b, return_sum=True)
        return torch.cat([normed, total])

    assert_contract(kernel, lambda x, r, w, b: torch.cat([plain(x, r, w, b), x + r]), tensors(20, 50, device), dtype)


def test_sum_without_residual_is_the_input(device):
    x, _, w, b = tensors(20, 50, device)

    def kernel(x, w, b):
        normed, total = add_norm(x, None, w, b, return_sum=True)
        return torch.cat([normed, total])

    assert_contract(kernel, lambda x, w, b: torch.cat([F.layer_norm(x, (50,), w, b), x]), (x, w, b), torch.float32)


def test_no_residual_no_weight_no_bias(device):
    x, r, w, _ = tensors(20, 50, device)
    assert_contract(lambda x: add_norm(x, None, None), lambda x: F.layer_norm(x, (50,)), [x], torch.float32)
    assert_contract(lambda x, w: add_norm(x, None, w), lambda x, w: F.layer_norm(x, (50,), w), [x, w], torch.float32)
    assert_contract(lambda x, r: add_norm(x, r, None), lambda x, r: F.layer_norm(x + r, (50,)), [x, r], torch.float32)


def test_bias_without_weight(device):
    x, _, _, b = tensors(20, 50, device)
    assert_contract(
        lambda x, b: add_norm(x, None, None, b), lambda x, b: F.layer_norm(x, (50,), None, b), [x, b], torch.float32
    )


def test_eps(device):
    x, r, w, b = tensors(20, 50, device)
    assert_contract(
        lambda *t: add_norm(*t, eps=0.1),
        lambda x, r, w, b: F.layer_norm(x + r, (50,), w, b, 0.1),
        [x * 0.1, r * 0.1, w, b],
        torch.float32,
    )


def test_large_mean_loses_no_accuracy(device):
    x, r, w, b = tensors(20, 500, device)
    assert_contract(add_norm, plain, [x + 100, r, w, b], torch.float32)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "column step"])
def test_strides(device, layout):
    x, r, w, b = tensors(24, 60, device)
    if layout == "transposed":
        x = x.view(4, 6, 60).transpose(0, 1)
        r = r.view(6, 4, 60)
    elif layout == "sliced":
        x = torch.randn(24, 200, device=device)[:, 20:80]
    elif layout == "expanded":
        r = r[:1].expand(24, 60)
    else:
        x = torch.randn(24, 120, device=device)[:, ::2]
    assert_contract(add_norm, plain, [x, r, w, b], torch.float32)


def test_constant_row_is_finite(device):
    x = torch.ones(4, 32, device=device, requires_grad=True)
    out = add_norm(x, None, None)
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_two_runs_give_the_same_bits(device):
    def run():
        inputs = [t.half().requires_grad_() for t in tensors(200, 50, device)]
        out = add_norm(*inputs)
        return out, *torch.autograd.grad(out.sum(), inputs)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty_batch(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    w, b = torch.ones(8, device=device, requires_grad=True), torch.zeros(8, device=device, requires_grad=True)
    out = add_norm(x, x, w, b)
    assert out.shape == shape
    dx, dw, db = torch.autograd.grad(out.sum(), (x, w, b))
    assert dx.shape == shape and (dw == 0).all() and (db == 0).all()


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150), width=st.integers(1, 700), dtype=st.sampled_from(DTYPES),
    residual=st.booleans(), return_sum=st.booleans(), weight=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_random_combinations(request, rows, width, dtype, residual, return_sum, weight, bias):
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    names = [n for n, on in (("x", True), ("r", residual), ("w", weight), ("b", bias)) if on]
    inputs = [t for t, on in zip(tensors(rows, width, device), (True, residual, weight, bias), strict=True) if on]

    def kernel(*args):
        given_ = dict(zip(names, args, strict=True))
        out = add_norm(given_["x"], given_.get("r"), given_.get("w"), given_.get("b"), return_sum=return_sum)
        return torch.cat(out) if return_sum else out

    def reference(*args):
        given_ = dict(zip(names, args, strict=True))
        total = given_["x"] + given_["r"] if residual else given_["x"]
        out = F.layer_norm(total, (width,), given_.get("w"), given_.get("b"))
        return torch.cat([out, total]) if return_sum else out

    assert_contract(kernel, reference, inputs, dtype)
