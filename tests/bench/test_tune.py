"""`fusenc tune` with stub operations and a stub clock; its writing with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fusenc.bench import commands, tune
from fusenc.kernels.common import tuned
from typer.testing import CliRunner

ONES = torch.ones(4)


class Clock:
    """Times by the candidate's own `cost`, the first few calls of each being slow."""

    name = "Stub chip"

    def __init__(self):
        self.calls = []

    def seconds(self, call, calls=1):
        call()
        first = self.calls.count(call) < tune.WARM_UP
        self.calls.append(call)
        return 1.0 if first else call.cost


def candidate(cost, result=ONES):
    def call():
        if isinstance(result, Exception):
            raise result
        return [result]

    call.cost = cost
    return call


def tunable(operation="op", **candidates):
    return tune.Tunable(operation, torch.float16, (100, 64, 32), candidates, lambda: [ONES])


def test_the_fastest_right_candidate_wins():
    wrong = {
        "differs": candidate(1e-9, ONES * 1.1),
        "nan": candidate(1e-9, ONES * float("nan")),
        "shape": candidate(1e-9, torch.ones(5)),
        "raises": candidate(1e-9, RuntimeError("out of resources")),
    }
    measured = tune.measure(tunable(slow=candidate(2e-6), fast=candidate(1e-6, ONES * (1 + 1e-3)), **wrong), Clock(), 3)
    assert measured.winner == "fast" and measured.seconds == {"slow": 2e-6, "fast": 1e-6}
    assert set(measured.refused) == set(wrong) and "out of resources" in measured.refused["raises"]


def test_nothing_is_chosen_where_all_are_refused(tmp_path):
    made = [lambda: tunable(only=candidate(1e-6, ONES * 2))]
    (measured,) = tune.tune(made, Clock(), tmp_path / "t.json", 3)
    assert measured.winner is None and not (tmp_path / "t.json").exists()


def test_candidates_take_turns_in_both_orders():
    clock, a, b = Clock(), candidate(1.0), candidate(1.0)
    tune.measure(tunable(a=a, b=b), clock, 4)
    rounds = [clock.calls[i : i + 2] for i in range(0, len(clock.calls), 2)]
    assert len(rounds) == 4 + tune.WARM_UP and all(len(set(pair)) == 2 for pair in rounds)
    assert rounds[0] == rounds[2] and rounds[1] == rounds[3] == rounds[0][::-1]


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A machine with a stub GPU, a cache folder and two stub operations."""
    file = tmp_path / "cache" / "tuned.json"
    monkeypatch.setattr(tuned, "cache_file", lambda: file)
    monkeypatch.setattr(tuned, "gpu_name", lambda index: Clock.name)
    monkeypatch.delenv(tuned.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tune.timing, "find_gpu", Clock)

    def make(operation):
        return lambda size, dtype: tune.Tunable(
            operation, dtype, size, {"fused": candidate(2e-6), "unfused": candidate(1e-6)}, lambda: [ONES]
        )

    monkeypatch.setattr(tune, "TUNABLES", {name: make(name) for name in ("one", "two")})
    tuned.forget()
    yield file
    tuned.forget()


def fusenc(*arguments):
    return CliRunner().invoke(commands.app, ["tune", *arguments])


def test_what_is_measured_is_chosen_afterwards(stub, tmp_path):
    assert tuned.choice("one", 0, torch.float16, (1000, 768, 3072)) is None
    done = fusenc("--rows", "1000,5000", "--export", str(tmp_path / "team.json"))
    assert done.exit_code == 0, done.output
    assert tuned.choice("one", 0, torch.float16, (1000, 768, 3072)) == "unfused"
    assert tuned.choice("two", 0, torch.float16, (8000, 768, 3072)) == "unfused"
    assert tuned.read_table(tmp_path / "team.json") == tuned.read_table(stub)


def test_reset_forgets_what_was_measured_before(stub):
    fusenc("one", "--rows", "1000")
    fusenc("two", "--rows", "1000")
    assert tuned.choice("one", 0, torch.float16, (1000, 768, 3072)) == "unfused"
    fusenc("two", "--rows", "1000", "--reset")
    assert tuned.choice("one", 0, torch.float16, (1000, 768, 3072)) is None


BAD = {
    "operation": (["three"], "expected one of one, two"),
    "dtype": (["--dtype", "int8"], "expected one of float16, bfloat16, float32"),
    "model": (["--model", "gpt"], "expected one of bert-base"),
    "rows": (["--rows", "a"], "--rows"),
    "no rows": (["--rows", "0"], "--rows"),
    "width": (["--d-model", "0"], "--d-model"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_explained(stub, arguments, message):
    done = fusenc(*arguments)
    assert done.exit_code == 2 and message in done.output and not stub.exists()


def test_without_a_gpu_it_says_so(stub, monkeypatch):
    monkeypatch.setattr(tune.timing, "find_gpu", lambda: None)
    done = fusenc()
    assert done.exit_code == 2 and "GPU" in done.output


def test_the_shipped_operations_are_the_ones_that_the_library_asks_for():
    assert set(tune.TUNABLES) == {"ffn_forward", "ffn_output", "ffn_backward"}


WRITER = """
import sys
from pathlib import Path
from fusenc.bench import tune
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    tune.add_choices(Path(sys.argv[1]), {"chip": {f"{sys.argv[2]} {i}": "x"}})
print("done", flush=True)
"""


def start_writer(file, name, count):
    return subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(file), name, str(count)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_writers_at_once_lose_nothing(tmp_path):
    file = tmp_path / "tuned.json"
    writers = [start_writer(file, name, 30) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert tuned.read_table(file)["chip"] == {f"{name} {i}": "x" for name in "ab" for i in range(30)}


def test_a_killed_writer_leaves_a_table_that_can_be_read_and_written(tmp_path):
    file = tmp_path / "tuned.json"
    tune.add_choices(file, {"old": {"kept": "x"}, "many": {str(i): "x" * 20 for i in range(3000)}})
    writers = [start_writer(file, str(n), 10_000) for n in range(3)]
    for n, writer in enumerate(writers):  # one after the other, each killed after another while
        assert writer.stdout.readline() == "ready\n"
        writer.stdin.write("go\n")
        writer.stdin.flush()
        time.sleep(0.15 + 0.037 * n)
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait(10) == -signal.SIGKILL
        assert tuned.read_table(file)["old"] == {"kept": "x"}
    tune.add_choices(file, {"new": {"kept": "x"}})  # the lock died with its holder
    assert {"old", "new", "chip"} <= set(tuned.read_table(file))


def test_killed_between_writing_and_replacing_the_old_table_stays(tmp_path):
    file = tmp_path / "tuned.json"
    tune.add_choices(file, {"old": {"kept": "x"}})
    before = file.read_bytes()
    code = "import os, signal; os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n" + WRITER
    done = subprocess.run([sys.executable, "-P", "-c", code, str(file), "a", "1"], input="go\n", text=True)
    assert done.returncode == -signal.SIGKILL and file.read_bytes() == before


def test_a_corrupted_table_is_replaced(tmp_path):
    file = tmp_path / "tuned.json"
    file.write_text("{")
    tune.add_choices(file, {"new": {"a": "x"}})
    assert json.loads(file.read_text())["choices"] == {"new": {"a": "x"}}
