"""`fusenc tune` with stub operations and a stub clock; its writing with real processes."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fusenc.bench import commands, tune
from fusenc.bench.machine_code.compiling import record_launches
from fusenc.kernels import attention, ffn
from fusenc.kernels.attention import configs as attention_configs
from fusenc.kernels.common import configs, tuned
from fusenc.kernels.ffn import configs as ffn_configs
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
    monkeypatch.setattr(tuned.device, "name", lambda index: Clock.name)
    monkeypatch.delenv(tuned.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tune.timing, "find_gpu", Clock)

    def make(operation):
        return lambda size, dtype: tune.Tunable(
            operation,
            dtype,
            (size.rows, size.d_model, size.hidden),
            {"fused": candidate(2e-6), "unfused": candidate(1e-6)},
            lambda: [ONES],
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
    "length": (["--length", "0"], "--length"),
    "heads": (["--nhead", "7"], "--nhead: expected a divisor of the width 768"),
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


TABLES = (
    attention_configs.FORWARD, attention_configs.DQ, attention_configs.DKDV, ffn_configs.FORWARD, ffn_configs.BACKWARD,
)  # fmt: skip


def test_the_shipped_operations_are_the_ones_that_the_library_asks_for():
    kernels = {table.operation for table in TABLES}
    assert set(tune.TUNABLES) == {"ffn_forward", "ffn_output", "ffn_backward", *kernels}


@pytest.mark.kernel
@pytest.mark.parametrize("operation", tune.TUNABLES)
def test_the_shipped_candidates_are_right(operation, request, monkeypatch):
    """Each runs once on the device of this session, if only to see that it is a way to do the same."""
    device = request.config.getoption("--device")
    if device == "cpu":
        pytest.skip("the ways differ on the kernels alone")
    monkeypatch.setattr(tune, "DEVICE", "cuda" if device == "cuda" else "cpu")
    monkeypatch.setattr(configs, "_STAGES", (2,))
    for table in TABLES:
        monkeypatch.setattr(table, "_candidates", {})
    clock = Clock()
    clock.seconds = lambda call, calls=1: float(len(call()))
    made = tune.TUNABLES[operation](tune.Size(80, 40, 128, 64, 2), torch.float16)
    measured = tune.measure(made, clock, 1)
    assert measured.refused == {} and len(made.candidates) > 1
    assert made.sizes == ((40, 64) if operation.startswith("attention") else made.sizes)


def test_each_number_of_rows_and_each_length_is_measured_once(stub, monkeypatch):
    asked = []

    def make(operation, size, dtype):
        asked.append((operation, size))
        return tune.Tunable(operation, dtype, (size.rows,), {"a": candidate(1e-6)}, lambda: [ONES])

    names = ("linear_act", "attention_dq")
    monkeypatch.setattr(tune, "TUNABLES", {name: functools.partial(make, name) for name in names})
    assert fusenc("--rows", "1024,4096", "--length", "64,128", "--model", "minilm-l6").exit_code == 0
    widths = (384, 1536, 12)
    assert asked == [
        ("linear_act", (1024, 64, *widths)), ("linear_act", (4096, 64, *widths)),
        ("attention_dq", (4096, 64, *widths)), ("attention_dq", (4096, 128, *widths)),
    ]  # fmt: skip


def test_widths_of_a_models_folder(stub, monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setitem(tune.TUNABLES, "one", lambda size, dtype: sizes.append(size) or tunable(a=candidate(1e-6)))
    names = {"dim": 96, "n_heads": 6, "hidden_dim": 200, "n_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(names))
    assert fusenc("one", "--rows", "64", "--model", str(tmp_path)).exit_code == 0
    assert sizes[0][2:] == (96, 200, 6)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 96}))
    done = fusenc("one", "--model", str(tmp_path))
    assert done.exit_code == 2 and "has no layers, nhead, dim_feedforward" in " ".join(done.output.split())


def launched(monkeypatch, operation, choice, call):
    """Block sizes, warps and stages with which a call launches a kernel, where a table says `choice`."""
    monkeypatch.setattr(tuned, "choice", lambda asked, *rest: choice if asked == operation else None)
    with record_launches("sm_80") as launches:
        call()
    (launch,) = [launch for launch in launches if launch.name == f"{operation}_kernel"]
    blocks = launch.constants["S"]._asdict() if "S" in launch.constants else launch.constants
    return blocks["BLOCK_M"], blocks["BLOCK_N"], launch.options["num_warps"], launch.options["num_stages"]


def meta(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta", requires_grad=True)


def attend(**options):
    q = meta(2, 4, 100, 64)
    out = attention(q, q, q, **options)
    out.backward(torch.empty_like(out))


def feed_forward(**options):
    out = ffn(meta(4096, 768), meta(3072, 768), meta(3072), meta(768, 3072), meta(768), fused=True, **options)
    out.backward(torch.empty_like(out))


MASK = torch.ones(2, 1, 1, 100, dtype=torch.bool, device="meta")
APPLIED = {
    "attention_forward": (attend, "128x128x8x4", [{"attn_mask": MASK}, {"dropout_p": 0.1}, {"softcap": 30.0}]),
    "attention_dq": (attend, "64x32x4x3", [{"attn_mask": MASK}, {"dropout_p": 0.1}, {"softcap": 30.0}]),
    "attention_dkdv": (attend, "64x128x8x3", [{"attn_mask": MASK}, {"dropout_p": 0.1}, {"softcap": 30.0}]),
    "hidden_gradient": (feed_forward, "128x128x64x8x2x2", [{"dropout_p": 0.1}]),
}


@pytest.mark.parametrize("operation", APPLIED)
def test_a_measured_configuration_is_launched_where_it_was_measured(monkeypatch, operation):
    """And not where a call has more to hold than the one that was measured, nor if another version wrote the name."""
    call, choice, others = APPLIED[operation]
    usual = launched(monkeypatch, operation, None, call)
    sizes = [int(n) for n in choice.split("x")]
    measured = launched(monkeypatch, operation, choice, call)
    assert measured == (*sizes[:2], *sizes[3 if operation == "hidden_gradient" else 2 :][:2]) != usual
    assert launched(monkeypatch, operation, "8192x4096x64x9", call) == usual
    for options in others:
        usual = launched(monkeypatch, operation, None, lambda options=options: call(**options))
        assert launched(monkeypatch, operation, choice, lambda options=options: call(**options)) == usual


def test_a_forced_configuration_is_launched_until_the_end_of_the_block(monkeypatch):
    usual = launched(monkeypatch, "attention_dq", None, attend)
    with attention_configs.DQ.forced(attention_configs.Config(32, 16, 8, 1)):
        assert launched(monkeypatch, "attention_dq", "64x32x4x3", attend) == (32, 16, 8, 1)
    assert launched(monkeypatch, "attention_dq", None, attend) == usual


def test_a_forced_configuration_is_launched_by_a_backward_pass_though_the_forward_pass_came_before():
    """As `fusenc tune` measures: one forward pass, then the backward pass with each candidate."""
    x, w1, b1, w2, b2 = meta(64, 128), meta(256, 128), meta(256), meta(128, 256), meta(128)
    with record_launches("sm_80") as launches:
        out = ffn(x, w1, b1, w2, b2, fused=True)
        gradients = functools.partial(torch.autograd.grad, out, w1, torch.empty_like(out), retain_graph=True)
        gradients()
        with ffn_configs.BACKWARD.forced(ffn_configs.Config(64, 64, 32, 4, 2)):
            gradients()
    blocks = [launch.constants["BLOCK_M"] for launch in launches if launch.name == "hidden_gradient_kernel"]
    assert blocks == [128, 64]


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
