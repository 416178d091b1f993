"""`fusenc bench`: what it measures, what it refuses, what it leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fusenc.bench import cases, commands, measure, results, timing
from fusenc.bench.cases.case import DROPOUT, PROVIDERS, AbsentError, Case, Inputs, flat
from fusenc.bench.checking import difference
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

QUICK = measure.Limits(rounds=3, seconds=0.0)
TINY = {"batch": (2,), "length": (12,), "width": (32,), "heads": (2,)}
ONES = torch.ones(4)


def bench(*arguments):
    return CliRunner().invoke(commands.app, ["bench", *map(str, arguments)])


def made(op, **given):
    return cases.cases([op], TINY | given, timing.Cpu())


# What the shipped cases say.

GRIDS = {
    "add_norm": {}, "embed_norm": {}, "rotary": {}, "attention": {"fill": (1.0, 0.6)}, "ffn": {},
    "layer": {"fill": (1.0, 0.6)}, "decoder": {"fill": (1.0, 0.6)},
}  # fmt: skip


@pytest.mark.parametrize("op", GRIDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_case_agrees_with_its_reference_in_all_directions(op, dtype):
    found = made(op, dtype=(dtype,), direction=("forward", "backward", "both"), **GRIDS[op])
    assert found and len({case.key for case in found}) == len(found)
    for case in found:
        assert (case.reference is None) == ("dropout" in case.name) == (case.unchecked == DROPOUT)
        assert case.bytes > 0 and case.tokens > 0 and set(case.providers) <= set(PROVIDERS)
        outcomes = {}
        right = measure.checked(case, timing.Cpu(), measure.chosen(case, timing.Cpu(), None), outcomes)
        assert {name for name in case.providers if name.startswith("fusenc")} <= set(right), (case.key, outcomes)
        assert case.against[0] in right, (case.key, outcomes)
        assert all(outcome.status == measure.ABSENT for outcome in outcomes.values()), (case.key, outcomes)


def test_an_encoder_agrees_with_torchs():
    for case in made("encoder", fill=(1.0, 0.6), direction=("forward", "both"), dtype=("float32",)):
        if "encode," in case.name:
            continue  # on real sentences, in the benchmark itself
        outcomes = {}
        right = measure.checked(case, timing.Cpu(), list(case.providers), outcomes)
        assert set(right) >= {"torch.nn", "fusenc"} and ("dropout" in case.name) == bool(case.unchecked), outcomes


@pytest.mark.parametrize("fill", [1.0, 0.6])
def test_a_model_agrees_with_hugging_face(fill):
    pytest.importorskip("transformers")
    for case in made("model", fill=(fill,), direction=("both",)):
        outcomes = {}
        right = measure.checked(case, timing.Cpu(), ["hf-eager", "hf-sdpa", "hf-flash", "fusenc"], outcomes)
        assert set(right) == {"hf-eager", "hf-sdpa", "fusenc"}, outcomes
        assert outcomes["hf-flash"].reason == "flash-attn is not installed"


@pytest.mark.parametrize(("op", "direction"), [("attention", "forward"), ("ffn", "forward"), ("ffn", "both")])
def test_flops_are_those_that_torch_counts(op, direction):
    case = made(op, direction=(direction,))[0]
    call = case.providers["eager"]()(case.inputs())
    with FlopCounterMode(display=False) as counter:
        call()
    assert case.flops == counter.get_total_flops()


def test_a_ragged_batch_has_the_fill_that_was_asked_for():
    given = TINY | {"batch": (16,), "length": (200,), "fill": (0.3,)}
    point = next(cases.case.points(cases.attention.GRIDS, given, timing.Cpu()))
    assert max(point.lengths) == 200 and abs(point.tokens / 3200 - 0.3) < 0.03
    assert point.real().sum() == point.tokens == point.starts()[-1]


def test_the_old_targets_hold_on_a_cpu_in_float32_alone():
    def targets(op, **given):
        return {value for case in cases.cases([op], given, timing.Cpu()) for value in case.targets.values()}

    assert targets("add_norm") == targets("ffn") == targets("embed_norm") == {1.0}
    assert 0.5 in targets("host") and 0.95 in targets("attention")
    assert not targets("ffn", dtype=("bfloat16",))


def test_inputs_that_take_turns_are_the_same_values_in_other_memory():
    for case in (made("attention", fill=(0.6,))[0], made("embed_norm")[0]):
        first = case.inputs()
        second = first.copy()
        for a, b in zip(first.leaves + first.others, second.leaves + second.others, strict=True):
            assert a.equal(b) and a.stride() == b.stride() and a.data_ptr() != b.data_ptr()


# What is done with a case, by cases of the tests' own.


def provider(result=ONES, cost=0.0):
    def call():
        if isinstance(result, BaseException):
            raise result
        time.sleep(cost)
        return [result]

    return lambda: lambda inputs: call


def refusing():
    raise AbsentError("not installed")


def case(name="one", **providers):
    providers = {"eager": provider()} | providers
    return Case(
        "stub", name, "float32", "forward", lambda: Inputs([]), providers, ("eager",), {"fusenc": 1.0}, provider(),
        flops=1e6, bytes=1e3, tokens=8,
    )  # fmt: skip


@pytest.fixture
def stub(monkeypatch):
    """`fusenc bench stub` measures what the test appends."""
    found = []
    monkeypatch.setattr(cases, "OPS", {"stub": lambda given, device: list(found), "other": lambda given, device: []})
    monkeypatch.setattr(timing.Cpu, "peaks", lambda self, dtype: timing.Peaks("of the test", 1.0, 10.0))
    return found


def test_wrong_values_get_no_time(stub):
    stub.append(case(fusenc=provider(ONES * 1.001), liger=provider(ONES * float("nan")), xformers=provider(ONES[:3])))
    outcomes = measure.measure(stub[0], timing.Cpu(), None, QUICK)
    assert [outcomes[n].status for n in stub[0].providers] == ["measured", *["wrong values"] * 3]
    assert not any(outcomes[n].seconds for n in ("fusenc", "liger", "xformers"))
    assert "differs by 1.00e-03" in outcomes["fusenc"].reason and "shape" in outcomes["xformers"].reason
    done = bench("stub", "--rounds", 3)
    assert done.exit_code == 1 and "wrong values" in done.output


FAULTS = {
    "absent": (refusing, "absent", "not installed"),
    "no memory": (provider(torch.OutOfMemoryError("CUDA out of memory")), "out of memory", "CUDA out of memory"),
    "no memory on a CPU": (
        provider(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), "out of memory", "Default",
    ),
    "does not run": (provider(RuntimeError("no kernel\nand more")), "absent", "RuntimeError: no kernel"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "status", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_one_provider_that_cannot_run_leaves_the_others_alone(stub, fault, status, reason):
    stub += [case(liger=fault, fusenc=provider()), case("two", fusenc=provider())]
    done = bench("stub", "--rounds", 3)
    assert done.exit_code == 0 and reason in done.output
    outcomes = measure.measure(stub[0], timing.Cpu(), None, QUICK)
    assert outcomes["liger"].status == status and reason in outcomes["liger"].reason
    assert len(outcomes["fusenc"].seconds) == len(outcomes["eager"].seconds) == 3


def test_the_library_itself_has_to_run(stub):
    stub.append(case(fusenc=provider(RuntimeError("broken"))))
    done = bench("stub", "--rounds", 3)
    assert done.exit_code == 1 and "failed: RuntimeError: broken" in done.output


def test_inputs_that_do_not_fit_are_recorded_for_all(stub):
    def inputs():
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = case(fusenc=provider())
    broken.inputs = inputs
    stub += [broken, case("two", fusenc=provider())]
    outcomes = measure.measure(broken, timing.Cpu(), None, QUICK)
    assert {outcome.status for outcome in outcomes.values()} == {"out of memory"}
    assert bench("stub", "--rounds", 3).exit_code == 0


def test_running_out_while_times_are_taken_spares_the_next_case(stub):
    calls = []

    def make(inputs):
        def call():
            calls.append(1)
            if len(calls) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [ONES]

        return call

    stub.append(case(fusenc=lambda: make))
    outcomes = measure.measure(stub[0], timing.Cpu(), None, QUICK)
    assert {outcome.status for outcome in outcomes.values()} == {"out of memory"}


def test_compiled_providers_take_part_on_a_cpu_only_if_asked_for(stub, monkeypatch):
    stub.append(case(compile=provider(), fusenc=provider()))
    assert "compile" not in measure.measure(stub[0], timing.Cpu(), None, QUICK)
    assert measure.measure(stub[0], timing.Cpu(), ["compile"], QUICK)["compile"].status == "measured"


def test_without_a_compiler_compiled_providers_are_absent(monkeypatch):
    def no_compiler(*arguments, **options):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    outcomes = measure.measure(made("add_norm")[0], timing.Cpu(), ["compile", "eager"], QUICK)
    assert outcomes["compile"].status == "absent" and "C++ compiler" in outcomes["compile"].reason
    assert outcomes["eager"].status == "measured"


def test_every_output_holds_the_same_numbers(stub, tmp_path):
    stub.append(case(fusenc=provider(cost=1e-3), liger=refusing))
    files = {suffix: tmp_path / f"out.{suffix}" for suffix in ("json", "csv", "html", "markdown")}
    plot = tmp_path / "out.svg"
    done = bench("stub", "--rounds", 5, *(x for k, f in files.items() for x in (f"--{k}", f)), "--plot", plot)
    assert done.exit_code == 0, done.output
    whole = json.loads(files["json"].read_text())
    assert {"commit", "torch", "processor"} <= set(whole["machine"])
    ours = whole["cases"][0]["providers"]["fusenc"]
    assert len(ours["seconds"]) == 5 and ours["figures"]["seconds"] >= 1e-3
    assert ours["figures"]["tflops"] == pytest.approx(1e-6 / ours["figures"]["seconds"])
    assert ours["figures"]["roofline"] == pytest.approx(max(ours["figures"]["tflops"], ours["figures"]["gb_s"] / 10))
    assert ours["figures"]["tokens_s"] == pytest.approx(8 / ours["figures"]["seconds"])
    rows = {row["provider"]: row for row in csv.DictReader(files["csv"].open())}
    assert float(rows["fusenc"]["median_us"]) == pytest.approx(1e6 * ours["figures"]["seconds"], abs=1e-3)
    assert rows["fusenc"]["commit"] == whole["machine"]["commit"] and rows["liger"]["reason"] == "not installed"
    assert "| stub: one | eager |" in files["markdown"].read_text() and "**missed**" in files["markdown"].read_text()
    page = files["html"].read_text()
    assert page.count("<svg") == 2 and "liger: not installed" in page
    assert "src=" not in page and "<link" not in page  # it needs nothing else
    assert "<svg" in plot.read_text()
    again = results.load(files["json"])
    assert results.text(again) == files["json"].read_text()


def test_files_are_written_to_where_links_lead_and_into_what_is_no_file(stub, tmp_path):
    stub.append(case(fusenc=provider()))
    real, link, pipe = tmp_path / "real.csv", tmp_path / "link.csv", tmp_path / "pipe"
    link.symlink_to(real)
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    assert bench("stub", "--rounds", 3, "--csv", link, "--markdown", pipe).exit_code == 0
    assert link.is_symlink() and "stub" in real.read_text() and pipe.is_fifo()
    assert "# Measured with" in reader.communicate(timeout=60)[0]


def test_a_target_is_missed_only_where_the_band_says_so(stub):
    of = results.record(case(fusenc=provider()), {})
    of.targets = {"fusenc": 1.0}
    verdicts = [
        results.verdict(of, "fusenc", results.Figures(1.0, ratio, band, None, None, None, None, None))
        for ratio, band in ((1.1, (0.9, 1.2)), (0.99, (0.97, 1.01)), (0.9, (0.85, 0.95)), (None, None))
    ]
    assert verdicts == ["reached", "within noise", "missed", ""]


def test_where_nobody_was_measured_the_status_says_so(stub):
    stub.append(case(liger=refusing))
    done = bench("stub", "--rounds", 3, "--provider", "liger")
    assert done.exit_code == 1 and "Nothing was measured" in done.output and "usual choice" not in done.output


def test_a_result_that_is_zero_in_truth_may_be_roundings():
    largest, rounding = torch.full((2,), 4.0), torch.full((2,), 4e-7)
    zero = torch.full((2,), 1e-17, dtype=torch.float64)
    assert difference([largest, rounding], [largest.double(), zero], torch.float32) == ""
    assert difference([largest, 100 * rounding], [largest.double(), zero], torch.float32)
    assert difference([largest, 1e-5 + rounding], [largest.double(), zero + 1e-5], torch.float32), "small, not zero"
    done = bench("attention", "--batch", 1, "--length", 1, "--rounds", 3, "--seconds", 0.1, "--provider", "fusenc,sdpa")
    assert done.exit_code == 0, done.output


def test_an_early_interrupt_says_so(monkeypatch, capsys):
    from fusenc.bench import cli

    monkeypatch.setattr(commands, "app", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and "stopped" in capsys.readouterr().err


def test_interrupted_it_keeps_what_is_there_and_goes_on_from_it(stub, tmp_path):
    file = tmp_path / "out.json"
    stub += [case("one", fusenc=provider()), case("two", fusenc=provider(KeyboardInterrupt()))]
    done = bench("stub", "--rounds", 3, "--json", file)
    assert done.exit_code == 130 and "Stopped after 1 of 2 cases" in done.output and f"--resume {file}" in done.output
    before = json.loads(file.read_text())["cases"]
    assert [each["name"] for each in before] == ["one"]

    stub[1] = case("two", fusenc=provider())
    done = bench("stub", "--rounds", 3, "--resume", file)
    assert done.exit_code == 0 and "1 cases are there already" in done.output
    after = json.loads(file.read_text())["cases"]
    assert [each["name"] for each in after] == ["one", "two"] and after[0] == before[0]


def test_another_build_or_another_provider_is_measured_anew(stub, tmp_path):
    file = tmp_path / "out.json"
    stub.append(case(fusenc=provider(), liger=provider()))
    bench("stub", "--rounds", 3, "--provider", "eager,fusenc", "--json", file)
    first = json.loads(file.read_text())["cases"][0]["providers"]
    assert set(first) == {"eager", "fusenc"}
    bench("stub", "--rounds", 3, "--resume", file)
    assert set(json.loads(file.read_text())["cases"][0]["providers"]) == {"eager", "fusenc", "liger"}
    whole = json.loads(file.read_text())
    whole["machine"]["commit"] = "another"
    file.write_text(json.dumps(whole))
    done = bench("stub", "--rounds", 3, "--resume", file)
    assert "another machine or build (commit another)" in done.output


BAD = {
    "op": (["atention"], "unknown op 'atention', expected one of stub, other, all"),
    "provider": (
        ["stub", "--provider", "fusenc,vllm"],
        "unknown provider 'vllm', expected one of fusenc, fusenc-packed",
    ),
    "dtype": (["stub", "--dtype", "int8"], "unknown dtype 'int8', expected one of float16, bfloat16, float32"),
    "direction": (["stub", "--direction", "up"], "expected one of forward, backward, both"),
    "size": (["stub", "--batch", "8,x"], "--batch: expected numbers"),
    "no size": (["stub", "--length", "0"], "--length: expected at least 1"),
    "fill": (["stub", "--fill", "1.5"], "--fill: expected above 0 and at most 1"),
    "plot": (["stub", "--plot", "out.gif"], "--plot: expected a file ending in .png, .svg, .pdf"),
    "device": (["stub", "--device", "tpu"], "expected one of auto, cpu, cuda"),
    "nothing": (["other"], "nothing to measure"),
    "folder": (
        ["stub", "--json", "/no/such/folder/out.json"],
        "--json: there is no folder /no/such/folder for out.json",
    ),
    "page": (["stub", "--html", "/no/such/folder/out.html"], "--html: there is no folder"),
    "a folder": (["stub", "--csv", "/"], "--csv: expected a file, got the folder /"),
    "nothing to resume": (["stub", "--resume", "/no.json"], "--resume: there is no file /no.json"),
    "resume": (["stub", "--resume", __file__], "is no result file of fusenc bench"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_explained(stub, arguments, message):
    stub.append(case(fusenc=provider()))
    done = bench(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_heads_have_to_divide_the_width():
    done = bench("attention", "--width", "64", "--heads", "5")
    assert done.exit_code == 2 and "expected a divisor of width 64, got 5" in done.output


def test_a_real_interrupt_leaves_a_valid_file(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, "-P", "-m", "fusenc.bench.cli", "bench", "rotary", "--batch", "1,2,3,4", "--length",
               "8,9,10,11,12,13", "--width", "32", "--heads", "2", "--threads", "1", "--json", str(file)]  # fmt: skip
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" \
           "import sys; sys.argv = sys.argv[1:]; from fusenc.bench.cli import main; main()"  # fmt: skip
    running = subprocess.Popen([sys.executable, "-P", "-c", code, *command[3:]], stdout=subprocess.PIPE, text=True)
    for _ in range(1200):
        time.sleep(0.1)
        if file.exists() and len(json.loads(file.read_text())["cases"]) >= 2:
            break
    os.kill(running.pid, signal.SIGINT)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 130 and "--resume" in output
    assert 2 <= len(results.load(file).records) < 48


def test_results_are_flattened_with_gradients_that_do_not_exist():
    x = torch.ones(2, requires_grad=True)
    a, b, c = flat((x * 2, [None, (x,)]))
    assert b is None and not a.requires_grad and c.equal(x)
