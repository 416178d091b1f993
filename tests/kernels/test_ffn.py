"""fusenc.kernels.ffn against float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract
from fusenc.kernels import ffn, last_backend, linear_act
from fusenc.kernels.common import dropout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}
WAYS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])


def tensors(rows, d_model, d_hidden, device, d_out=None):
    generator = torch.Generator().manual_seed(1)
    d_out = d_out or d_model
    shapes = ((rows, d_model), (d_hidden, d_model), (d_hidden,), (d_out, d_hidden), (d_out,))
    x, w1, b1, w2, b2 = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [x, w1 / d_model**0.5, b1, w2 / d_hidden**0.5, b2]


def plain(activation="gelu"):
    return lambda x, w1, b1, w2, b2: F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [*(("gelu", dtype) for dtype in DTYPES), *((name, torch.float16) for name in list(ACTIVATIONS)[1:])],
    ids=str,
)
@pytest.mark.essential
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
@pytest.mark.essential
def test_enough_blocks_for_every_tile_group(device, dtype):
    assert_contract(ffn, plain(), tensors(1200, 16, 140, device), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
@pytest.mark.essential
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


@pytest.mark.parametrize(
    "layout", ["three dimensions", "transposed input", "transposed weights", "column step", "biases"]
)
def test_strides(device, layout):
    x, w1, b1, w2, b2 = tensors(60, 32, 100, device)
    if layout == "three dimensions":
        x = x.view(3, 20, 32)
    elif layout == "transposed input":
        x = x.view(3, 20, 32).transpose(0, 1)
    elif layout == "transposed weights":
        w1, w2 = w1.t().contiguous().t(), w2.t().contiguous().t()
    elif layout == "biases":
        b1, b2 = torch.randn(200, device=device)[::2], torch.randn(1, device=device).expand(32)
    else:
        x = torch.randn(60, 64, device=device)[:, ::2]
    for fused in (True, False):
        call = functools.partial(ffn, fused=fused)
        assert_contract(call, plain(), [x, w1, b1, w2, b2], torch.float32)


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


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize(("d_model", "d_hidden", "d_out"), [(0, 16, 8), (8, 0, 8), (8, 16, 0)])
def test_a_width_of_0(device, d_model, d_hidden, d_out, recompute):
    """As torch's own products: what is summed over nothing is 0."""
    inputs = [
        torch.randn(shape, device=device).requires_grad_()
        for shape in ((4, d_model), (d_hidden, d_model), (d_hidden,), (d_out, d_hidden), (d_out,))
    ]
    rates = {"dropout_p": 1.0, "out_dropout_p": 1.0}
    for options in ({}, rates):
        out = ffn(*inputs, recompute=recompute, **options)
        expected = plain()(*inputs) * (not options)
        pairs = [(out, expected, inputs)]
        hidden = linear_act(*inputs[:3], recompute=recompute, dropout_p=options.get("dropout_p", 0.0))
        pairs.append((hidden, F.gelu(F.linear(*inputs[:3])) * (not options), inputs[:3]))
        for got, want, leaves in pairs:
            torch.testing.assert_close(got, want)
            grads = [torch.autograd.grad(t.sum(), leaves, retain_graph=True) for t in (got, want)]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_result_has_memory_of_its_own(device, gated):
    """With gradients or without: not a part of a wider pre-activation."""
    x, w1, b1, *_ = tensors(12, 8, 16, device)
    x = x.view(3, 4, 8)
    for needs in (False, True):
        out = linear_act(x.requires_grad_(needs), w1, b1, gated=gated)
        assert out.is_contiguous() and out.untyped_storage().nbytes() == out.numel() * out.element_size()


def reference(options, masks):
    """`ffn` in plain PyTorch; `masks` are the dropped elements of hidden activation and output."""

    def run(x, w1, b1, w2, b2, residual=None):
        hidden = F.linear(x, w1, b1)
        act = ACTIVATIONS[options.get("activation", "gelu")]
        if options.get("gated"):
            gate, up = hidden.chunk(2, -1)
            hidden = act(gate) * up
        else:
            hidden = act(hidden)
        if masks[0] is not None:
            hidden = (hidden / (1 - options["dropout_p"])).masked_fill(masks[0], 0.0)
        out = F.linear(hidden, w2, b2)
        if masks[1] is not None:
            out = (out / (1 - options["out_dropout_p"])).masked_fill(masks[1], 0.0)
        return out if residual is None else residual + out

    return run


def documented_masks(rows, d_hidden, d_out, dropout_p=0.0, out_dropout_p=0.0, device="cpu"):
    """The first key drawn is the hidden activation's, the last the output's; both come from one draw."""
    torch.manual_seed(3)
    seeds = dropout.new_seed(torch.empty(0, device=device), 1 + bool(dropout_p and out_dropout_p))
    hidden = dropout.drop_mask(seeds[:1], torch.Size((rows, d_hidden)), dropout_p) if dropout_p else None
    return hidden, dropout.drop_mask(seeds[-1:], torch.Size((rows, d_out)), out_dropout_p) if out_dropout_p else None


def check(device, dtype, rows, d_model, d_hidden, d_out, residual=True, fused=None, recompute=False, **options):
    """`ffn` with options against its reference, with the documented masks."""
    gated = options.get("gated", False)
    x, w1, b1, w2, b2 = tensors(rows, d_model, 2 * d_hidden if gated else d_hidden, device, d_out)
    inputs = [x, w1, b1, w2[:, :d_hidden].contiguous(), b2]
    if residual:
        inputs.append(torch.randn(rows, d_out, generator=torch.Generator().manual_seed(2)).to(device))
    rates = {name: options[name] for name in ("dropout_p", "out_dropout_p") if name in options}
    masks = documented_masks(rows, d_hidden, d_out, **rates, device=device)

    def kernel(*t):
        torch.manual_seed(3)
        return ffn(*t[:5], residual=t[5] if residual else None, fused=fused, recompute=recompute, **options)

    assert_contract(kernel, reference(options, masks), inputs, dtype, summed=dict.fromkeys(range(1, 5), rows))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("activation", "fused"),
    [("gelu", True), ("gelu_tanh", False), ("quick_gelu", True), ("silu", False), ("relu2", True)],
)
@pytest.mark.essential
def test_gated_activations(device, activation, fused):
    check(device, torch.float16, 40, 24, 72, 20, residual=False, fused=fused, activation=activation, gated=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "fused", "recompute"),
    [
        (torch.float16, True, False), (torch.float16, True, "activation"), (torch.float16, True, True),
        (torch.float16, False, False), (torch.float16, False, "activation"), (torch.float16, False, True),
        (torch.float32, True, "activation"), (torch.bfloat16, False, "activation"), (torch.bfloat16, True, False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.essential
def test_residual_and_both_dropouts(device, dtype, fused, recompute):
    check(device, dtype, 40, 24, 72, 50, fused=fused, recompute=recompute, dropout_p=0.3, out_dropout_p=0.2)


@WAYS
@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"out_dropout_p": 0.3}, {}], ids=["hidden", "output", "none"])
def test_residual_with_one_dropout_or_none(device, fused, options):
    check(device, torch.float16, 40, 24, 72, 50, fused=fused, gated=True, **options)


@WAYS
def test_bias_gradients_over_several_row_blocks(device, fused):
    check(device, torch.float16, 290, 16, 40, 20, fused=fused, out_dropout_p=0.2)
    check(device, torch.float32, 150, 16, 40, 20, fused=fused, gated=True, dropout_p=0.2)


@WAYS
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_recomputing_gives_the_same_bits(device, fused, gated):
    results = []
    for recompute in (False, "activation", True):
        torch.manual_seed(3)
        x, w1, b1, w2, b2 = (t.half() for t in tensors(40, 24, 144, device, 20))
        inputs = [t.detach().requires_grad_() for t in (x, w1, b1, w2[:, :72] if gated else w2, b2)]
        out = ffn(*inputs, gated=gated, dropout_p=0.2, recompute=recompute, fused=fused)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), inputs)))
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            if i != 4 or device == "cpu":  # the second weight's: its activation comes from the rounded pre-activation
                assert torch.equal(a, b), i
            else:
                torch.testing.assert_close(a, b, rtol=0, atol=2e-3 * float(a.abs().max()))


class Hidden(TorchDispatchMode):
    """Memory of all tensors ``[40, 72]`` that come about inside."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == (40, 72):
            self.found.append(StorageWeakRef(out.untyped_storage()))
        return out


def test_what_is_kept_for_the_backward_pass(device):
    inputs = [t.requires_grad_() for t in tensors(40, 24, 72, device)]
    kept = {}
    for recompute in (False, "activation", True, 1):  # 1 equals True
        with Hidden() as mode:
            out = ffn(*inputs, recompute=recompute)
        kept[str(recompute)] = len({each.cdata for each in mode.found if not each.expired()})
        del out
    assert kept == {"False": 2, "activation": 1, "True": 0, "1": 0}


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("needed", range(6), ids=["x", "weight1", "bias1", "weight2", "bias2", "residual"])
def test_one_input_needs_its_gradient(device, needed, recompute):
    inputs = [*tensors(33, 16, 40, device, 20), torch.randn(33, 20, device=device)]
    inputs[needed].requires_grad_()
    torch.manual_seed(3)
    out = ffn(*inputs[:5], residual=inputs[5], out_dropout_p=0.2, fused=not recompute, recompute=recompute)
    masks = documented_masks(33, 40, 20, out_dropout_p=0.2, device=device)
    expected = reference({"out_dropout_p": 0.2}, masks)(*inputs)
    (got,), (want,) = (torch.autograd.grad(t.sum(), inputs[needed]) for t in (out, expected))
    torch.testing.assert_close(got, want)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_residual_stays_float32(device, dtype, fused):
    x, w1, b1, w2, b2 = (t.to(dtype) for t in tensors(40, 24, 72, device))
    residual = torch.randn(40, 24, device=device, requires_grad=True)
    w2.requires_grad_()
    out = ffn(x, w1, b1, w2, b2, residual=residual, fused=fused)
    assert out.dtype == torch.float32
    expected = residual + ffn(x, w1, b1, w2, b2).float()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=0, atol=eps * float(expected.detach().abs().max()))
    dresidual, dw2 = torch.autograd.grad(out.sum(), (residual, w2))
    assert dresidual.dtype == torch.float32 and dw2.dtype == dtype and (dresidual == 1).all()


@pytest.mark.interpreter
@WAYS
@pytest.mark.parametrize(("gated", "recompute"), [(False, False), (True, True)], ids=["plain", "gated, recompute"])
@pytest.mark.essential
def test_linear_act(device, fused, gated, recompute):
    x, w1, b1, *_ = tensors(40, 24, 144, device)
    mask, _ = documented_masks(40, 72 if gated else 144, 1, 0.2, device=device)

    def kernel(*t):
        torch.manual_seed(3)
        return linear_act(*t, "silu", gated=gated, dropout_p=0.2, recompute=recompute, fused=fused)

    def plain_(x, w, b):
        hidden = F.linear(x, w, b)
        if gated:
            gate, up = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.silu(hidden)
        return (hidden / 0.8).masked_fill(mask, 0.0)

    assert_contract(kernel, plain_, [x, w1, b1], torch.float16, summed={1: 40, 2: 40})


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_derivatives_far_out(device, activation):
    sizes = torch.tensor([30.0, 1e4, 1e18, 1e25])
    if activation == "relu2" or (device == "cpu" and activation == "gelu_tanh"):
        sizes = sizes[:2]  # where the value itself, or torch's own formula, does not overflow
    x = torch.cat((sizes, -sizes))[:, None].to(device).requires_grad_()
    (slope,) = torch.autograd.grad(linear_act(x, torch.ones(1, 1, device=device), None, activation).sum(), x)
    above = 2 * sizes if activation == "relu2" else torch.ones_like(sizes)
    expected = torch.cat((above, torch.zeros_like(sizes)))
    torch.testing.assert_close(slope.flatten().cpu(), expected, rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_draws_the_same_dropout(request, device):
    if request.config.getoption("--device") == "ttsem":
        pytest.skip("checkpointing keeps the device's generator and asks tensors for their device: not under ttsem")
    inputs = [t.requires_grad_() for t in tensors(20, 16, 40, device)]
    call = lambda *t: ffn(*t, dropout_p=0.3, out_dropout_p=0.3, residual=t[0])  # noqa: E731
    torch.manual_seed(3)
    plain_out = call(*inputs)
    expected = torch.autograd.grad(plain_out.sum(), inputs)
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(call, *inputs, use_reentrant=False)
    for g, e in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
        torch.testing.assert_close(g, e)
    torch.testing.assert_close(out, plain_out)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_the_result_can_be_changed_in_place(device, recompute):
    x, w1, b1, w2, b2 = tensors(12, 8, 16, device)
    x = x.view(3, 4, 8).requires_grad_()
    for call, width in (
        (lambda: ffn(x, w1, b1, w2, b2, recompute=recompute), 8),
        (lambda: linear_act(x, w1, b1, recompute=recompute), 16),
    ):
        plain_out = call()
        out = call()
        out += 1.0
        assert out.shape == (3, 4, width)
        torch.testing.assert_close(out, plain_out + 1.0)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (out, plain_out)))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None


def test_where_no_gradient_arrives_none_leaves(device):
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in tensors(5, 8, 16, device))
    for out in (ffn(x, w1, b1, w2, b2), linear_act(x, w1, b1)):
        assert torch.autograd.grad(NoGradient.apply(out).sum(), (x, w1, b1), allow_unused=True) == (None, None, None)


def test_a_single_row_says_nothing_of_the_stride_between_rows(device):
    """A part of a wider row counts as contiguous."""
    weights = tensors(1, 32, 48, device)[1:]
    for fused in (True, False):
        for x in (torch.randn(1, 64, device=device)[:, :32], torch.randn(5, 32, device=device)):
            torch.testing.assert_close(ffn(x, *weights, residual=x, fused=fused), x + plain()(x, *weights))


def test_dx_is_added_to_what_is_there(device, backend):
    """What a whole layer's backward pass asks for."""
    if backend == "eager":
        pytest.skip("a launcher, which has no eager side")
    from fusenc.kernels.ffn.arguments import Options, Saved
    from fusenc.kernels.ffn.backward import ffn_backward
    from fusenc.kernels.ffn.forward import linear_act_forward

    x, w1, b1, w2, _ = tensors(40, 24, 72, device)
    activated, hidden = linear_act_forward(x, w1, b1, None, 0.0, "gelu", False, None, True)(x, w1, b1, None)
    saved = Saved(x, w1, b1, w2, None, hidden, activated, None, None)
    dout, there = torch.randn(40, 24, device=device), torch.randn(40, 24, device=device)
    alone, added = (
        ffn_backward(dout, saved, Options(), (True, *[False] * 4), bool(into))(dout, saved, [], *into)[0]
        for into in ((), (there,))
    )
    torch.testing.assert_close(added, alone + there)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150), d_model=st.integers(1, 60), d_hidden=st.integers(1, 140), d_out=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES), activation=st.sampled_from(list(ACTIVATIONS)), gated=st.booleans(),
    rates=st.sampled_from([{}, {"dropout_p": 0.2}, {"out_dropout_p": 0.2}, {"dropout_p": 0.2, "out_dropout_p": 0.1}]),
    residual=st.booleans(), fused=st.booleans(), recompute=st.sampled_from([False, "activation", True]),
)  # fmt: skip
def test_random_combinations(request, dtype, rates, **chosen):
    device = "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"
    sizes = [chosen.pop(name) for name in ("rows", "d_model", "d_hidden", "d_out")]
    check(device, dtype, *sizes, **chosen, **rates)
