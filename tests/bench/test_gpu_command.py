"""`make gpu` without a GPU: its clock, its files, what it refuses to say, and a rehearsal of all of it."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fusenc.bench import measure, results, timing
from fusenc.bench.cases import model
from fusenc.bench.cases.case import COMPILED, Case, Inputs, Point
from fusenc.bench.gpu import __main__ as command
from fusenc.bench.gpu import clock, host, kernels, models, report, state, tuning, values, warming
from fusenc.bench.gpu.rehearsal import Rehearsal

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-P", "-m", "fusenc.bench.gpu", "--rehearse"]
ONES = torch.ones(4)


# The clock.


class Hands:
    """A clock that a test moves."""

    at = 100.0

    def __call__(self):
        return self.at


def test_each_part_has_its_share_and_what_earlier_ones_left():
    hands = Hands()
    of = clock.Clock(8.0, list(clock.SHARES), elapsed=10.0, now=hands)
    assert of.elapsed() == 10.0
    whole = 8 * 60 - clock.RESERVE
    assert of.left("values") == pytest.approx(whole / 4 - 10)
    assert of.left("tune") == pytest.approx(whole - 10)
    hands.at += 20.0  # values and host end early
    assert of.left("kernels") == pytest.approx(whole * 6 / 8 - 30)
    hands.at += 8 * 60.0
    assert all(of.left(part) == 0.0 for part in clock.SHARES)


def test_parts_that_do_not_run_have_no_share():
    of = clock.Clock(2.0, ["models"], now=Hands())
    assert of.left("models") == pytest.approx(120 - clock.RESERVE)
    assert clock.Clock(2.0, ["tune"], now=Hands()).left("tune") == pytest.approx(120 - clock.RESERVE)


def test_nothing_begins_that_does_not_fit():
    """Each kind by its own last times: what compiles for long is left out, what is short goes on."""
    hands, ran, left_out = Hands(), [], []
    of = clock.Clock(1.0, ["kernels"], now=hands)
    costs = {"short": 4.0, "long": 30.0}
    for item in of.fitting("kernels", ["short", "long"] * 8, str, {"short": 1.0, "long": 20.0}.get, left_out):
        assert of.left("kernels") > 0.0
        ran.append(item)
        hands.at += costs[item]
    assert ran == ["short", "long", "short", "short", "short", "short", "short"]
    assert len(ran) + len(left_out) == 16 and of.left("kernels") < 4.0
    assert of.elapsed() <= 60.0


def test_time_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(1.0); from fusenc.bench.gpu.clock import age_of_the_process as f; print(f())"
    begin = time.monotonic()
    age = float(subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1.0 <= age + 0.02 <= time.monotonic() - begin + 0.02


# Lists of cases.


def test_the_main_figures_come_first():
    cases, compiled = (make(Rehearsal(), tiny=True) for make in (kernels.cases, kernels.compiled))
    for of in (cases, compiled):
        assert {case.op for case in of[:3]} == {"attention", "add_norm", "linear_act"}
    assert not {name for case in cases for name in case.providers} & set(COMPILED)
    assert all(set(case.providers) & set(COMPILED) for case in compiled)
    assert len({case.key for case in (*cases, *compiled)}) == len(cases) + len(compiled)


def test_the_cases_on_a_gpu_are_the_specified_ones():
    """Made, not run: what part 3 and part 4 measure on a real GPU."""
    found = kernels.cases(Rehearsal(), tiny=False)
    dense = [case for case in found if case.op == "attention" and case.name.startswith("dense, 32x512,")]
    assert {(case.direction, "32 heads of 64" in case.name) for case in dense} == {
        (d, wide) for d in kernels.DIRECTIONS for wide in (True, False)
    }
    ragged = next(case for case in found if case.name.startswith("ragged, 8x2048"))
    assert set(ragged.providers) == {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "fusenc", "fusenc-packed"}
    assert len([case for case in kernels.compiled(Rehearsal(), tiny=False) if "flex" in case.providers]) == 12
    norms = {case.name.split(",")[1].strip() for case in found if case.op == "add_norm"}
    assert norms == {"1x4096x768", "1x16384x1024"}
    of_model = models.cases(Rehearsal(), tiny=False)
    assert {"fusenc-packed", "fusenc-flattened", "hf-sdpa-cudnn"} <= set(of_model[0].providers)
    assert [i for i, case in enumerate(of_model) if "fusenc-graph" in case.providers] == list(range(8, 16))
    assert len(models.compiled(Rehearsal(), tiny=False)) == 8


# Values.


def stub_case(ours, judge=None, tolerance=16.0):
    def provider(result):
        return lambda: lambda inputs: lambda: [result]

    return Case(
        "attention", "stub", "bfloat16", "forward", lambda: Inputs([]),
        {"sdpa-flash": provider(ONES), "fusenc": provider(ours)}, ("sdpa-flash",), reference=provider(ONES.double()),
        flops=1e9, tolerance=tolerance, judge=None if judge is None else provider(judge),
    )  # fmt: skip


@pytest.fixture
def run_cases(monkeypatch, tmp_path):
    """Runs the part of the kernels, rehearsed, with the test's own cases."""

    def run(*cases):
        monkeypatch.setattr(warming, "LISTS", {"kernels": lambda device, tiny: list(cases)})
        monkeypatch.setattr(warming, "missing", lambda *arguments: False)
        status = command.main(["--rehearse", "--parts", "kernels", "--out", str(tmp_path)])
        return (
            status,
            state.load(tmp_path / "rehearsal" / "last.json"),
            (tmp_path / "rehearsal" / "last.md").read_text(),
        )

    return run


def test_wrong_values_never_get_a_time(run_cases):
    status, run, page = run_cases(stub_case(ONES * 1.5))
    outcome = run.found.records[0].outcomes["fusenc"]
    assert outcome.status == measure.WRONG and not outcome.seconds
    assert "wrong values" in page and "differs by 5.00e-01" in page and "fusenc /" not in page
    assert status == 0, "the run itself is sound"
    assert run_cases(stub_case(ONES))[2].count("(fusenc / sdpa-flash)") == 1


def test_a_mistake_in_a_case_fails_the_rehearsal(run_cases, capsys):
    def broken():
        raise NameError("name 'tensr' is not defined")

    case = stub_case(ONES)
    case.providers["sdpa-flash"] = broken
    assert run_cases(case)[0] == 1 and "tensr" in capsys.readouterr().out


def test_a_judge_makes_the_tolerance_as_tight_as_its_own_error():
    def status(ours, judge):
        return measure.measure(stub_case(ours, judge, 256.0), Rehearsal(), None, command.REHEARSED)["fusenc"].status

    assert status(ONES * 1.5, None) == measure.MEASURED, "the tolerance of a model alone lets half of a value pass"
    assert status(ONES * 1.5, ONES) == measure.WRONG
    assert status(ONES * 1.06, ONES * (1 - 2**-5)) == measure.MEASURED
    assert status(ONES * 1.13, ONES * (1 - 2**-5)) == measure.WRONG


def test_a_judge_that_is_right_by_chance_in_one_result_judges_by_its_median():
    exact, judged = [ONES] * 3, [ONES, ONES * (1 - 2**-5), ONES * (1 - 2**-5)]
    case = stub_case(exact, judged, 256.0)
    assert measure._judged(case, Inputs([]), exact) == [3 * 4.0] * 3


@pytest.mark.parametrize(("direction", "autocast"), [("forward", False), ("both", True)], ids=["inference", "training"])
def test_texts_that_attend_to_each_other_are_wrong(direction, autocast):
    """Packed texts taken for one long text; where they are kept apart, all providers are right."""
    pytest.importorskip("transformers")
    device = Rehearsal()
    point = Point("bfloat16", 4, 24, 32, 2, 0.5, direction, device.kind, device.where)
    case = model.case(point, device, 2, autocast)
    outcomes: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        packed = model._packed
        patch.setattr(model, "_packed", lambda of, lengths, *rest: packed(of, [sum(lengths)], *rest))
        assert not measure.checked(case, device, ["fusenc-packed"], outcomes)
        assert outcomes["fusenc-packed"].status == measure.WRONG
    names = {"hf-sdpa", "fusenc", "fusenc-packed", "fusenc-flattened", "fusenc-graph"}
    assert set(measure.checked(case, device, sorted(names), outcomes)) == names, outcomes


# Files.


def test_a_file_is_a_result_of_fusenc_bench_and_comes_back_as_it_was(run_cases):
    _, run, page = run_cases(stub_case(ONES))
    assert results.load(run.file(".json")).records[0].outcomes["fusenc"].seconds
    assert run.text() == run.file(".json").read_text()
    assert len(run.found.records[0].outcomes["fusenc"].seconds) >= 20
    asked = {"gpu", "torch", "cuda", "triton", "transformers", "commit", "date", "python", "minutes"}
    assert asked <= set(run.found.machine)
    assert run.parts["kernels"].state == state.DONE and run.parts["models"].state == state.NOT_STARTED
    assert report.REHEARSAL in page and page.startswith("# cpu (rehearsal)")


def test_the_page_has_every_committed_run_but_no_rehearsal(run_cases, tmp_path):
    _, run, _ = run_cases(stub_case(ONES))
    run.tests = {"a.py::b[c|d]": {"outcome": "failed", "seconds": 1.0, "reason": "off | by\none"}}
    text = f"# Page\n{report.BEGIN}\nold\n{report.END}\nrest\n"
    assert report.NONE_YET in report.page(text, [run]) and "old" not in report.page(text, [run])
    run.rehearsal, run.found.device = False, "Stub chip"
    later = state.load(run.file(".json"))
    later.rehearsal, later.found.device, later.found.machine["date"] = False, "Later chip", "9999-01-01 00:00 UTC"
    page = report.page(text, [run, later])
    assert page.index("## Later chip") < page.index("## Stub chip") and page.endswith(f"{report.END}\nrest\n")
    assert "### Attention" in page and "1 failed" in page and "off / by one" in page
    assert report.page(page, [run, later]) == page
    with pytest.raises(ValueError, match="no lines"):
        report.page("# Page\n", [run])


def test_the_committed_page_is_what_the_command_writes():
    page = ROOT / "docs" / "gpu.md"
    text = page.read_text(encoding="utf-8")
    assert report.page(text, report.committed(ROOT / "bench" / "results")) == text


def test_a_run_that_ends_while_it_saves_leaves_the_old_file(run_cases, monkeypatch):
    _, run, _ = run_cases(stub_case(ONES))
    before = run.file(".json").read_text()

    def killed(*arguments):
        raise KeyboardInterrupt

    run.minutes = 99.0
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    assert run.file(".json").read_text() == before


def test_a_foreign_file_is_refused(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(results.text(results.Results({}, "chip")))
    with pytest.raises(ValueError, match="no result file of the GPU run"):
        state.load(file)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_ended_at_any_moment_it_leaves_valid_results(tmp_path, end):
    """A moment soon after the second case, seconds before the last one."""
    file = tmp_path / "rehearsal" / "last.json"
    wait = random.Random(end).uniform(0.0, 1.0)
    running = subprocess.Popen([*RUN, "--parts", "host,kernels", "--out", tmp_path], stdout=subprocess.PIPE, text=True)
    while not file.exists() and running.poll() is None:
        time.sleep(0.01)
    while len(state.load(file).found.records) < 2 and running.poll() is None:  # each load meets another moment
        time.sleep(0.01)
    time.sleep(wait)
    os.kill(running.pid, end)
    said, _ = running.communicate(timeout=60)
    run = state.load(file)
    assert running.returncode == (-9 if end == signal.SIGKILL else 143), f"after {wait} s: {said[-1000:]}"
    assert len(run.found.records) >= 2 and run.parts["host"].state in (state.DONE, state.RUNNING, state.CUT)
    if end == signal.SIGTERM:
        assert state.RUNNING not in {part.state for part in run.parts.values()}, run.parts
    assert report.REHEARSAL in file.with_suffix(".md").read_text()


@pytest.mark.parametrize("when", [1, 2, 3], ids=["as a part begins", "after a case", "as a part ends"])
def test_stopped_while_it_saves_no_part_counts_as_running(run_cases, monkeypatch, tmp_path, when):
    saves, save = itertools.count(), state.Run.save

    def stopping(run):
        if next(saves) == when:
            raise SystemExit(143)
        save(run)

    monkeypatch.setattr(state.Run, "save", stopping)
    with pytest.raises(SystemExit):
        run_cases(stub_case(ONES))
    part = state.load(tmp_path / "rehearsal" / "last.json").parts["kernels"]
    assert (part.state, part.reason) == ((state.DONE, "") if when == 3 else (state.CUT, "stopped"))


# Tests in part 1.

SOME_TESTS = """
import os, pytest
from pathlib import Path
pytestmark = pytest.mark.essential
def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_that_breaks_the_context():
    Path("broken").write_text(str(os.getpid()))
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after_it(): assert str(os.getpid()) != Path("broken").read_text()
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--device')\n"
        "def pytest_configure(config): config.addinivalue_line('markers', 'essential: x'), "
        "config.addinivalue_line('markers', 'gpu: x')\n"
    )
    return folder


def run_tests(tmp_path, checkout, minutes=2.0):
    run = state.begin(Rehearsal(), True, minutes, tmp_path, "a commit")
    run.save()
    return (*values.run(run, clock.Clock(minutes, ["values"]), checkout), state.load(run.file(".json")))


def test_each_test_is_saved_as_it_ends_whatever_the_others_do(tmp_path, checkout):
    (checkout / "tests" / "test_some.py").write_text(SOME_TESTS)
    ending, reason, run = run_tests(tmp_path, checkout)
    found = {name.rpartition("::")[2]: of for name, of in run.tests.items()}
    assert {name: of["outcome"] for name, of in found.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_skipped": "skipped",
        "test_that_breaks_the_context": "failed", "test_after_it": "passed",
    }  # fmt: skip
    assert "one is not two" in found["test_wrong"]["reason"] and found["test_skipped"]["reason"] == "Skipped: not here"
    assert "illegal memory access" in found["test_that_breaks_the_context"]["reason"]
    assert "5 tests: 2 passed, 2 failed, 1 skipped" in run.file(".md").read_text()
    assert (ending, reason) == (state.DONE, ""), "a failed test is a result"


def test_a_test_whose_teardown_fails_later_has_failed(tmp_path, checkout):
    (checkout / "tests" / "test_some.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.essential\n@pytest.fixture\ndef broken():\n    yield\n"
        "    time.sleep(2)\n    raise RuntimeError('in the end')\ndef test_a(broken): pass\n"
    )
    _, _, run = run_tests(tmp_path, checkout)
    assert [(of["outcome"], of["reason"]) for of in run.tests.values()] == [("failed", "RuntimeError: in the end")]


def test_tests_that_take_too_long_are_ended_and_the_others_count(tmp_path, checkout):
    (checkout / "tests" / "test_some.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.essential\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n"
    )
    begin = time.monotonic()
    ending, reason, run = run_tests(tmp_path, checkout, minutes=0.5)
    assert time.monotonic() - begin < 35
    assert ending == state.CUT and "not all tests" in reason
    assert [of["outcome"] for of in run.tests.values()] == ["passed"]


def test_where_there_are_no_tests_the_part_says_so(tmp_path):
    ending, reason, _ = run_tests(tmp_path, tmp_path)
    assert ending == state.FAILED and "no tests in" in reason


def test_every_family_has_essential_tests():
    marked = {file.name for file in (ROOT / "tests").rglob("test_*.py") if "mark.essential" in file.read_text()}
    assert {
        "test_attention.py", "test_attention_options.py", "test_add_norm.py", "test_ffn.py", "test_embed_norm.py",
        "test_rotary.py", "test_encoder_layer.py", "test_huggingface.py", "test_transformer_encoder_layer.py",
    } <= marked  # fmt: skip


# Compiling in advance, and tuning.


def test_a_job_that_runs_out_of_memory_is_not_done(tmp_path, monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken():
        raise ValueError("the part says why")

    done = tmp_path / "done"
    arguments = ["host", "--worker", "0", "--of", "1", "--memory", "0.1", "--done", str(done), "--rehearse"]
    monkeypatch.setattr(sys, "argv", ["warming", *arguments])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(warming, "_jobs", lambda *of: [full, broken, lambda: None])
    warming.main()
    assert done.read_text().splitlines() == ["host 1", "host 2"]


def test_processes_that_fail_are_counted_and_say_why(tmp_path, capsys):
    run = state.begin(Rehearsal(), True, 1.0, tmp_path, "a commit")
    with warming.warming(["no such list"], 2, 0.1, run) as workers:
        warming.wait(workers, 60.0)
    assert "2 of 2 processes that compile ended with an error" in capsys.readouterr().out
    assert run.file(".warming.txt").read_text().count("KeyError: 'no such list'") == 2


def test_a_tunable_that_fails_ends_no_other(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no such kernel")

    run, made = state.begin(Rehearsal(), True, 1.0, tmp_path, "a commit"), tuning.tunables(True)
    monkeypatch.setattr(tuning, "tunables", lambda tiny: [("broken 8", broken), *made])
    tuning.run(run, clock.Clock(1.0, ["tune"]), Rehearsal(), [])
    assert run.tuned[0]["key"] == "broken 8" and run.tuned[0]["refused"] == {"all": "RuntimeError: no such kernel"}
    assert len(run.tuned) == 1 + len(made) and all(of["winner"] for of in run.tuned[1:])


# The host's clock, and all of it at once.


def test_the_hosts_clock_begins_with_an_empty_queue_and_does_not_wait_for_results():
    log = []

    class Device(timing.Cpu):
        name, kind, where = "chip", "cuda", "cuda"

        def finished(self, call):
            return lambda: (log.append("wait"), time.sleep(0.02))

        def captured(self, call):
            return "captured"

        def release(self):
            log.append("released")

    of = host.HostClock(Device())
    seconds = of.seconds(lambda: log.append("call"), 3)
    assert log == ["wait", "call", "call", "call", "wait"] and seconds < 0.01
    assert (of.name, of.kind, of.where) == ("chip", "cuda", "cuda")
    of.release()
    assert log[-1] == "released" and of.captured(None) == "captured"


def test_the_whole_rehearsal(tmp_path):
    """As `make gpu ARGS=--rehearse` runs it."""
    begin = time.monotonic()
    done = subprocess.run([*RUN, "--out", tmp_path, "--checkout", ROOT], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert time.monotonic() - begin < 300
    run = state.load(tmp_path / "rehearsal" / "last.json")
    assert {part.state for part in run.parts.values()} == {state.DONE}, run.parts
    assert {of.op for of in run.found.records} == {"host", "attention", "add_norm", "linear_act", "model"}
    assert run.tests and run.tuned and run.found.device == "cpu (rehearsal)"
    whole = json.loads(run.file(".json").read_text())
    assert whole["gpu"]["rehearsal"] and whole["machine"]["gpu"] == "none (rehearsal)"
