"""The rule by which encoders leave padding out: settings, devices, waits, and the heads that forbid it."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import fusenc
import pytest
import torch
from contract import assert_same
from families import FAMILIES, batch, older_than, small_model
from fusenc import padding
from fusenc.kernels.common import device as chip
from fusenc.packing import PaddedPacking
from fusenc.padding import RealTokens, may_remove, real_tokens
from tolerances import SAME_ALGORITHM
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

PADDED = [name for name, family in FAMILIES.items() if not family.variant and family.encoder]
"""Families whose inputs have padding."""


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[PaddedPacking]:
    """The packings that are made while a test runs."""
    made: list[PaddedPacking] = []
    plain = PaddedPacking.__init__

    def record(self: PaddedPacking, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(PaddedPacking, "__init__", record)
    return made


@pytest.fixture
def eager_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any padding is worth removing."""
    monkeypatch.setattr(padding, "FULLEST", 1.0)
    monkeypatch.setattr(padding, "LEAST_WORK", 0)
    monkeypatch.setattr(padding, "WAIT_ON_GPU", 1)


def torchs(width: int = 32, layers: int = 2, **options: Any) -> fusenc.TransformerEncoder:
    torch.manual_seed(0)
    layer = fusenc.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    return fusenc.TransformerEncoder(layer, layers, **options)


def berts(width: int = 32, layers: int = 2) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width, vocab_size=50
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    fusenc.fuse(model)
    return model


def call(model: nn.Module, keep: Tensor, **options: Any) -> Tensor:
    """Hidden states of a padded batch."""
    if isinstance(model, nn.TransformerEncoder):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(*keep.shape, model.layers[0].linear1.in_features, generator=generator)
        return model(x.to(keep.device), src_key_padding_mask=~keep)
    ids = torch.arange(keep.numel()).view(keep.shape) % 50
    return model(input_ids=ids.to(keep.device), attention_mask=keep.long(), **options).last_hidden_state


def rows_of(lengths: list[int], length: int, device: str = "cpu") -> Tensor:
    return (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).to(device)


class Waits(TorchFunctionMode):
    """Counts the operations for which the host would wait for a GPU."""

    METHODS = frozenset({"tolist", "cpu", "numpy", "tensor"})  # torch.tensor copies from memory that is not pinned
    OPERATORS = frozenset({"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.METHODS and not by_ttsem():
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Waits:
        waits = self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func.overloadpacket.__name__
                by_mask = name in ("index", "index_put", "index_put_") and any(
                    i is not None and i.dtype == torch.bool for i in args[1]
                )
                by_count = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
                if (name in waits.OPERATORS or by_mask or by_count) and not by_ttsem():
                    waits.found.append(name)
                return func(*args, **(kwargs or {}))

        self._operators = Operators()
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._operators.__exit__(*error)


def by_ttsem() -> bool:
    """True inside a launch that ttsem executes, which reads its tensors on the host."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("ttsem") and frame.f_code.co_name != "__torch_function__":  # which sees every operation
            return True
        frame = frame.f_back
    return False


def waits_of(model: nn.Module, **inputs: Tensor) -> list[str]:
    with torch.no_grad(), Waits() as waits:
        model(**inputs)
    return waits.found


# The rule.


def test_the_rule_is_the_documented_one():
    assert (padding.FULLEST, padding.LEAST_WORK, padding.WAIT_ON_GPU) == (0.85, 3_000_000, 3_000_000_000)


@pytest.mark.parametrize(
    ("width", "real", "length", "removes"),
    [
        (128, 100, 100, False), (128, 90, 100, False), (128, 84, 100, True), (128, 20, 100, True),
        (128, 5, 10, False), (64, 8, 32, False), (256, 28, 32, False), (256, 27, 32, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", [torchs, berts])
def test_one_rule_for_all_encoders_on_a_cpu(model, width, real, length, removes, packings):
    encoder = model(width, layers=1)
    keep = rows_of([length] + [real] * 31, length) if real < length else rows_of([length] * 4, length)
    out = call(encoder, keep)
    assert len(packings) == removes
    assert not removes or (out[~keep] == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("layers", "saved", "dtype", "removes"),
    [(12, 300, torch.float32, True), (12, 200, torch.float32, False), (6, 300, torch.float32, False),
     (6, 600, torch.float16, True), (12, 300, torch.float64, False)],
)  # fmt: skip
def test_the_rule_on_a_gpu_is_what_the_wait_costs(device, backend, layers, saved, dtype, removes):
    if backend != "triton":
        pytest.skip("a rule of GPUs")
    keep = rows_of([512, 512 - saved // 2, 512 - saved // 2], 512, device)
    found = real_tokens("auto", keep, torch.empty(1, dtype=dtype, device=device), products=10**6, num_layers=layers)
    assert (found is not None) == removes
    assert real_tokens("remove", keep, keep, products=1, num_layers=1) is not None


@pytest.mark.kernel
def test_a_small_batch_is_not_counted_on_a_gpu(device, backend):
    """Where not even removing everything would pay, nothing is waited for."""
    if backend != "triton":
        pytest.skip("a rule of GPUs")
    keep = rows_of([9, 2], 9, device)
    with Waits() as waits:
        assert real_tokens("auto", keep, keep.float(), products=100, num_layers=2) is None
    assert waits.found == []


# The settings, on each device.


@pytest.mark.kernel
@pytest.mark.parametrize("setting", padding.SETTINGS)
@pytest.mark.parametrize("model", [torchs, berts])
def test_settings(model, setting, device, backend, packings, eager_rule):
    encoder = model(32, layers=1).to(device)
    keep = rows_of([7, 3, 5, 0], 7, device)
    with torch.no_grad():
        for module in encoder.modules():
            if hasattr(module, "padding"):
                module.padding = "keep"
        expected = call(encoder, keep)
        assert not packings
        fusenc.fuse(encoder, padding=setting)
        out = call(encoder, keep)
        assert len(packings) == (setting != "keep")
        assert fusenc.kernels.last_backend() == backend
        torch.testing.assert_close(out[keep], expected[keep], rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
        if setting != "keep":
            assert (out[~keep] == 0).all()
            assert int(packings[0].indices.shape[0]) == 15 and packings[0].max_length == 7
            packings.clear()
            call(encoder, torch.ones_like(keep))
            assert not packings, "nothing to remove"


@pytest.mark.kernel
@pytest.mark.parametrize("name", [name for name in PADDED if FAMILIES[name].by_distance])
def test_families_by_distance_on_the_gpu_path(name, device, backend, packings):
    """Sequences longer than a window, packed with the bias or the window by distance."""
    family = FAMILIES[name]
    layers = {key: family.least_layers for key in ("num_hidden_layers", "num_layers") if key in family.options}
    model = small_model(name, **layers).to(device).eval()
    generator = torch.Generator().manual_seed(3)
    mask = rows_of([20, 11, 3], 20, device).long()
    inputs = {"input_ids": torch.randint(2, 100, (3, 20), generator=generator).to(device), "attention_mask": mask}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[mask.bool()]
        fusenc.fuse(model, padding="remove")
        rows = []
        plain = fusenc.kernels.encoder_layer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                fusenc.kernels,
                "encoder_layer",
                lambda x, *a, **k: (rows.append((len(x), k.get("attn_mask"))), plain(x, *a, **k))[1],
            )
            got = model(**inputs).last_hidden_state[mask.bool()]
    assert packings and {row[0] for row in rows} == {34}
    assert fusenc.kernels.last_backend() == backend
    if backend == "triton":
        assert all(attn_mask is None for _, attn_mask in rows), "no tensor of all pairs of positions"
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * float(expected.abs().max()))


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["torch", "bert", "clip text", "modernbert", "t5", "bart", "gpt2"])
def test_a_gpu_is_waited_for_once_a_call(name, device, backend):
    """With a padding mask, at most once beside what the model's own code waits for without one; BART's decoder, which
    makes a mask of its own of it, once too. Without a mask never."""
    if backend != "triton":
        pytest.skip("a CPU waits for nothing")
    if name == "torch":
        model, inputs = torchs(32, layers=1).to(device).eval(), {"src": torch.randn(3, 7, 32, device=device)}
        mask = {"src_key_padding_mask": ~rows_of([7, 2, 4], 7, device)}
        without_mask = []
    else:
        model = small_model(name).to(device).eval()
        inputs = {key: value[1:3, 2:8].to(device) for key, value in batch(model=model).items()}
        mask = {"attention_mask": inputs.pop("attention_mask")}
        inputs.pop("decoder_attention_mask", None)
        without_mask = waits_of(model, **inputs)
    full = {key: torch.ones_like(value) if name != "torch" else value & False for key, value in mask.items()}
    for setting in ("remove", "keep", "auto"):
        kept = fusenc.fuse(model, padding=setting).padding or setting == "keep" or (setting, name) == ("auto", "torch")
        model(**inputs, **mask)  # from the first call on transformers' masks are counted
        for given in (mask, full):
            found = waits_of(model, **inputs, **given)
            once = (name != "torch" or not kept) + (name == "bart")
            assert len(found) <= len(without_mask) + once, (setting, found)
        assert len(waits_of(model, **inputs)) <= len(without_mask)


@pytest.mark.kernel
def test_a_mask_that_was_counted_and_is_another_now(device):
    """A causal one, and one that was changed after it was made."""
    model = small_model("bert", implementation="sdpa").to(device).eval()
    stock = copy.deepcopy(model)
    fusenc.fuse(model)
    ids, keep = torch.randint(2, 100, (2, 6), device=device), rows_of([6, 4], 6, device)
    model(input_ids=ids, attention_mask=keep)
    for make in (create_causal_mask, create_bidirectional_mask):
        with torch.inference_mode():
            x = stock.embeddings(ids)
            offered = {"past_key_values": None, "cache": None, "cache_position": torch.arange(6, device=device)}
            more = {name: offered[name] for name in offered if name in inspect.signature(make).parameters}  # by version
            mask = make(config=model.config, inputs_embeds=x, attention_mask=keep, **more)
            if make is create_bidirectional_mask:
                mask[..., 2] = False
            got, expected = (of.encoder(x, attention_mask=mask).last_hidden_state[keep] for of in (model, stock))
        read = (torch.arange(6, device=device) != 2).expand(2, 6)[keep]  # the others may be padding
        torch.testing.assert_close(got[read], expected[read], rtol=0, atol=SAME_ALGORITHM)


@pytest.mark.kernel
def test_making_a_packing_waits_once(device):
    keep = rows_of([7, 0, 4], 7, device)
    with Waits() as waits:
        PaddedPacking(keep)
    assert waits.found == ["tolist"]
    with Waits() as waits:
        tokens = RealTokens.read(keep, [keep.any(), keep[0].all()])
        PaddedPacking(tokens)
    assert waits.found == ["tolist"] and tokens.counts == [7, 0, 4]
    assert RealTokens.read(keep, [keep.any(), keep.all()]) is None


# Where values cannot be read.


def test_may_remove():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert may_remove("auto", x, mask) and may_remove("remove", nn.Parameter(x), mask)
    assert not may_remove("keep", x, mask)
    assert not may_remove("remove", x.to("meta"), mask.to("meta")) and not may_remove("remove", x, mask.to("meta"))
    assert not may_remove("remove", x.as_subclass(type("Other", (Tensor,), {})), mask)
    seen = []
    torch.vmap(lambda row: (seen.append(may_remove("remove", x, mask)), row)[1])(x)
    with torch._subclasses.FakeTensorMode():
        seen.append(may_remove("remove", x, mask))
    torch.fx.experimental.proxy_tensor.make_fx(lambda t: (seen.append(may_remove("remove", x, mask)), t + 1)[1])(x)
    torch.jit.trace(lambda t: (seen.append(may_remove("remove", x, mask)), t + 1)[1], x, check_trace=False)
    assert len(seen) >= 4 and not any(seen)


@pytest.mark.parametrize("how", ["vmap", "fake", "trace", "compile"])
@pytest.mark.parametrize("model", [torchs, berts])
def test_calls_whose_values_cannot_be_read_keep_padding(model, how, packings):
    if model is berts and how == "trace" and older_than("5.9"):
        pytest.skip("transformers cannot trace its masks")
    encoder = model(32).eval().requires_grad_(False)
    fusenc.fuse(encoder, padding="remove")
    keep = rows_of([7, 3], 7)
    if model is torchs:
        x = torch.randn(2, 7, 32)
        run = lambda x, mask: encoder(x, src_key_padding_mask=mask)  # noqa: E731
        arguments = (x, ~keep)
    else:
        run = lambda ids, mask: encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # noqa: E731
        arguments = (torch.arange(14).view(2, 7), keep.long())
        if how == "vmap":
            arguments = (arguments[0], None)
    with torch.no_grad():
        if how == "vmap":
            if model is berts:
                pytest.skip("transformers maps its masks itself")
            torch.vmap(run, (0, None))(torch.stack([arguments[0]] * 2), arguments[1])
        elif how == "fake":
            mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                try:
                    run(*map(mode.from_tensor, arguments))
                except torch._subclasses.fake_tensor.DataDependentOutputException:
                    assert model is berts, "transformers looks at the mask itself"
        elif how == "trace":
            torch.jit.trace(run, arguments, check_trace=False)
        else:
            torch._dynamo.reset()
            torch.compile(run, backend="eager")(*arguments)
    assert not packings
    run(*arguments)
    assert packings


@pytest.mark.kernel
def test_a_captured_graph_keeps_padding(device, backend, packings, monkeypatch):
    encoder = torchs(32, layers=1).to(device).eval()
    encoder.padding = "remove"
    keep = rows_of([7, 3], 7, device)
    assert not chip.is_capturing()
    monkeypatch.setattr(chip, "is_capturing", lambda: True)
    with torch.no_grad(), Waits() as waits:
        call(encoder, keep)
    assert bool(packings) == (backend != "triton")
    assert backend != "triton" or waits.found == []


# The setting as an attribute.


def test_other_settings_raise():
    for wrong in ("always", None, True):
        with pytest.raises(ValueError, match=r"^padding: expected one of 'auto', 'remove', 'keep', got"):
            fusenc.fuse(nn.Linear(2, 2), padding=wrong)
        for encoder in (torchs(), berts()):
            inner = getattr(encoder, "encoder", encoder)
            inner.padding = wrong
            for lengths in ([7, 3], [7, 7]):
                with pytest.raises(ValueError, match=r"^padding: expected one of"):
                    call(encoder, rows_of(lengths, 7))


def test_fuse_sets_the_attribute_and_unfuse_removes_it():
    bert = small_model("bert")
    model = nn.ModuleDict({"bert": bert, "torch": nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4), 2)})
    encoders = (model["bert"].encoder, model["torch"])
    for setting in ("remove", "keep", "auto"):
        assert not fusenc.fuse(model, padding=setting).padding
        assert [encoder.padding for encoder in encoders] == [setting] * 2
        assert not any("padding" in vars(m) for m in model.modules() if m not in encoders)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other["bert"].encoder.padding == other["torch"].padding == setting
    fusenc.unfuse(model)
    assert not any(hasattr(encoder, "padding") for encoder in encoders)
    embedding = nn.Conv1d(2, 2, 3, padding=1)
    fusenc.fuse(nn.Sequential(embedding))
    fusenc.unfuse(nn.Sequential(embedding))
    assert embedding.padding == (1,)


# Heads.


ENDINGS = (
    "LMHeadModel", "ForMaskedLM", "ForTokenClassification", "ForPreTraining", "ForNextSentencePrediction",
    "ForSequenceClassification", "ForMultipleChoice", "ForConditionalGeneration", "MTModel", "ForQuestionAnswering",
)  # fmt: skip
"""Of the names of classes for a task in which the encoder is not a decoder."""


def classes_of(name: str) -> list[str]:
    """The models that transformers has for a family, read without importing it."""
    module = name.split()[0] if "lip " in name else FAMILIES[name].model_type.replace("-", "_")
    folder = Path(importlib.util.find_spec("transformers").origin).parent / "models" / module
    source = folder / f"modeling_{module}.py"
    if not source.exists():  # an older transformers
        return []
    found = re.findall(r"^class (\w+)\(.*PreTrainedModel\b.*\)", source.read_text(), re.M)
    return [kind for kind in found if not kind.lower().endswith("pretrainedmodel")]


TASKS = [(name, ending) for name in PADDED for kind in classes_of(name) for ending in ENDINGS if kind.endswith(ending)]


def test_every_model_of_every_family_is_known():
    from fusenc.huggingface import heads

    found = {kind for name in PADDED for kind in classes_of(name)}
    assert len(found) > 90 and len(TASKS) > 60
    unknown = found - heads._INDEPENDENT
    parts = ("Encoder", "Decoder", "DecoderWrapper", "Stack", "PretrainedBartModel", "BartPretrainedModel")
    last = {"SiglipModel", "SiglipTextModel", "SiglipTextTransformer", "GPT2DoubleHeadsModel"}
    assert {kind for kind in unknown if not kind.endswith(parts)} == {
        kind for kind in found if kind.endswith("ForQuestionAnswering")
    } | (last & found)  # which may pool the last position, be it padded or not


def task(name: str, ending: str, **options: Any) -> nn.Module:
    import transformers

    model = small_model(name)
    prefix = type(model).__name__
    for tail in ("EncoderModel", "TextModel", "Model"):
        prefix = prefix.removesuffix(tail)
    kind = getattr(transformers, prefix + ending)
    config = copy.deepcopy(model.config)
    config.num_labels = 2 if ending in ("ForQuestionAnswering", "ForPreTraining") else 3
    config.eos_token_id = 2
    config.classifier_dropout = 0.0
    config.is_encoder_decoder = name in ("bart", "marian") or (
        "t5" in name and ending not in ("ForTokenClassification",)
    )
    for dropout in ("summary_last_dropout", "classifier_dropout_prob", "seq_classif_dropout", "qa_dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in path and "shared" not in path:
                parameter.mul_((0.05 if path.endswith("Attention.q.weight") else 0.2) / parameter.std())
    return model


def task_inputs(model: nn.Module, ending: str) -> dict[str, Tensor]:
    """Padded behind, as tokenizers do, with labels."""
    generator = torch.Generator().manual_seed(5)
    keep = rows_of([9, 5, 7, 3], 9)
    ids = torch.randint(3, 99, keep.shape, generator=generator)
    if ending == "ForSequenceClassification":  # BART and T5 pool the last end of sequence
        ids[torch.arange(4), keep.sum(1) - 1] = 2
    inputs = {"input_ids": ids.masked_fill(~keep, 1), "attention_mask": keep.long()}
    labels = torch.randint(0, 3, keep.shape, generator=generator).masked_fill(~keep, -100)
    row = torch.tensor([0, 1, 2, 0])
    if ending == "ForMultipleChoice":
        return {**{key: value.view(2, 2, 9) for key, value in inputs.items()}, "labels": torch.tensor([1, 0])}
    if ending == "ForQuestionAnswering":
        return {**inputs, "start_positions": torch.tensor([1, 2, 3, 1]), "end_positions": torch.tensor([2, 3, 4, 2])}
    if ending == "ForSequenceClassification":
        return {**inputs, "labels": row}
    if ending == "ForNextSentencePrediction":
        return {**inputs, "labels": row % 2}
    if ending == "ForPreTraining" and "Electra" in type(model).__name__:
        return {**inputs, "labels": labels.clamp(0, 1)}
    if ending == "ForPreTraining":
        second = "sentence_order_label" if "Albert" in type(model).__name__ else "next_sentence_label"
        return {**inputs, "labels": labels, second: row % 2}
    return {**inputs, "labels": labels}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    used = [p for p in model.parameters() if p.requires_grad]
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in used)]


@pytest.mark.parametrize(("name", "ending"), TASKS)
def test_heads_learn_what_they_learn_unfused(name, ending, eager_rule, packings):
    """Loss and all gradients on a padded batch with `padding="auto"`; only question answering keeps the padding."""
    model = task(name, ending)
    inputs = task_inputs(model, ending)
    try:
        expected = loss_and_gradients(model, inputs)
    except IndexError:
        if not older_than("5.23"):
            raise
        pytest.skip("the unfused model fails in this transformers")
    report = fusenc.fuse(model)
    got = loss_and_gradients(model, inputs)
    answers = ending == "ForQuestionAnswering"
    assert len(packings) == (not answers) and bool(report.padding) == answers
    assert_same(got, expected, SAME_ALGORITHM)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("ending", ["ForSequenceClassification", "ForMultipleChoice"])
def test_poolings_of_modernbert(ending, pooling, eager_rule, packings):
    model = task("modernbert", ending, classifier_pooling=pooling)
    inputs = task_inputs(model, ending)
    expected = loss_and_gradients(model, inputs)
    assert not fusenc.fuse(model).padding
    assert_same(loss_and_gradients(model, inputs), expected, SAME_ALGORITHM)
    assert packings


@pytest.mark.parametrize("summary", ["first", "mean", "last"])
def test_summaries_of_electra(summary, eager_rule, packings):
    model = task("electra", "ForMultipleChoice", summary_type=summary)
    inputs = task_inputs(model, "ForMultipleChoice")
    expected = loss_and_gradients(model, inputs)
    report = fusenc.fuse(model)
    assert_same(loss_and_gradients(model, inputs), expected, SAME_ALGORITHM)
    assert bool(packings) == (not report.padding) == (summary == "first")


def test_clip_learns_what_it_learns_unfused(eager_rule, packings):
    import transformers

    text = {**FAMILIES["clip text"].options, "attention_dropout": 0.0}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=FAMILIES["clip vision"].options, projection_dim=16)
    model = transformers.CLIPModel(config)
    inputs = task_inputs(model, "")
    inputs.pop("labels")
    inputs["input_ids"][torch.arange(4), inputs["attention_mask"].sum(1) - 1] = 2  # the end, which is pooled
    inputs |= {"pixel_values": torch.randn(4, 3, 12, 12), "return_loss": True}
    expected = loss_and_gradients(model, inputs)
    assert not fusenc.fuse(model).padding
    assert_same(loss_and_gradients(model, inputs), expected, SAME_ALGORITHM)
    assert packings


@pytest.mark.parametrize("ending", ["ForCTC", "ForSequenceClassification"])
@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2 stable", "hubert"])
def test_heads_of_recordings_learn_what_they_learn_unfused(name, ending, eager_rule, packings):
    import transformers

    kind = type(small_model(name)).__name__.removesuffix("Model") + ending
    config = small_model(name).config
    config.num_labels, config.final_dropout, config.pad_token_id = 3, 0.0, 0
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.2 / parameter.std())
    inputs = batch(model=model)
    labels = [[1, 5], [2, 3], [4, 4], [7, -100]] if ending == "ForCTC" else [0, 1, 2, 0]
    inputs["labels"] = torch.tensor(labels)
    expected = loss_and_gradients(model, inputs)
    assert not fusenc.fuse(model, strict=True).padding
    assert_same(loss_and_gradients(model, inputs), expected, SAME_ALGORITHM)
    assert bool(packings) == (ending == "ForCTC"), "the other asks for all hidden states"


def test_heads_of_recordings_that_keep_padding():
    """A convolution behind the encoder reads padded positions; pretraining, frames and voices are not known."""
    import transformers

    config = small_model("wav2vec2").config
    for kind in ("ForPreTraining", "ForAudioFrameClassification", "ForXVector"):
        report = fusenc.fuse(getattr(transformers, f"Wav2Vec2{kind}")(config))
        reason = f"Wav2Vec2{kind} may use hidden states at padded positions"
        assert report.padding == {"wav2vec2.encoder": reason}
    config.add_adapter = True
    report = fusenc.fuse(transformers.Wav2Vec2ForCTC(config))
    assert report.padding == {"wav2vec2.encoder": "Wav2Vec2Model: its adapter reads padded positions"}


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_poolings_of_eurobert(pooling, eager_rule, packings):
    model = task("eurobert", "ForSequenceClassification", classifier_pooling=pooling)
    inputs = task_inputs(model, "ForSequenceClassification")
    expected = loss_and_gradients(model, inputs)
    assert not fusenc.fuse(model).padding
    assert_same(loss_and_gradients(model, inputs), expected, SAME_ALGORITHM)
    assert packings


def test_the_report_of_a_head_that_keeps_padding(packings):
    model = task("bert", "ForQuestionAnswering")
    report = fusenc.fuse(model, strict=True)
    reason = "BertForQuestionAnswering takes a softmax over padded positions too"
    assert report.padding == {"bert.encoder": reason} and model.bert.encoder.padding == "keep"
    assert str(report).endswith(f"left as it was: nothing\npadding kept: 1\n  {reason}: bert.encoder")
    assert fusenc.fuse(model) == report, "a second time"
    fusenc.fuse(model.bert, padding="remove")
    model(**task_inputs(model, "ForQuestionAnswering"))
    assert packings, "whoever asks for it has it"
    assert not fusenc.fuse(model, padding="remove").padding and model.bert.encoder.padding == "remove"


def test_only_models_of_transformers_that_are_known_lose_their_padding():
    import transformers

    config = small_model("bert").config

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config)

    class OwnPretrained(transformers.BertPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)

        def forward(self, **inputs: Any) -> Any:
            return self.bert(**inputs)

    class Answers(transformers.BertForQuestionAnswering):
        pass

    class Classifies(transformers.BertForSequenceClassification):
        pass

    class BertForTokenClassification(transformers.BertForTokenClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert not fusenc.fuse(Own()).padding and not fusenc.fuse(Classifies(config)).padding
    for model in (OwnPretrained(config), Answers(config), BertForTokenClassification(config)):
        report = fusenc.fuse(nn.ModuleDict({"inner": model}))
        assert list(report.padding) == ["inner.bert.encoder"]
    assert (
        "OwnPretrained may use hidden states at padded positions" in fusenc.fuse(OwnPretrained(config)).padding.values()
    )


def test_adapters_around_a_head_change_nothing():
    peft = pytest.importorskip("peft")
    for ending, kept in (("ForQuestionAnswering", True), ("ForTokenClassification", False)):
        model = peft.get_peft_model(task("bert", ending), peft.LoraConfig(r=2, target_modules=["query"]))
        assert bool(fusenc.fuse(model).padding) == kept
