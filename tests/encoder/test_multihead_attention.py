"""fusenc.MultiheadAttention against torch's own."""

from __future__ import annotations

import copy
import pickle
import warnings

import contract
import fusenc
import pytest
import torch
from contract import output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FORWARD_FACTOR, HALF_PRECISION, SAME_ALGORITHM, SAME_ALGORITHM_64
from torch import nn

INF = float("-inf")


def pair(*sizes, dtype=torch.float64, **options):
    """Torch's module and ours with the same weights."""
    modules = []
    for kind in (nn.MultiheadAttention, fusenc.MultiheadAttention):
        torch.manual_seed(0)
        modules.append(kind(*(sizes or (12, 3)), dtype=dtype, **options))
    for (name, a), (other, b) in zip(*(m.state_dict().items() for m in modules), strict=True):
        assert name == other and torch.equal(a, b), "same constructor, same seed, same weights"
    return modules


def inputs(*shapes, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def results(module, leaves, *args, **kwargs):
    """Output, weights and the gradients of all inputs and parameters, through both."""
    out, weights = module(*args, **kwargs)
    whole = out.flatten() if weights is None else torch.cat([out.flatten(), weights.flatten()])
    return [out.detach(), weights, *output_and_gradients(whole, [*leaves, *module.parameters()])[1:]]


def assert_same(modules, leaves, *args, tolerance=SAME_ALGORITHM_64, **kwargs):
    theirs, ours = (results(module, leaves, *args, **kwargs) for module in modules)
    (a, a_weights, *a_grads), (b, b_weights, *b_grads) = theirs, ours
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a_weights is None) == (b_weights is None)
    if a_weights is not None:
        assert a_weights.shape == b_weights.shape and a_weights.dtype == b_weights.dtype
        torch.testing.assert_close(b_weights, a_weights, rtol=0, atol=tolerance)
    contract.assert_same([b, *b_grads], [a, *a_grads], tolerance)


@st.composite
def calls(draw):
    """Constructor options, inputs and call options of a call that torch takes, in which every query sees a key."""
    nhead = draw(st.integers(1, 3))
    width = nhead * draw(st.sampled_from([1, 4, 5]))
    batch, len_q, len_k = (draw(st.integers(1, 5)) for _ in range(3))
    pick = st.booleans()
    options = {
        "bias": draw(pick), "add_bias_kv": draw(pick), "add_zero_attn": draw(pick), "batch_first": draw(pick),
        "kdim": draw(st.sampled_from([None, 7])), "vdim": draw(st.sampled_from([None, 3])),
    }  # fmt: skip
    batched = draw(pick)
    widths = (width, options["kdim"] or width, options["vdim"] or width)
    sharing = draw(st.sampled_from(["one input", "key is value", "three inputs"])) if len(set(widths)) == 1 else ""
    if sharing == "one input":
        len_k = len_q
    shapes = [
        (n, w) if not batched else (batch, n, w) if options["batch_first"] else (n, batch, w)
        for n, w in zip((len_q, len_k, len_k), widths, strict=True)
    ]
    tensors = inputs(*shapes)
    if sharing in ("one input", "key is value"):
        tensors[2] = tensors[1]
    if sharing == "one input":
        tensors[0] = tensors[1] = tensors[2]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def mask(kind, shape):
        blocked = torch.rand(shape, generator=generator) < 0.4
        blocked[..., 0] = False
        if kind == "bool":
            return blocked
        return torch.randn(shape, generator=generator, dtype=torch.float64).masked_fill(blocked, INF)

    kwargs = {"need_weights": draw(pick), "average_attn_weights": draw(pick)}
    kind = draw(st.sampled_from(["", "bool", "float", "bool of heads", "float of heads", "causal"]))
    if kind == "causal":
        kwargs |= {"attn_mask": torch.ones(len_q, len_k, dtype=torch.bool).triu(1), "is_causal": not (
            options["add_bias_kv"] or options["add_zero_attn"])}  # fmt: skip
    elif kind:
        heads = (batch if batched else 1) * nhead
        kwargs["attn_mask"] = mask(kind.split()[0], ((heads,) if "heads" in kind else ()) + (len_q, len_k))
    padding = draw(st.sampled_from(["", "bool", "float"]))
    if padding:
        kwargs["key_padding_mask"] = mask(padding, (batch, len_k) if batched else (len_k,))
    return (width, nhead), options, tensors, kwargs


@settings(max_examples=150, deadline=None)
@given(calls())
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_same_as_torch(call):
    sizes, options, tensors, kwargs = call
    modules = pair(*sizes, **options)
    masks = [kwargs.get(name) for name in ("attn_mask", "key_padding_mask")]
    floating = [m for m in masks if m is not None and m.is_floating_point()]
    leaves = list({id(t): t.requires_grad_() for t in (*tensors, *floating)}.values())
    assert modules[1].why_not_fused() == ""
    assert_same(modules, leaves, *tensors, **kwargs)


@pytest.mark.parametrize("sizes", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_empty_input(sizes, need_weights):
    """Torch takes them too, but for a few with a mask."""
    batch, len_q, len_k = sizes
    theirs, ours = pair(batch_first=True)
    query, memory = inputs((batch, len_q, 12), (batch, len_k, 12))
    expected, got = (m(query, memory, memory, need_weights=need_weights) for m in (theirs, ours))
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM_64)
    padding = torch.zeros(batch, len_k, dtype=torch.bool)
    masked = ours(query, memory, memory, padding, need_weights=need_weights, attn_mask=padding.new_zeros(len_q, len_k))
    assert torch.equal(masked[0], got[0])


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_same_in_inference(training, need_weights):
    """Torch's fast path too."""
    theirs, ours = (m.train(training) for m in pair(12, 2, batch_first=True))
    (x,) = inputs((3, 7, 12))
    padding = torch.arange(7) >= torch.tensor([[7], [4], [1]])
    with torch.no_grad():
        expected, got = (m(x, x, x, key_padding_mask=padding, need_weights=need_weights) for m in (theirs, ours))
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM_64, atol=SAME_ALGORITHM_64)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_nothing_has_weights_0(kind, need_weights):
    _, ours = pair(batch_first=True)
    (x,) = inputs((2, 5, 12))
    padding = torch.tensor([[False] * 5, [True] * 5])
    padding = padding if kind == "bool" else torch.zeros(2, 5, dtype=x.dtype).masked_fill(padding, INF)
    out, weights = ours(x.requires_grad_(), x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(out[1], ours.out_proj.bias.expand(5, 12))
    assert weights is None or (weights[1] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("average", [True, False], ids=["average", "each head"])
def test_weights_are_those_after_dropout(average):
    ours = fusenc.MultiheadAttention(12, 3, dropout=0.5, batch_first=True, dtype=torch.float64)
    (x,) = inputs((2, 5, 12))
    torch.manual_seed(3)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).double().mean() < 0.8
    value = torch.nn.functional.linear(x, ours.in_proj_weight[24:], ours.in_proj_bias[24:])
    heads = weights @ value.view(2, 5, 3, 4).transpose(1, 2)
    expected = ours.out_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, rtol=0, atol=SAME_ALGORITHM_64)
    torch.manual_seed(3)
    again, averaged = ours(x, x, x)
    torch.testing.assert_close(averaged, weights.mean(1), rtol=0, atol=SAME_ALGORITHM_64)
    assert torch.equal(again, out), "the generator decides"
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], out, rtol=0, atol=SAME_ALGORITHM_64)
    assert torch.equal(ours.eval()(x, x, x)[0], ours(x, x, x)[0])
    ours.dropout = 1.0
    assert torch.equal(ours.train()(x, x, x, average_attn_weights=average)[0], ours.out_proj.bias.expand(2, 5, 12))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_hint_without_a_mask_raises(training):
    """Torch's plain path raises, its fast path ignores the hint."""
    (x,) = inputs((2, 5, 12))
    theirs, ours = pair(batch_first=True)
    with pytest.raises(RuntimeError) as expected:
        theirs(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError) as got, torch.no_grad():
        ours.train(training)(x, x, x, is_causal=True)
    assert str(got.value) == str(expected.value)


X = torch.randn(2, 5, 12)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(X[..., :8], X, X),
        lambda m: m(X[None], X, X),
        lambda m: m(X, X[0], X[0]),
        lambda m: m(X, X[:1], X[:1]),
        lambda m: m(X, X, X[:, :3]),
        lambda m: m(X, X, X, attn_mask=torch.zeros(2, 5)),
        lambda m: m(X, X, X, attn_mask=torch.zeros(4, 5, 5)),
        lambda m: m(X, X, X, attn_mask=torch.zeros(1, 1, 5, 5)),
        lambda m: m(X[0], X[0], X[0], attn_mask=torch.zeros(2, 5, 5)),
        lambda m: m(X, X, X, attn_mask=torch.zeros(5, 5, dtype=torch.int64)),
        lambda m: m(X, X, X, attn_mask=torch.zeros(5, 5, dtype=torch.float64), need_weights=False),
        lambda m: m(X, X, X, key_padding_mask=torch.zeros(2, 4)),
        lambda m: m(X, X, X, key_padding_mask=torch.zeros(5)),
        lambda m: m(X, X, X, key_padding_mask=torch.zeros(2, 5, dtype=torch.uint8)),
        lambda m: m(X.double(), X.double(), X.double()),
        lambda m: m(X.long(), X.long(), X.long()),
    ],
)
def test_bad_input_raises_what_torch_raises(call):
    theirs, ours = pair(dtype=torch.float32, batch_first=True)
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(type(expected.value)) as got:
        call(ours)
    assert str(got.value) == str(expected.value)


def test_bad_construction_raises_what_torch_raises():
    with pytest.raises(AssertionError, match="divisible"):
        fusenc.MultiheadAttention(12, 5)
    with pytest.raises(ValueError, match="greater than 0"):
        fusenc.MultiheadAttention(12, 0)


def test_mixed_masks_warn_as_torch_does():
    messages = []
    for module in pair(dtype=torch.float32, batch_first=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module(X, X, X, attn_mask=torch.zeros(5, 5), key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1] and len(messages[0]) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_as_torch_takes_them():
    theirs, ours = (m.eval() for m in pair(12, 2, batch_first=True))
    sequences = inputs((3, 12), (5, 12), (1, 12))
    x = torch.nested.nested_tensor(sequences)
    with torch.no_grad():
        for options in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            (expected, a), (got, b) = (m(x, x, x, **options) for m in (theirs, ours))
            assert got.is_nested and got.layout == expected.layout
            padded = (t.to_padded_tensor(0.0) for t in (got, expected))
            torch.testing.assert_close(*padded, rtol=0, atol=SAME_ALGORITHM_64)
            torch.testing.assert_close(b, a, rtol=0, atol=SAME_ALGORITHM_64)
    for module in (theirs.train(), ours.train()):  # torch has no gradients of nested weights, nor have we
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
            module(x, x, x)
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
            module(x, sequences[0][None], sequences[0][None])
    with pytest.raises(AssertionError, match="sequence lengths"):
        ours(x, x, torch.nested.nested_tensor(sequences[::-1]), need_weights=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("crossed", [False, True], ids=["one input", "two inputs"])
def test_nested_tensors_in_training(layout, crossed):
    _, ours = pair(batch_first=True)
    tokens = inputs((3, 12), (5, 12), (4, 12), (2, 12))
    of_q, of_k = (tokens[:2], tokens[2:]) if crossed else (tokens[:2], tokens[:2])
    query, key = (torch.nested.nested_tensor(ts, layout=layout, requires_grad=True) for ts in (of_q, of_k))
    key = key if crossed else query
    out, _ = ours(query, key, key, need_weights=False)
    assert out.is_nested and out.layout == layout
    grads = []
    for outs in (out.unbind(), [ours(q, k, k, need_weights=False)[0] for q, k in zip(of_q, of_k, strict=True)]):
        grads.append(output_and_gradients(torch.cat(list(outs)), list(ours.parameters())))
    contract.assert_same(*grads, SAME_ALGORITHM_64)
    if layout == torch.jagged:
        (out + query).values().sum()  # of the same ragged shape


def test_pickle_deepcopy_hooks_and_old_checkpoints():
    theirs, ours = pair(batch_first=True)
    (x,) = inputs((2, 5, 12))
    expected = ours(x, x, x)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fusenc.MultiheadAttention
        assert torch.equal(other(x, x, x)[0], expected)
    old = copy.deepcopy(ours)
    state = old.__dict__.copy()
    del state["_qkv_same_embed_dim"]  # of torch 1.1
    old.__setstate__(state)
    assert torch.equal(old(x, x, x)[0], expected)
    theirs.load_state_dict(ours.state_dict())
    seen = []
    ours.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    assert torch.equal(ours(x, x, x)[0], seen[0])


def test_a_parametrised_weight_counts():
    theirs, ours = pair(batch_first=True)
    (x,) = inputs((2, 5, 12))
    for module in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
        torch.nn.utils.parametrizations.weight_norm(module.out_proj, "weight")
        for name, parameter in module.named_parameters():
            if name.endswith("original0"):
                parameter.data.mul_(1.5)
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x), rtol=0, atol=SAME_ALGORITHM_64)


def test_what_the_kernels_cannot_do_runs_torchs_own_forward():
    theirs, ours = pair(512, 1, batch_first=True)
    assert "head size" in ours.why_not_fused()
    (x,) = inputs((2, 3, 512))
    assert torch.equal(ours(x, x, x)[0], theirs(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_autocast(need_weights):
    """Weights are float32, as torch's on a GPU; on a CPU torch's are bfloat16."""
    theirs, ours = pair(dtype=torch.float32, batch_first=True, add_bias_kv=True)
    mask = torch.randn(5, 5).tril()
    exact = theirs(X, X, X, need_weights=need_weights, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (m(X, X, X, need_weights=need_weights, attn_mask=mask) for m in (theirs, ours))
    assert got[0].dtype == expected[0].dtype and (not need_weights or got[1].dtype == torch.float32)
    for truth, a, b in zip(exact, expected, got, strict=True):
        if truth is not None:
            assert (b - truth).abs().max() <= FORWARD_FACTOR * (a - truth).abs().max()


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_half_precision(need_weights):
    _, ours = pair(dtype=torch.float32, batch_first=True)
    expected = ours(X, X, X, need_weights=need_weights)
    x = X.half()
    got = ours.half()(x, x, x, need_weights=need_weights)
    for a, b in zip(expected, got, strict=True):
        if a is not None:
            assert b.dtype == torch.float16
            torch.testing.assert_close(b.float(), a, rtol=0, atol=HALF_PRECISION)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_compiles_whole(need_weights):
    torch._dynamo.reset()
    _, ours = pair(dtype=torch.float32, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True)
    x, memory = inputs((2, 5, 12), (2, 4, 12), dtype=torch.float32)
    padding = torch.arange(4) >= torch.tensor([[4], [2]])
    got, expected = (
        results(m, list(ours.parameters()), x, memory, memory, key_padding_mask=padding, need_weights=need_weights)
        for m in (compiled, ours)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    if need_weights:  # with a mask drawn by the compiled graph
        ours.dropout = 0.5
        _, weights = compiled(x, memory, memory)
        assert (weights == 0).any()


@pytest.mark.kernel
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.essential
def test_on_the_gpu_path(device, backend, need_weights):
    """With dropout, against the eager path, which draws the same mask."""
    module = fusenc.MultiheadAttention(48, 4, dropout=0.2, add_zero_attn=True, batch_first=True).to(device)
    query, memory = inputs((2, 7, 48), (2, 9, 48), dtype=torch.float32, device=device)
    padding = torch.arange(9, device=device) >= torch.tensor([[9], [0]], device=device)
    leaves = [query.requires_grad_(), memory.requires_grad_()]
    found = []
    for forced in ("auto", "eager"):
        torch.manual_seed(5)
        with fusenc.kernels.use_backend(forced):
            found.append(results(module, leaves, query, memory, memory, padding, need_weights))
            assert fusenc.kernels.last_backend() == (backend if forced == "auto" else "eager")
    (got, got_weights, *got_grads), (expected, expected_weights, *expected_grads) = found
    if need_weights:
        torch.testing.assert_close(got_weights, expected_weights, rtol=0, atol=SAME_ALGORITHM)
    contract.assert_same([got, *got_grads], [expected, *expected_grads], SAME_ALGORITHM)
