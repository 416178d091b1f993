"""fusenc.TransformerDecoderLayer against torch's own."""

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
from tolerances import FORWARD_FACTOR, SAME_ALGORITHM, SAME_ALGORITHM_64
from torch import nn

CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
PADDING = torch.arange(5) >= torch.tensor([[5], [3], [1]])
BOTH = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


def pair(dtype=torch.float64, **options):
    """Torch's layer and ours with the same weights, no dropout."""
    options = {"dropout": 0.0, "dim_feedforward": 20, "batch_first": True, "dtype": dtype, **options}
    layers = []
    for kind in (nn.TransformerDecoderLayer, fusenc.TransformerDecoderLayer):
        torch.manual_seed(0)
        layers.append(kind(12, 3, **options))
    for (name, a), (other, b) in zip(*(layer.state_dict().items() for layer in layers), strict=True):
        assert name == other and torch.equal(a, b), "same constructor, same seed, same weights"
    return layers


def inputs(batch=3, len_q=7, len_k=5, dtype=torch.float64, device="cpu", width=12):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(device, dtype)
        for length in (len_q, len_k)
    ]


def assert_same(layers, leaves, *args, tolerance=SAME_ALGORITHM_64, **kwargs):
    """Same output and same gradients of inputs and parameters."""
    assert layers[1].why_not_fused() == ""
    results = [output_and_gradients(m(*args, **kwargs), [*leaves, *m.parameters()]) for m in layers]
    assert results[0][0].shape == results[1][0].shape
    contract.assert_same(results[1], results[0], tolerance)


@st.composite
def calls(draw):
    """Constructor options, inputs and masks of a call that torch takes, in which every query sees a key."""
    batch, len_q, len_k = (draw(st.integers(1, 5)) for _ in range(3))
    pick = st.booleans()
    activation = draw(st.sampled_from(["relu", "gelu", nn.GELU(approximate="tanh"), torch.tanh]))
    options = {"norm_first": draw(pick), "batch_first": draw(pick), "bias": draw(pick), "activation": activation}
    batched = draw(pick)
    tensors = inputs(batch, len_q, len_k)
    if not batched:
        tensors = [t[0] for t in tensors]
    elif not options["batch_first"]:
        tensors = [t.transpose(0, 1) for t in tensors]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def mask(kind, shape):
        blocked = torch.rand(shape, generator=generator) < 0.4
        blocked[..., 0] = False
        if kind == "bool":
            return blocked
        return torch.randn(shape, generator=generator, dtype=torch.float64).masked_fill(blocked, float("-inf"))

    kwargs = {}
    for which, keys in (("tgt", len_q), ("memory", len_k)):
        kind = draw(st.sampled_from(["", "bool", "float", "bool of heads", "float of heads", "causal"]))
        if kind == "causal":
            kwargs |= {f"{which}_mask": torch.ones(len_q, keys, dtype=torch.bool).triu(1), f"{which}_is_causal": True}
        elif kind:
            heads = (3 * batch if batched else 3,) if "heads" in kind else ()
            kwargs[f"{which}_mask"] = mask(kind.split()[0], (*heads, len_q, keys))
        padding = draw(st.sampled_from(["", "bool", "float"]))
        if padding:
            kwargs[f"{which}_key_padding_mask"] = mask(padding, (batch, keys) if batched else (keys,))
    return options, tensors, kwargs


@settings(max_examples=100, deadline=None)
@given(calls(), st.booleans())
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_same_as_torch(call, training):
    options, tensors, kwargs = call
    floating = [m for m in kwargs.values() if isinstance(m, torch.Tensor) and m.is_floating_point()]
    leaves = [t.requires_grad_() for t in (*(t.detach() for t in tensors), *floating)]
    assert_same([m.train(training) for m in pair(**options)], leaves, *leaves[:2], **kwargs)


@BOTH
def test_inference_takes_no_gradients_and_gives_torchs_result(norm_first):
    layers = [layer.eval() for layer in pair(norm_first=norm_first)]
    with torch.inference_mode():
        expected, got = (m(*inputs(), memory_key_padding_mask=PADDING) for m in layers)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM_64)


@BOTH
def test_queries_that_see_nothing_are_finite(norm_first):
    _, ours = pair(norm_first=norm_first)
    tgt, memory = (t.requires_grad_() for t in inputs())
    of_tgt = torch.zeros(3, 7, dtype=torch.bool)
    of_tgt[1] = True
    of_memory = PADDING.clone()
    of_memory[2] = True
    out = ours(tgt, memory, tgt_key_padding_mask=of_tgt, memory_key_padding_mask=of_memory)
    assert all(t.isfinite().all() for t in output_and_gradients(out, [tgt, memory, *ours.parameters()]))


@pytest.mark.parametrize("sizes", [(0, 7, 5), (3, 0, 5), (3, 7, 0)], ids=str)
def test_empty_input(sizes):
    theirs, ours = pair()
    expected, got = (m(*inputs(*sizes)) for m in (theirs, ours))
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM_64)


@pytest.mark.parametrize("site", ["dropout", "dropout1", "dropout2", "dropout3", "self_attn", "multihead_attn"])
@BOTH
def test_each_dropout_has_its_place(site, norm_first):
    """With one dropout at probability 1 and the others off, the result does not depend on the mask drawn."""
    layers = pair(norm_first=norm_first, activation=torch.tanh if site == "dropout3" else "relu")
    for layer in layers:
        setattr(getattr(layer, site), "dropout" if site.endswith("attn") else "p", 1.0)
    expected, got = (layer(*inputs()) for layer in layers)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM_64)
    torch.testing.assert_close(*(layer.eval()(*inputs()) for layer in layers), rtol=0, atol=SAME_ALGORITHM_64)


def test_dropout_is_drawn_from_the_generator():
    layer = fusenc.TransformerDecoderLayer(12, 3, 20, dropout=0.5, batch_first=True, dtype=torch.float64)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(layer(*inputs()))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    layer.eval()
    assert torch.equal(layer(*inputs()), layer(*inputs()))


T, M = inputs(dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(T[..., :8], M),
        lambda m: m(T, M[..., :8]),
        lambda m: m(T, M[0]),
        lambda m: m(T[None], M),
        lambda m: m(T, M[:2]),
        lambda m: m(T.double(), M),
        lambda m: m(T, M.double()),
        lambda m: m(T.long(), M.long()),
        lambda m: m(T, M, tgt_mask=torch.zeros(7, 5)),
        lambda m: m(T, M, memory_mask=torch.zeros(5, 7)),
        lambda m: m(T, M, tgt_mask=torch.zeros(7, 7, dtype=torch.int64)),
        lambda m: m(T, M, tgt_key_padding_mask=PADDING),
        lambda m: m(T, M, memory_key_padding_mask=PADDING[:2]),
        lambda m: m(T, M, tgt_is_causal=True),
        lambda m: m(T, M, memory_is_causal=True),
        lambda m: m(torch.nested.nested_tensor(list(T)), M),
        lambda m: m(T, torch.nested.nested_tensor(list(M))),
    ],
)
def test_bad_input_raises_what_torch_raises(call):
    theirs, ours = pair(torch.float32)
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(type(expected.value)) as got:
        call(ours)
    assert str(got.value) == str(expected.value)


def test_a_hint_without_a_mask_raises_in_inference_too():
    _, ours = pair(torch.float32)
    with pytest.raises(RuntimeError, match="Need attn_mask"), torch.no_grad():
        ours.eval()(T, M, tgt_is_causal=True)


def test_mixed_masks_warn_as_torch_does():
    messages = []
    for layer in pair(torch.float32):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(T, M, memory_mask=torch.zeros(7, 5), memory_key_padding_mask=PADDING)
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1] and len(messages[0]) == 1


def test_bad_construction_raises_what_torch_raises():
    with pytest.raises(AssertionError, match="divisible"):
        fusenc.TransformerDecoderLayer(12, 5)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu"):
        fusenc.TransformerDecoderLayer(12, 3, activation="swish")


def test_hooks_replaced_parts_and_overridden_blocks_are_respected():
    theirs, ours = pair()
    seen = []
    handle = ours.multihead_attn.register_forward_hook(lambda *args: seen.append(1))
    assert "multihead_attn has hooks" in ours.why_not_fused()
    torch.testing.assert_close(ours(*inputs()), theirs(*inputs()), rtol=0, atol=SAME_ALGORITHM_64)
    assert seen
    handle.remove()
    assert ours.why_not_fused() == ""
    ours.norm2 = nn.Identity()
    assert "norm2 is a Identity" in ours.why_not_fused()
    assert ours(*inputs()).shape == (3, 7, 12)

    class Own(fusenc.TransformerDecoderLayer):
        def _mha_block(self, x, *args):
            return torch.zeros_like(x)

    own = Own(12, 3, 20, batch_first=True, dtype=torch.float64)
    assert own.why_not_fused() == "Own has _mha_block of its own"
    tgt, memory = inputs()
    assert torch.equal(own.eval()(tgt, memory), own(tgt, 2 * memory))


@pytest.mark.parametrize(
    ("name", "heads", "options", "reason"),
    [
        ("self_attn", 3, {"add_bias_kv": True}, "self_attn has options that are not fused"),
        ("multihead_attn", 3, {"add_bias_kv": True}, "multihead_attn has options that are not fused"),
        ("multihead_attn", 2, {}, "self_attn and multihead_attn disagree about num_heads"),
    ],
)
def test_what_the_layer_cannot_fuse_runs_torchs_own_forward(name, heads, options, reason):
    layers = pair()
    for layer in layers:
        torch.manual_seed(1)
        setattr(layer, name, nn.MultiheadAttention(12, heads, batch_first=True, dtype=torch.float64, **options))
    assert layers[1].why_not_fused() == reason
    torch.testing.assert_close(*(layer(*inputs()) for layer in layers))
    wide = fusenc.TransformerDecoderLayer(512, 1, 8)
    assert "head size" in wide.why_not_fused()


def test_checkpoints_pickle_deepcopy_and_old_checkpoints():
    theirs, ours = pair()
    expected = ours(*inputs())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fusenc.TransformerDecoderLayer
        assert torch.equal(other(*inputs()), expected)
    theirs.load_state_dict(ours.state_dict())
    old = copy.deepcopy(ours)
    state = old.__dict__.copy()
    del state["activation"]  # of versions that knew relu alone
    old.__setstate__(state)
    assert torch.equal(old(*inputs()), expected)


@BOTH
def test_autocast(norm_first):
    theirs, ours = pair(torch.float32, norm_first=norm_first)
    exact = theirs(T, M)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = theirs(T, M), ours(T, M)
    assert got.dtype == expected.dtype
    assert (got - exact).abs().max() <= FORWARD_FACTOR * (expected - exact).abs().max()


@pytest.mark.parametrize("training", [True, False], ids=["pre-norm training", "post-norm inference"])
def test_compiles_whole(training):
    torch._dynamo.reset()
    _, ours = pair(torch.float32, activation="gelu", norm_first=training)
    ours.train(training)
    compiled = torch.compile(ours, fullgraph=True)
    call = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}
    with torch.set_grad_enabled(training):
        got, expected = compiled(T, M, **call), ours(T, M, **call)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    if training:
        results = [output_and_gradients(out, list(ours.parameters())) for out in (got, expected)]
        contract.assert_same(*results, SAME_ALGORITHM)


@pytest.mark.kernel
@BOTH
@pytest.mark.essential
def test_whole_layer_on_the_gpu_path(device, backend, norm_first):
    """With dropout, against the eager path, which draws the same masks."""
    torch.manual_seed(0)
    layer = fusenc.TransformerDecoderLayer(48, 4, 100, 0.2, "gelu", batch_first=True, norm_first=norm_first).to(device)
    tgt, memory = (t.requires_grad_() for t in inputs(dtype=torch.float32, device=device, width=48))
    call = {"tgt_mask": CAUSAL.to(device), "tgt_is_causal": True, "memory_key_padding_mask": PADDING.to(device)}
    results = []
    for forced in ("auto", "eager"):
        torch.manual_seed(5)
        with fusenc.kernels.use_backend(forced):
            results.append(output_and_gradients(layer(tgt, memory, **call), [tgt, memory, *layer.parameters()]))
            assert fusenc.kernels.last_backend() == (backend if forced == "auto" else "eager")
    contract.assert_same(*results, SAME_ALGORITHM)
