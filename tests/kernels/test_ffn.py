"""fusenc.kernels.ffn against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract
from fusenc.kernels import ffn, last_backend
from fusenc.kernels.common import dropout
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def tensors(rows, d_model, d_hidden, device, d_out=None):
    generator = torch.Generator().manual_seed(1)
    d_out = d_out or d_model
    shapes = ((rows, d_model), (d_hidden, d_model), (d_hidden,), (d_out, d_hidden), (d_out,))
    x, w1, b1, w2, b2 = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [x, w1 / d_model**0.5, b1, w2 / d_hidden**0.5, b2]


def plain(activation="gelu"):
    return lambda x, w1, b1, w2, b2: F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(device, backend, dtype, activation):
    assert_contract(lambda *t: ffn(*t, activation=activation), plain(activation), tensors(70, 48, 150, device), dtype)
    assert last_backend() == backend


@pytest.mark.parametrize("rows", [1, 63, 129, 300])
def test_rows_that_are_no_multiple_of_a_block(device, rows):
    assert_contract(ffn, plain(), tensors(rows, 64, 128, device), torch.float16)


@pytest.mark.parametrize(("d_model", "d_hidden", "d_out"), [(1, 1, 1), (7, 13, 5), (33, 200, 33), (64, 256, 100)])
def test_widths(device, d_model, d_hidden, d_out):
    for dtype in (torch.float32, torch.bfloat16):
        assert_contract(ffn, plain(), tensors(40, d_model, d_hidden, device, d_out), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_enough_blocks_for_every_tile_group(device, dtype):
    assert_contract(ffn, plain(), tensors(1200, 16, 140, device), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_uses_the_documented_mask(device, dtype, dropout_p):
    inputs = tensors(40, 32, 150, device)
    torch.manual_seed(3)
    dropped = dropout.drop_mask(dropout.new_seed(inputs[0]), torch.Size((40, 150)), dropout_p)
    factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0

    def kernel(*args):
        torch.manual_seed(3)
        return ffn(*args, dropout_p=dropout_p)

    def reference(x, w1, b1, w2, b2):
        hidden = (F.gelu(F.linear(x, w1, b1)) * factor).masked_fill(dropped, 0.0)
        return F.linear(hidden, w2, b2)

    assert_contract(kernel, reference, inputs, dtype)


def test_no_dropout_in_evaluation(device):
    inputs = tensors(5, 8, 16, device)
    torch.testing.assert_close(ffn(*inputs, dropout_p=0.9, training=False), ffn(*inputs), rtol=0, atol=0)


def test_without_biases(device):
    x, w1, _, w2, _ = tensors(40, 32, 100, device)
    assert_contract(
        lambda x, w1, w2: ffn(x, w1, None, w2, None),
        lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1)), w2),
        [x, w1, w2],
        torch.float32,
    )


@pytest.mark.parametrize("layout", ["three dimensions", "transposed input", "transposed weights", "column step"])
def test_strides(device, layout):
    x, w1, b1, w2, b2 = tensors(60, 32, 100, device)
    if layout == "three dimensions":
        x = x.view(3, 20, 32)
    elif layout == "transposed input":
        x = x.view(3, 20, 32).transpose(0, 1)
    elif layout == "transposed weights":
        w1, w2 = w1.t().contiguous().t(), w2.t().contiguous().t()
    else:
        x = torch.randn(60, 64, device=device)[:, ::2]
    assert_contract(ffn, plain(), [x, w1, b1, w2, b2], torch.float32)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_extreme_inputs_stay_finite(device, activation):
    x, w1, b1, w2, b2 = tensors(40, 32, 100, device)
    inputs = [t.requires_grad_() for t in (x * 1e4, w1, b1, w2, b2)]
    out = ffn(*inputs, activation=activation)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (3, 4), (1, 2, 3, 4), (0, 1, 2, 3)], ids=str)
def test_only_some_inputs_need_gradients(device, frozen):
    inputs = [t.requires_grad_(i not in frozen) for i, t in enumerate(tensors(40, 32, 100, device))]
    wanted = [t for t in inputs if t.requires_grad]
    got = torch.autograd.grad(ffn(*inputs).sum(), wanted)
    expected = torch.autograd.grad(plain()(*inputs).sum(), wanted)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_two_runs_give_the_same_bits(device):
    def run():
        inputs = [t.half().requires_grad_() for t in tensors(150, 32, 100, device)]
        out = ffn(*inputs)
        return out, *torch.autograd.grad(out.sum(), inputs)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_empty_batch(device):
    inputs = [t.requires_grad_() for t in tensors(0, 8, 16, device)]
    out = ffn(*inputs)
    assert out.shape == (0, 8)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.shape == t.shape and (g == 0).all() for g, t in zip(grads, inputs, strict=True))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 200), d_model=st.integers(1, 100), d_hidden=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES), activation=st.sampled_from(list(ACTIVATIONS)),
)  # fmt: skip
def test_random_combinations(request, rows, d_model, d_hidden, dtype, activation):
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    inputs = tensors(rows, d_model, d_hidden, device)
    assert_contract(lambda *t: ffn(*t, activation=activation), plain(activation), inputs, dtype)
