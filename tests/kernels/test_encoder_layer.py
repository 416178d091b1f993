"""fusenc.kernels.encoder_layer against float64, and against the chain of the functions it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract, assert_same, output_and_gradients
from fusenc.kernels import LayerWeights, encoder_layer, last_backend, use_backend
from fusenc.kernels.common import plan
from fusenc.kernels.encoder_layer import op
from fusenc.kernels.encoder_layer.op import ENCODER_LAYER
from tolerances import HALF_PRECISION, SAME_ALGORITHM, SAME_ALGORITHM_64

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = 3


def tensors(shape, hidden=70, device="cpu", biases=True):
    """The source and the parameters of a layer."""
    generator = torch.Generator().manual_seed(1)
    e = shape[-1]

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device)

    src = draw(*shape)
    root = e**-0.5
    weights = LayerWeights(
        draw(3 * e, e, scale=root), draw(3 * e), draw(e, e, scale=root), draw(e), 1 + draw(e, scale=0.3), draw(e),
        draw(hidden, e, scale=root), draw(hidden), draw(e, hidden, scale=hidden**-0.5), draw(e),
        1 + draw(e, scale=0.3), draw(e),
    )  # fmt: skip
    if not biases:
        weights = LayerWeights(*(None if "bias" in n else t for n, t in zip(weights._fields, weights, strict=True)))
    return src, weights


def plain(
    src, w, *, attn_mask=None, is_causal=False, batch_first=True, norm_first=False, activation="gelu", eps1=1e-5,
    eps2=1e-5,
):  # fmt: skip
    """The layer in plain PyTorch."""
    x = src if batch_first else src.transpose(0, 1)
    b, n, e = x.shape
    act = {"gelu": F.gelu, "relu": F.relu}[activation]

    def attend(x):
        q, k, v = (
            t.view(b, n, HEADS, e // HEADS).transpose(1, 2)
            for t in F.linear(x, w.in_proj_weight, w.in_proj_bias).chunk(3, -1)
        )
        mask = None if attn_mask is None else attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        return F.linear(out.transpose(1, 2).reshape(b, n, e), w.out_proj_weight, w.out_proj_bias)

    def feed_forward(x):
        return F.linear(act(F.linear(x, w.weight1, w.bias1)), w.weight2, w.bias2)

    def norm1(x):
        return F.layer_norm(x, (e,), w.norm1_weight, w.norm1_bias, eps1)

    def norm2(x):
        return F.layer_norm(x, (e,), w.norm2_weight, w.norm2_bias, eps2)

    if norm_first:
        x = x + attend(norm1(x))
        x = x + feed_forward(norm2(x))
    else:
        x = norm1(x + attend(x))
        x = norm2(x + feed_forward(x))
    return x if batch_first else x.transpose(0, 1)


def split(weights):
    """The parameters that there are, and how to put them back."""
    present = [i for i, t in enumerate(weights) if t is not None]

    def join(given):
        whole = [None] * len(weights)
        for i, t in zip(present, given, strict=True):
            whole[i] = t
        return LayerWeights(*whole)

    return [weights[i] for i in present], join


def hold(src, weights, dtype, **options):
    given, join = split(weights)
    # The gradient of a key's bias is 0 by nature, and of the others' many small terms: the floor counts their sum.
    rows = src.numel() // src.shape[-1]
    assert_contract(
        lambda src, *given: encoder_layer(src, join(given), HEADS, **options),
        lambda src, *given: plain(src, join(given), **options),
        [src, *given], dtype, summed={1 + i: rows for i in range(len(given))},
    )  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_layer(device, backend, dtype, norm_first):
    hold(*tensors((2, 35, 48), device=device), dtype, norm_first=norm_first)
    assert last_backend() == backend


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize(
    "case",
    ["bool mask", "float mask", "causal", "sequence first", "relu", "no biases", "one token", "eps of each norm"],
)
def test_option(device, case, norm_first):
    src, weights = tensors((2, 35, 48), device=device, biases=case != "no biases")
    options = {
        "bool mask": {"attn_mask": (torch.arange(35) < torch.tensor([[35], [11]]))[:, None, None, :].to(device)},
        "float mask": {"attn_mask": torch.linspace(-2, 2, 35 * 35).view(35, 35).to(device)},
        "causal": {"is_causal": True},
        "sequence first": {"batch_first": False},
        "relu": {"activation": "relu"},
        "eps of each norm": {"eps1": 0.1, "eps2": 2.0},
    }.get(case, {})
    hold(src[:1, :1] if case == "one token" else src, weights, torch.float32, norm_first=norm_first, **options)


def chain_and_one(src, weights, backend="auto", **options):
    """Results and gradients of the chain on eager PyTorch and of the one call, with the same dropout."""
    given, join = split(weights)
    results = []
    for used, chained in (("eager", True), (backend, False)):
        leaves = [t.detach().clone().requires_grad_() for t in (src, *given)]
        torch.manual_seed(5)
        with use_backend(used), pytest.MonkeyPatch.context() as patch:
            if chained:
                patch.setattr(ENCODER_LAYER, "instead", lambda tensors, numbers, autocast: op.chained(numbers))
            plan.forget()
            out = encoder_layer(leaves[0], join(leaves[1:]), HEADS, **options)
            results.append(output_and_gradients(out, leaves))
    return results


@pytest.mark.interpreter
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_dropout_is_that_of_the_chain(device, norm_first):
    options = {"attn_dropout_p": 0.3, "dropout1_p": 0.2, "dropout_p": 0.4, "dropout2_p": 0.1}
    src, weights = tensors((2, 35, 48), device=device)
    chain, one = chain_and_one(src, weights, norm_first=norm_first, **options)
    assert_same(one, chain, SAME_ALGORITHM)
    for place in options:
        chain, one = chain_and_one(src, weights, norm_first=norm_first, **{place: 0.3})
        assert_same(one, chain, SAME_ALGORITHM)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_eager_layer_is_the_eager_chain(norm_first, batch_first, dtype):
    src, weights = tensors((2, 7, 48) if batch_first else (7, 2, 48))
    src, weights = src.to(dtype), LayerWeights(*(t.to(dtype) for t in weights))
    options = {"attn_dropout_p": 0.3, "dropout1_p": 0.2, "dropout_p": 0.4, "dropout2_p": 0.1}
    options |= {"norm_first": norm_first, "batch_first": batch_first, "backend": "eager"}
    tolerance = {torch.float64: SAME_ALGORITHM_64, torch.float32: SAME_ALGORITHM}.get(dtype, 16 * HALF_PRECISION)
    for case in ({}, {"is_causal": True}, {"attn_mask": torch.rand(7, 7, generator=torch.manual_seed(0)) > 0.3}):
        chain, one = chain_and_one(src, weights, **options, **case)
        assert_same(one, chain, tolerance)
    for place in ("attn_dropout_p", "dropout1_p", "dropout_p", "dropout2_p"):
        chain, one = chain_and_one(src, weights, **options | {place: 0.0})
        assert_same(one, chain, tolerance)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_packed_batch(device, norm_first):
    src, weights = tensors((70, 48), device=device)
    starts = torch.tensor([0, 33, 33, 70], device=device)
    options = {"cu_seqlens": starts, "max_seqlen": 37, "norm_first": norm_first}
    for case in ({"attn_dropout_p": 0.2}, {"is_causal": True}):
        chain, one = chain_and_one(src, weights, **options, **case)
        assert_same(one, chain, SAME_ALGORITHM)


@pytest.mark.essential
def test_a_row_without_keys_gives_its_value_bias_nothing(device):
    """The value bias's gradient is summed from rows of dO, which count only if they attended to something."""
    src, weights = tensors((2, 35, 48), device=device)
    mask = torch.ones(2, 1, 35, 35, dtype=torch.bool, device=device)
    mask[0, 0, :5] = False
    for p in (0.0, 0.3):
        chain, one = chain_and_one(src, weights, attn_mask=mask, attn_dropout_p=p)
        assert_same(one, chain, SAME_ALGORITHM)


def test_gradient_of_a_mask(device):
    src, weights = tensors((2, 35, 48), device=device)
    bias = torch.linspace(-2, 2, 35 * 35).view(1, 1, 35, 35).to(device)
    grads = []
    for backend in ("eager", "auto"):
        leaf = bias.clone().requires_grad_()
        with use_backend(backend):
            out = encoder_layer(src, weights, HEADS, attn_mask=leaf)
            grads.append(output_and_gradients(out, [leaf]))
    assert_same(grads[1], grads[0], SAME_ALGORITHM)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("wanted", ["src", "in_proj_bias", "norm1_weight", "bias2", "weight1", "out_proj_bias"])
def test_only_some_inputs_need_gradients(device, norm_first, wanted):
    src, weights = tensors((2, 35, 48), device=device)
    named = {"src": src, **weights._asdict()}
    results = []
    for backend in ("eager", "auto"):
        leaf = named[wanted].detach().clone().requires_grad_()
        given = named | {wanted: leaf}
        with use_backend(backend):
            out = encoder_layer(given.pop("src"), LayerWeights(**given), HEADS, norm_first=norm_first)
            results.append(output_and_gradients(out, [leaf]))
    assert_same(results[1], results[0], SAME_ALGORITHM)


def test_two_runs_give_the_same_bits(device):
    src, weights = tensors((3, 70, 48), device=device)
    runs = [chain_and_one(src.half(), LayerWeights(*(t.half() for t in weights)))[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inference_gives_the_same_bits_as_training(device):
    src, weights = tensors((2, 35, 48), device=device)
    out = encoder_layer(src, weights, HEADS)
    assert torch.equal(encoder_layer(src.requires_grad_(), weights, HEADS), out)


def test_empty_batch(device):
    src, weights = tensors((0, 5, 48), device=device)
    assert encoder_layer(src.requires_grad_(), weights, HEADS).shape == (0, 5, 48)


def test_a_function_as_activation_is_that_of_the_name(device):
    src, weights = tensors((2, 5, 48), device=device)
    expected = encoder_layer(src, weights, HEADS, activation="gelu")
    torch.testing.assert_close(
        encoder_layer(src, weights, HEADS, activation=F.gelu), expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM
    )
