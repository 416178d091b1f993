"""fusenc.TransformerEncoder against torch's own: padded, packed and nested batches."""

from __future__ import annotations

import copy
import pickle
import warnings

import contract
import fusenc
import pytest
import torch
from contract import output_and_gradients
from fusenc.packing import PackedTokens, PaddedPacking, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import HALF_PRECISION, SAME_ALGORITHM, SAME_ALGORITHM_64
from torch import nn
from torch._dynamo.testing import CompileCounter

nested_warnings = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
KPM = torch.arange(7) >= torch.tensor([[7], [4], [2], [5]])
KEEP = ~KPM
FLOAT_KPM = torch.zeros(4, 7).masked_fill(KPM, float("-inf"))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
PER_HEAD = torch.randn(16, 7, 7, generator=torch.Generator().manual_seed(0))
MASKS = {
    "no mask": {},
    "padding": {"src_key_padding_mask": KPM},
    "float padding": {"src_key_padding_mask": FLOAT_KPM},
    "padding anywhere": {"src_key_padding_mask": KPM.flip(1)},
    "causal": {"mask": CAUSAL},
    "causal, padding": {"mask": CAUSAL < 0, "src_key_padding_mask": KPM},
    "causal hint, padding": {"mask": CAUSAL < 0, "src_key_padding_mask": KPM, "is_causal": True},
    "causal, float padding": {"mask": CAUSAL, "src_key_padding_mask": FLOAT_KPM},
    "per head, padding": {"mask": PER_HEAD, "src_key_padding_mask": FLOAT_KPM},
    "causal, padding before": {"mask": CAUSAL.T < 0, "src_key_padding_mask": KPM.flip(1)},
}


def pair(num_layers=2, norm=True, dtype=torch.float32, **options):
    """Torch's encoder and ours with the same weights, no dropout."""
    options = {"dropout": 0.0, "dim_feedforward": 60, "activation": "gelu", "batch_first": True, **options}
    encoders = []
    for library in (nn, fusenc):
        torch.manual_seed(0)
        layer = library.TransformerEncoderLayer(32, 4, dtype=dtype, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoders.append(
                library.TransformerEncoder(layer, num_layers, nn.LayerNorm(32, dtype=dtype) if norm else None)
            )
    return encoders


def keep_of(masks):
    padding = masks.get("src_key_padding_mask")
    return torch.ones(4, 7, dtype=torch.bool) if padding is None else padding == 0


@pytest.fixture
def packings(monkeypatch):
    """The packings that are made while a test runs."""
    made = []
    plain = PaddedPacking.__init__

    def record(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(PaddedPacking, "__init__", record)
    return made


def assert_same(theirs, ours, x, keep, tolerance=SAME_ALGORITHM, **masks):
    results = []
    for encoder in (theirs, ours):
        out = encoder(x, **masks)
        results.append(output_and_gradients(out[keep], list(encoder.parameters())))
    contract.assert_same(results[1], results[0], tolerance)
    return out


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("padding", ["remove", "keep"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_same_as_torch(mask, padding, training, packings):
    theirs, ours = (encoder.train(training) for encoder in pair())
    ours.padding = padding
    masks = MASKS[mask]
    out = assert_same(theirs, ours, torch.randn(4, 7, 32), keep_of(masks), **masks)
    assert out.shape == (4, 7, 32)
    can = "src_key_padding_mask" in masks and mask != "causal, padding before"
    assert len(packings) == (padding == "remove" and can)
    if packings:
        assert (out[~keep_of(masks)] == 0).all(), "padding comes back as 0"
    assert out.isfinite().all()


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_layouts(norm_first, batch_first, norm):
    theirs, ours = pair(norm=norm, norm_first=norm_first, batch_first=batch_first)
    ours.padding = "remove"
    x = torch.randn(4, 7, 32)
    keep = KEEP if batch_first else KEEP.t()
    out = assert_same(theirs, ours, x if batch_first else x.transpose(0, 1), keep, src_key_padding_mask=KPM)
    assert (out[~keep] == 0).all()


def test_float64():
    theirs, ours = pair(dtype=torch.float64)
    ours.padding = "remove"
    x = torch.randn(4, 7, 32, dtype=torch.float64)
    assert_same(theirs, ours, x, KEEP, tolerance=SAME_ALGORITHM_64, src_key_padding_mask=KPM)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4), st.integers(0, 6), st.integers(0, 999), st.sampled_from([None, "causal"]))
def test_packed_and_padded_agree_on_any_padding(batch, length, seed, causal):
    _, ours = pair()
    generator = torch.Generator().manual_seed(seed)
    padded = torch.rand(batch, length, generator=generator) < 0.4
    x = torch.randn(batch, length, 32, generator=generator)
    mask = None if causal is None else torch.ones(length, length, dtype=torch.bool).triu(1)
    results = []
    for padding in ("remove", "keep"):
        ours.padding = padding
        out = ours(x, mask, padded)
        assert out.shape == x.shape and out.isfinite().all()
        results.append(output_and_gradients(out * ~padded[..., None], list(ours.parameters())))
    if (~padded).any():
        contract.assert_same(*results, SAME_ALGORITHM)


def test_same_constructor_seed_weights_and_warnings():
    def build(library, **options):
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer = library.TransformerEncoderLayer(32, 4, **options)
            encoder = library.TransformerEncoder(layer, num_layers=3, norm=nn.LayerNorm(32), mask_check=False)
        return encoder, [(w.category, str(w.message)) for w in caught]

    for options in ({}, {"batch_first": True}, {"norm_first": True}, {"bias": False, "batch_first": True}):
        (theirs, expected), (ours, got) = build(nn, **options), build(fusenc, **options)
        assert got == expected
        assert isinstance(ours, nn.TransformerEncoder) and str(ours) == str(theirs)
        for (name, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
            assert name == other and torch.equal(a, b)
        ours.load_state_dict(theirs.state_dict())
        assert ours.mask_check is False and ours.use_nested_tensor == theirs.use_nested_tensor


def test_unbatched_input():
    theirs, ours = pair()
    x = torch.randn(7, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(theirs, ours, x, KEEP[1], src_key_padding_mask=KPM[1], mask=CAUSAL)


def test_training_and_evaluation_give_the_same_numbers():
    _, ours = pair()
    x = torch.randn(4, 7, 32)
    for padding in ("remove", "keep"):
        ours.padding = padding
        with torch.no_grad():
            outs = [ours.train(training)(x, src_key_padding_mask=KPM) for training in (True, False)]
        assert torch.equal(*outs)


def test_a_sequence_of_nothing_but_padding_is_finite():
    _, ours = pair()
    padded = KPM.clone()
    padded[2] = True
    for padding in ("remove", "keep"):
        ours.padding = padding
        out = ours(torch.randn(4, 7, 32), src_key_padding_mask=padded)
        out.sum().backward()
        assert out.isfinite().all() and all(p.grad.isfinite().all() for p in ours.parameters())
    ours.padding = "remove"
    assert (ours(torch.randn(4, 7, 32), src_key_padding_mask=torch.ones(4, 7, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("shape", [(0, 7, 32), (3, 0, 32)], ids=str)
@pytest.mark.parametrize("padding", ["remove", "keep", "auto"])
def test_empty_input(shape, padding):
    _, ours = pair()
    ours.padding = padding
    assert ours(torch.randn(shape)).shape == shape
    assert ours(torch.randn(shape), src_key_padding_mask=torch.zeros(shape[:2], dtype=torch.bool)).shape == shape


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e(torch.randn(4, 7, 40)),
        lambda e: e(torch.randn(4, 7, 32), mask=torch.zeros(5, 7)),
        lambda e: e(torch.randn(4, 7, 32), mask=torch.zeros(7, 7, dtype=torch.int64)),
        lambda e: e(torch.randn(4, 7, 32), src_key_padding_mask=torch.zeros(4, 7, dtype=torch.int64)),
        lambda e: e(torch.randn(4, 7, 32), src_key_padding_mask=torch.zeros(4, 5, dtype=torch.bool)),
        lambda e: e(torch.randn(4, 7, 32), torch.zeros(3, 3, dtype=torch.bool), KPM),
        lambda e: e(torch.randn(4, 7, 32), is_causal=True),
        lambda e: e(torch.randn(4, 7, 32), src_key_padding_mask=KPM, is_causal=True),
        lambda e: e(torch.randn(4, 7, 32, dtype=torch.float64), src_key_padding_mask=KPM),
        lambda e: e(torch.zeros(4, 7, 32, dtype=torch.int64), src_key_padding_mask=KPM),
    ],
)
def test_bad_input_raises_what_torch_raises(call):
    theirs, ours = pair()
    ours.padding = "remove"
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(type(expected.value)) as got:
        call(ours)
    assert str(got.value) == str(expected.value)


def test_mixed_mask_types_warn_as_in_torch():
    for encoder in pair():
        with pytest.warns(UserWarning, match="Support for mismatched src_key_padding_mask and mask is deprecated"):
            encoder(torch.randn(4, 7, 32), CAUSAL, KPM)


# What packs a padded batch, and what does not.


@pytest.mark.parametrize(
    ("real", "length", "packs"),
    [(100, 100, False), (90, 100, False), (84, 100, True), (20, 100, True), (5, 10, False)],
    ids=["full", "nearly full", "less full", "sparse", "too little to save"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_packs_where_that_pays(real, length, packs, training, packings):
    layer = fusenc.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    encoder = fusenc.TransformerEncoder(layer, 1).train(training)
    padding = (torch.arange(length) >= real).expand(4, -1)
    out = encoder(torch.randn(4, length, 128), src_key_padding_mask=padding)
    assert len(packings) == packs
    assert not packs or (out[padding] == 0).all()


def test_the_rule_can_be_overridden(packings):
    layer = fusenc.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    padding = (torch.arange(100) >= 50).expand(2, -1)

    def packs(encoder):
        packings.clear()
        encoder(torch.randn(2, 100, 128), src_key_padding_mask=padding)
        return bool(packings)

    assert packs(fusenc.TransformerEncoder(layer, 1))
    encoder = fusenc.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    assert not packs(encoder)
    encoder.padding = "remove"
    assert packs(encoder)
    encoder = fusenc.TransformerEncoder(layer, 1)
    encoder.padding = "keep"
    assert not packs(encoder)


def test_a_floating_mask_that_is_more_than_padding_is_added(packings):
    theirs, ours = pair()
    ours.padding = "remove"
    mask = torch.zeros(4, 7).masked_fill(KPM, -2.0)
    assert_same(theirs, ours, torch.randn(4, 7, 32), torch.ones(4, 7, dtype=torch.bool), src_key_padding_mask=mask)
    assert not packings


def test_packs_once_and_runs_every_layer_and_the_norm_on_packed_tokens(packings, monkeypatch):
    _, ours = pair(num_layers=3)
    ours.padding = "remove"
    seen = []
    plain = fusenc.TransformerEncoderLayer._layer

    def record(self, x, *args):
        seen.append(tuple(x.shape))
        return plain(self, x, *args)

    monkeypatch.setattr(fusenc.TransformerEncoderLayer, "_layer", record)
    tokens = int(KEEP.sum())
    monkeypatch.setattr(
        nn.LayerNorm, "forward", lambda self, x: (seen.append(tuple(x.shape)), torch.layer_norm(x, (32,)))[1]
    )
    ours(torch.randn(4, 7, 32), src_key_padding_mask=KPM)
    assert seen == [(tokens, 32)] * 4 and len(packings) == 1


def test_hooks_and_other_norms_find_what_torch_would_show_them(packings):
    _, ours = pair()
    ours.padding = "remove"
    x = torch.randn(4, 7, 32)
    expected = ours(x, src_key_padding_mask=KPM)
    for hooked in (ours.layers[1], ours.layers[0].linear1, ours.norm):
        packings.clear()
        shapes = []
        handle = hooked.register_forward_hook(lambda module, args, out, shapes=shapes: shapes.append(out.shape))
        out = ours(x, src_key_padding_mask=KPM)
        handle.remove()
        assert shapes and shapes[0][:2] == (4, 7) and not packings
        torch.testing.assert_close(out[KEEP], expected[KEEP], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    ours.norm = nn.LayerNorm((7, 32))
    packings.clear()
    assert ours(x, src_key_padding_mask=KPM).shape == x.shape and not packings


def test_a_traced_or_mapped_call_is_not_packed(packings):
    _, ours = pair()
    ours.padding = "remove"
    x = torch.randn(2, 4, 7, 32)
    with torch.no_grad():
        out = torch.func.vmap(lambda x: ours(x, src_key_padding_mask=KPM))(x)
        assert not packings
        torch.testing.assert_close(
            out[1][KEEP], ours(x[1], src_key_padding_mask=KPM)[KEEP], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM
        )


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_compiles_whole(training, packings):
    torch._dynamo.reset()
    _, ours = pair()
    ours.train(training)
    ours.padding = "remove"
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(4, 7, 32)
    with torch.set_grad_enabled(training):
        got = compiled(x, src_key_padding_mask=KPM)
        assert not packings
        expected = ours(x, src_key_padding_mask=KPM)
    torch.testing.assert_close(got[KEEP], expected[KEEP], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_packed_batches_compile_whole_and_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounter()
    _, ours = pair(num_layers=1)
    compiled = torch.compile(ours.eval(), fullgraph=True, backend=counter)
    with torch.no_grad():
        for lengths in ([7, 3], [9, 4, 2], [5, 6, 6, 2], [11, 2], [3, 3, 13, 2, 1]):
            packed = PackedTokens.from_sequences([torch.randn(n, 32) for n in lengths])
            torch.testing.assert_close(
                compiled(packed).data, ours(packed).data, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM
            )
    assert counter.frame_count == 2, "once for the first sizes, once for all"


# Packed and nested batches.


def ragged(kind, x=None):
    """The four sequences of KEEP, as one of the kinds that the modules take."""
    x = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(2)) if x is None else x
    packed = pack(x, KPM)
    return packed if kind == "packed" else packed.to_nested({"jagged": torch.jagged, "strided": torch.strided}[kind])


def tokens_of(out, kind):
    if kind == "packed":
        assert type(out) is PackedTokens
        return out.data
    assert out.is_nested and out.layout == {"jagged": torch.jagged, "strided": torch.strided}[kind]
    return torch.cat(out.unbind())


KINDS = pytest.mark.parametrize("kind", ["packed", "jagged", "strided"])


@nested_warnings
@KINDS
@pytest.mark.parametrize("of", ["encoder", "layer"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_ragged_in_ragged_out(kind, of, batch_first, training):
    _, ours = pair(batch_first=batch_first)
    module = (ours if of == "encoder" else ours.layers[0]).train(training)
    x = torch.randn(4, 7, 32)
    leaf = x.clone().requires_grad_()
    got = tokens_of(module(ragged(kind, leaf)), kind)
    padded = module(x if batch_first else x.transpose(0, 1), src_key_padding_mask=KPM)
    expected = (padded if batch_first else padded.transpose(0, 1))[KEEP]
    parameters = list(module.parameters())
    contract.assert_same(
        output_and_gradients(got, parameters), output_and_gradients(expected, parameters), SAME_ALGORITHM
    )
    tokens_of(module(ragged(kind, leaf)), kind).pow(2).sum().backward()
    assert leaf.grad[KEEP].abs().min() > 0 and (leaf.grad[KPM] == 0).all()


def test_a_jagged_result_has_the_shape_of_its_input():
    _, ours = pair()
    nested = ragged("jagged")
    assert torch.equal((ours(nested) + nested).values(), ours(nested).values() + nested.values())


@nested_warnings
@KINDS
@pytest.mark.parametrize("mask", ["causal", "bool causal", "hint alone", "per head"])
def test_masks_speak_of_positions_inside_each_sequence(kind, mask):
    _, ours = pair()
    masks = {
        "causal": {"mask": CAUSAL}, "bool causal": {"mask": CAUSAL < 0, "is_causal": False},
        "hint alone": {"is_causal": True}, "per head": {"mask": PER_HEAD},
    }[mask]  # fmt: skip
    x = torch.randn(4, 7, 32)
    got = tokens_of(ours(ragged(kind, x), **masks), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ours(x, **(masks if "mask" in masks else {"mask": CAUSAL}), src_key_padding_mask=KPM)[KEEP]
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@nested_warnings
@KINDS
@pytest.mark.parametrize("mask", [None, CAUSAL, CAUSAL < 0, PER_HEAD], ids=["none", "float", "bool", "per head"])
@pytest.mark.parametrize("reason", ["hooked part", "another part", "torch's layers", "another layer"])
def test_ragged_batches_go_through_unfused_layers_too(kind, mask, reason):
    _, ours = pair()
    expected = tokens_of(ours(ragged(kind), mask=mask), kind)
    if reason == "hooked part":
        ours.layers[0].linear1.register_forward_hook(lambda *args: None)
    elif reason == "another part":
        ours.layers[1].dropout1 = nn.Identity()
    elif reason == "torch's layers":
        for layer in ours.layers:
            layer.__class__ = nn.TransformerEncoderLayer
    else:

        class Another(fusenc.TransformerEncoderLayer):
            def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
                return nn.TransformerEncoderLayer.forward(self, src, src_mask, src_key_padding_mask, is_causal)

        ours.layers[0].__class__ = Another
    got = tokens_of(ours(ragged(kind), mask=mask), kind)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    causal = tokens_of(ours(ragged(kind), is_causal=True), kind)
    torch.testing.assert_close(
        causal, tokens_of(ours(ragged(kind), mask=CAUSAL < 0), kind), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM
    )


def test_an_empty_sequence_through_an_unfused_layer_is_finite():
    """Also through one that forms attention weights, of which torch makes NaN where every key is masked."""
    _, ours = pair()

    def attend(x, attn_mask, key_padding_mask, is_causal=False):
        return ours.layers[0].self_attn(x, x, x, key_padding_mask=key_padding_mask)[0]

    ours.layers[0]._sa_block = attend
    assert "_sa_block" in ours.why_not_fused()
    out = ours(PackedTokens(torch.randn(5, 32), torch.tensor([0, 2, 2, 5])))
    out.data.sum().backward()
    assert out.data.isfinite().all() and all(p.grad.isfinite().all() for p in ours.parameters())


@nested_warnings
@KINDS
def test_hooks_on_layers_find_the_kind_that_was_given(kind):
    _, ours = pair()
    x = ragged(kind)
    seen = []
    ours.layers[1].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    out = ours(x)
    assert type(out) is type(x) and all(type(t) is type(x) for t in seen[0])


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda m, x: m(x, src_key_padding_mask=KPM), ValueError, "src_key_padding_mask"),
        (lambda m, x: m(x, torch.zeros(5, 5)), ValueError, "src_mask"),
        (lambda m, x: m(x, torch.zeros(3, 7, 7)), ValueError, "src_mask"),
        (lambda m, x: m(x, torch.zeros(7, 7, dtype=torch.int64), is_causal=False), TypeError, "src_mask"),
    ],
)
def test_bad_masks_of_ragged_batches(call, error, names):
    _, ours = pair()
    for module in (ours, ours.layers[0]):
        with pytest.raises(error, match=f"^{names}: expected"):
            call(module, ragged("packed"))


def test_bad_packed_tokens_raise_what_torch_raises():
    _, ours = pair()
    for data in (torch.randn(6, 40), torch.randn(6, 32, dtype=torch.float64)):
        with pytest.raises((AssertionError, RuntimeError)):
            ours(PackedTokens(data, torch.tensor([0, 6])))


def test_nothing_but_empty_sequences():
    _, ours = pair()
    for module in (ours, ours.layers[0]):
        out = module(PackedTokens(torch.randn(0, 32), torch.tensor([0, 0, 0])))
        assert out.data.shape == (0, 32) and len(out) == 2


def test_dropout_of_packed_batches_is_drawn_from_the_generator():
    layer = fusenc.TransformerEncoderLayer(32, 4, 60, dropout=0.5, batch_first=True)
    encoder = fusenc.TransformerEncoder(layer, 2)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(encoder(ragged("packed")).data)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_autocast():
    _, ours = pair()
    x = torch.randn(4, 7, 32)
    for padding in ("remove", "keep"):
        ours.padding = padding
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ours(x, src_key_padding_mask=KPM)
        limit = 16 * HALF_PRECISION  # bfloat16 has eight times float16's eps, and there are two layers
        torch.testing.assert_close(out[KEEP].float(), ours(x, src_key_padding_mask=KPM)[KEEP], rtol=limit, atol=limit)


# The module as an object.


def test_pickle_deepcopy_and_old_states():
    _, ours = pair()
    ours.padding = "remove"
    x = torch.randn(4, 7, 32)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fusenc.TransformerEncoder and other.padding == "remove"
        assert torch.equal(other(x, src_key_padding_mask=KPM), ours(x, src_key_padding_mask=KPM))
    old = copy.deepcopy(ours)
    for name in ("enable_nested_tensor", "use_nested_tensor", "mask_check", "padding"):
        del old.__dict__[name]
    assert torch.equal(old(x), ours(x)) and old(x, src_key_padding_mask=KPM).shape == x.shape
    layer = fusenc.TransformerEncoderLayer(32, 4)
    state = layer.__getstate__() if hasattr(layer, "__getstate__") else layer.__dict__
    state = {name: value for name, value in dict(state).items() if name != "activation"}
    layer.__setstate__(state)
    assert layer.activation is torch.nn.functional.relu


def test_fuse_and_unfuse(packings):
    theirs, _ = pair()
    x = torch.randn(4, 7, 32)
    expected = theirs(x, src_key_padding_mask=KPM)
    bits = {name: t.clone() for name, t in theirs.state_dict().items()}
    model = nn.ModuleDict({"encoder": theirs})
    report = fusenc.fuse(model)
    assert report.fused["encoder"] == "TransformerEncoder" and not report.left
    assert type(theirs) is fusenc.TransformerEncoder
    theirs.padding = "remove"
    out = theirs(x, src_key_padding_mask=KPM)
    assert len(packings) == 1
    torch.testing.assert_close(out[KEEP], expected[KEEP], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    assert fusenc.fuse(model).fused == report.fused, "a second time"
    fusenc.unfuse(model)
    assert type(theirs) is nn.TransformerEncoder and type(theirs.layers[0]) is nn.TransformerEncoderLayer
    assert torch.equal(theirs(x, src_key_padding_mask=KPM), expected)
    assert all(torch.equal(t, bits[name]) for name, t in theirs.state_dict().items())


def test_fuse_says_why_an_encoder_stays():
    theirs, _ = pair()
    theirs.layers[1].linear1 = nn.Identity()
    report = fusenc.fuse(nn.Sequential(theirs))
    assert "layers.1: linear1 is a Identity" in report.left["0"] and "0" not in report.fused
    assert report.fused == {"0.layers.0": "TransformerEncoderLayer"}
    layer = nn.Linear(3, 3)
    layer.self_attn = nn.MultiheadAttention(32, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "is a torch.nn.modules.linear.Linear" in fusenc.fuse(nn.TransformerEncoder(layer, 1)).left[""]


def test_torchs_own_layers_run_as_in_torch():
    theirs, _ = pair()
    ours = fusenc.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 60, 0.0, "gelu", batch_first=True), 2, nn.LayerNorm(32)
    )
    ours.load_state_dict(theirs.state_dict())
    assert "layers.0 is a torch.nn.modules.transformer.TransformerEncoderLayer" in ours.why_not_fused()
    for training in (True, False):
        theirs.train(training), ours.train(training)
        x = torch.randn(4, 7, 32)
        assert torch.equal(ours(x, src_key_padding_mask=KPM), theirs(x, src_key_padding_mask=KPM))


@pytest.mark.kernel
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_packed_on_the_gpu_path(device, backend, norm_first):
    theirs, ours = pair(num_layers=1, norm_first=norm_first)
    theirs.to(device), ours.to(device)
    ours.padding = "remove"
    x = torch.randn(4, 7, 32, device=device)
    out = assert_same(theirs, ours, x, KEEP.to(device), src_key_padding_mask=KPM.to(device))
    assert fusenc.kernels.last_backend() == backend
    assert (out[KPM.to(device)] == 0).all()
    torch.testing.assert_close(unpack(ours(pack(x, KPM.to(device)))), out, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
