"""fuse on Hugging Face's families: each against itself unfused, with random weights and its configuration's quirks."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import fusenc
import pytest
import torch
from contract import assert_same, output_and_gradients
from tolerances import LOSS_CURVE, SAME_ALGORITHM
from torch import Tensor, nn

TEXT = {"vocab_size": 100, "pad_token_id": 1}
BERT = {
    **TEXT, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


class Family(NamedTuple):
    """One entry of the table."""

    model_type: str
    """As `AutoConfig.for_model` knows it."""
    model: str
    """The model's class in transformers."""
    options: dict[str, Any]
    """Of the configuration, without dropout."""
    fused: int
    """How many modules `fuse` changes."""
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    """The configuration's names of its dropout rates; the tests set them."""
    left: frozenset[str] = frozenset()
    """Reasons that the report may give for what stays as it is."""
    by_distance: bool = False
    """Attention goes by the distance of two tokens, so padding between real tokens stays in."""
    implementations: tuple[str, ...] = ("sdpa", "eager")
    """Of attention."""
    variant: bool = False
    """Another configuration of a family that is in the table: not run on the GPU path, where launches are slow."""


DISTILBERT = {**TEXT, "dim": 48, "n_heads": 4, "hidden_dim": 64, "n_layers": 2, "max_position_embeddings": 64}
ALBERT = {**BERT, "embedding_size": 24, "num_hidden_layers": 4}

FAMILIES = {
    "bert": Family("bert", "BertModel", BERT, 4),
    "bert tanh gelu": Family(
        "bert", "BertModel", {**BERT, "hidden_act": "gelu_new", "layer_norm_eps": 1e-6}, 4, variant=True
    ),
    "bert relu": Family("bert", "BertModel", {**BERT, "hidden_act": "relu", "type_vocab_size": 1}, 4, variant=True),
    "roberta": Family("roberta", "RobertaModel", BERT, 3),
    "xlm-roberta": Family("xlm-roberta", "XLMRobertaModel", BERT, 3),
    "camembert": Family("camembert", "CamembertModel", BERT, 3),
    "electra": Family("electra", "ElectraModel", {**BERT, "embedding_size": 48}, 4),
    "electra narrow embeddings": Family("electra", "ElectraModel", {**BERT, "embedding_size": 24}, 4, variant=True),
    "distilbert": Family("distilbert", "DistilBertModel", DISTILBERT, 4, ("dropout", "attention_dropout")),
    "distilbert sinusoidal": Family(
        "distilbert", "DistilBertModel", {**DISTILBERT, "sinusoidal_pos_embds": True, "activation": "relu"}, 4,
        ("dropout", "attention_dropout"), variant=True,
    ),
    "albert": Family("albert", "AlbertModel", {**ALBERT, "hidden_act": "gelu_new"}, 3),
    "albert groups": Family(
        "albert", "AlbertModel", {**ALBERT, "num_hidden_groups": 2, "inner_group_num": 2}, 6, variant=True
    ),
    "mpnet": Family("mpnet", "MPNetModel", BERT, 3, by_distance=True, implementations=("eager",)),
}  # fmt: skip

KINDS = ["dense", "padded", "gaps"]


def small_model(name: str, *, implementation: str | None = None, dropout: float = 0.0, **options: Any) -> nn.Module:
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    rates = dict.fromkeys(family.dropout, dropout)
    config = transformers.AutoConfig.for_model(family.model_type, **{**family.options, **rates, **options})
    if implementation is not None:
        config._attn_implementation = implementation
    model = getattr(transformers, family.model)(config)
    with (
        torch.no_grad()
    ):  # initial weights are so small that attention would hardly matter, biases and norms not at all
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in path:
                parameter.mul_(0.2 / parameter.std())
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(kind: str = "padded", length: int = 9) -> dict[str, Tensor]:
    mask = torch.ones(4, length, dtype=torch.long)
    if kind != "dense":
        mask[1, 5:] = 0
        mask[2, :3] = 0  # padding on the left
    if kind == "gaps":
        mask[3, 1::2] = 0  # and in between
    ids = torch.randint(2, 100, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that the last hidden state depends on."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name}


def outcome(model: nn.Module, kind: str = "padded", **options: Any) -> list[Tensor]:
    """The last hidden state of the real tokens and all gradients."""
    inputs = batch(kind)
    hidden = model(**inputs, **options).last_hidden_state
    return output_and_gradients(hidden[inputs["attention_mask"].bool()], list(parameters(model).values()))


def fuse(name: str, model: nn.Module) -> fusenc.FuseReport:
    report = fusenc.fuse(model)
    assert len(report.fused) == FAMILIES[name].fused and set(report.left.values()) <= FAMILIES[name].left, report
    return report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "implementation"), [(n, i) for n, f in FAMILIES.items() for i in f.implementations])
def test_fused_is_unfused(name, implementation, kind):
    model = small_model(name, implementation=implementation)
    keys = list(model.state_dict())
    expected = outcome(model, kind)
    fuse(name, model)
    assert list(model.state_dict()) == keys
    assert_same(outcome(model, kind), expected, SAME_ALGORITHM)
    real = batch(kind)["attention_mask"].bool()
    with torch.no_grad():
        hidden = model.eval()(**batch(kind)).last_hidden_state[real]
    limit = SAME_ALGORITHM * expected[0].abs().max().item()
    torch.testing.assert_close(hidden, expected[0], rtol=0, atol=limit)
    fusenc.unfuse(model.train())
    assert not any(type(module).__module__.startswith("fusenc") for module in model.modules())
    for got, want in zip(outcome(model, kind), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["padded", "gaps"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_left_out(name, kind):
    """Each layer works on the real tokens alone, and the hidden states of the others come back as 0."""
    model = small_model(name).eval()
    fuse(name, model)
    rows = []
    inputs = batch(kind)
    real = inputs["attention_mask"].bool()
    with pytest.MonkeyPatch.context() as patch:
        ffn = fusenc.kernels.ffn
        patch.setattr(fusenc.kernels, "ffn", lambda x, *a, **k: rows.append(x.shape[:-1].numel()) or ffn(x, *a, **k))
        hidden = model(**inputs).last_hidden_state
    assert hidden.shape[:2] == real.shape and hidden.isfinite().all()
    if kind == "gaps" and FAMILIES[name].by_distance:
        assert rows == [real.numel()] * len(rows)
    else:
        assert rows == [int(real.sum())] * len(rows) and (hidden[~real] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_dropout_is_applied(name):
    """A dropout that drops everything gives what it gives unfused, one at a time; with a rate the results vary."""
    model = small_model(name)
    fused = copy.deepcopy(model)
    fuse(name, fused)
    sites = [path for path, module in model.named_modules() if isinstance(module, nn.Dropout)]
    first_layer = [path for path in sites if not any(f".{number}." in path for number in range(1, 9))]
    for path in first_layer:
        for side in (model, fused):
            side.get_submodule(path).p = 1.0
        assert_same(outcome(fused), outcome(model), SAME_ALGORITHM)
        for side in (model, fused):
            side.get_submodule(path).p = 0.0
    assert first_layer or name not in FAMILIES
    model = small_model(name, dropout=0.3)
    fuse(name, model)
    torch.manual_seed(0)
    first, second = outcome(model), outcome(model)
    torch.manual_seed(0)
    again = outcome(model)
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_steps_give_the_same_losses(name):
    curves = []
    for fused in (False, True):
        model = small_model(name).train()
        if fused:
            fuse(name, model)
        torch.manual_seed(1)
        head = nn.Linear(48, 2)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
        losses = []
        for _ in range(10):
            hidden = model(**batch()).last_hidden_state[:, 4]
            loss = nn.functional.cross_entropy(head(hidden), torch.tensor([0, 1, 0, 1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=LOSS_CURVE, atol=1e-6)


@pytest.mark.kernel
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.variant])
def test_on_the_gpu_path(name, device, backend):
    """From the model to the launches and back, two short sequences."""
    family = FAMILIES[name]
    layers = next(key for key in ("num_hidden_layers", "n_layers", "num_layers") if key in family.options)
    model = small_model(name, **{layers: 1}).to(device)
    inputs = {key: value[1:3, 2:8].to(device) for key, value in batch().items()}
    real = inputs["attention_mask"].bool()
    results = []
    for fused in (False, True):
        if fused:
            assert fusenc.fuse(model).fused
        hidden = model(**inputs).last_hidden_state[real]
        results.append(output_and_gradients(hidden, list(parameters(model).values())))
    assert fusenc.kernels.last_backend() == backend
    assert_same(results[1], results[0], SAME_ALGORITHM)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pickle_and_deepcopy(name, tmp_path):
    model = small_model(name).eval()
    fuse(name, model)
    expected = model(**batch()).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == [FAMILIES[name].model]
    assert not any(type(module).__module__.startswith("fusenc") for module in loaded.modules())
    fuse(name, loaded)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch()).last_hidden_state, expected)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_attentions(name):
    """As without fuse; the next call leaves padding out again."""
    model = small_model(name, implementation="eager").eval()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, output_hidden_states=True, output_attentions=True)
    fuse(name, model)
    for options in ({"output_hidden_states": True, "output_attentions": True}, {"output_hidden_states": True}):
        got = model(**inputs, **options)
        assert len(got.hidden_states) == len(expected.hidden_states) >= 3
        for g, e in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(g[real], e[real], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM * 10)
        if "output_attentions" in options:
            assert len(got.attentions) == len(expected.attentions) >= 2
            for g, e in zip(got.attentions, expected.attentions, strict=True):
                torch.testing.assert_close(g, e, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    assert (model(**inputs).last_hidden_state[~real] == 0).all()
