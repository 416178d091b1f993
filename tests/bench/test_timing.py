"""The clock: what the harness itself costs, and the GPU's code paths with a GPU that is pretended."""

from __future__ import annotations

import contextlib
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from fusenc.bench import cases, measure, timing
from fusenc.bench.cases.case import Case, Inputs

ONES = torch.ones(4)
MILLISECOND = 1e-3
EVENT = 1e-6
"""What an event takes on the GPU that is pretended."""


def spinning(own):
    """A call of a millisecond, which says for itself how long it took."""

    def call():
        start = time.perf_counter()
        while time.perf_counter() - start < MILLISECOND:
            pass
        own.append(time.perf_counter() - start)

    return call


def test_the_harness_adds_less_than_one_percent_to_a_millisecond():
    own = []
    turns = measure.rotating([spinning(own) for _ in range(3)])
    (seconds,) = timing.take_turns({"spin": turns}, timing.Cpu(), 40, calls=2, warm_up=1).values()
    truth = [statistics.mean(own[i : i + 2]) for i in range(2, len(own), 2)]
    added = [measured - true for measured, true in zip(seconds, truth, strict=True)]
    assert 0.0 <= statistics.median(added) < 0.01 * MILLISECOND


def test_a_whole_case_measures_a_millisecond_as_one():
    own = []
    case = Case("stub", "spin", "float32", "forward", lambda: Inputs([]), {"eager": lambda: lambda i: spinning(own)})
    outcome = measure.measure(case, timing.Cpu(), None, measure.Limits(rounds=40))["eager"]
    assert outcome.calls in (1, 2) and len(outcome.seconds) == 40
    each = outcome.calls
    truth = [statistics.mean(own[i : i + each]) for i in range(len(own) - 40 * each, len(own), each)]
    added = [measured - true for measured, true in zip(outcome.seconds, truth, strict=True)]
    assert 0.0 <= statistics.median(added) < 0.01 * MILLISECOND


@pytest.mark.gpu
def test_the_gpu_clock_measures_a_kernel_that_waits():
    gpu, cycles = timing.Gpu(), 2_000_000

    def least(count):
        return min(gpu.seconds(lambda: torch.cuda._sleep(count)) for _ in range(20))

    # Other processes use the GPU meanwhile, which only adds time: so the minimum, and 20 %. Alone it is 2 %.
    assert least(cycles) == pytest.approx(least(10 * cycles) / 10, rel=0.2)


@pytest.mark.gpu
def test_cases_are_measured_on_a_gpu():
    for case in cases.cases(["add_norm", "attention"], {"batch": (4,), "length": (256,)}, timing.Gpu()):
        outcomes = measure.measure(case, timing.Gpu(), ["eager", "sdpa", "fusenc"], measure.Limits(rounds=5))
        assert outcomes["fusenc"].status == "measured", outcomes
        assert outcomes["fusenc"].peak_memory and outcomes["fusenc"].launches


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose tensors live on the CPU, with a clock of its own and a log of what was done in which order."""
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = now[0]
            now[0] += EVENT

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Flush:
        def zero_(self):
            log.append("flush")
            now[0] += 1.0  # what lies before the first event does not count

    class Stub(timing.Gpu):
        where = "cpu"

        def __init__(self):
            super().__init__()
            assert self._flush.numel() == 2 * (50 << 20)
            self._flush = Flush()

    memory = SimpleNamespace(now=1000, peak=0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *index: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(memory, "peak", memory.now))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory.peak)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    monkeypatch.setattr(timing.gpu, "name", lambda index: "NVIDIA H100 80GB HBM3")
    return SimpleNamespace(device=Stub(), log=log, now=now, memory=memory)


def test_each_call_is_timed_between_events_with_cold_caches(gpu):
    def call():
        gpu.log.append("call")
        gpu.now[0] += 5e-6

    assert gpu.device.seconds(call, 2) == pytest.approx(5e-6 + EVENT)
    assert gpu.log == ["flush", "event", "call", "event", "wait"] * 2


def test_with_a_head_start_the_host_has_queued_the_call_before_its_time_begins(gpu):
    gpu.device.head_start = 1e-3
    gpu.device.seconds(lambda: gpu.log.append("call"))
    assert gpu.log == ["flush", f"sleep {timing.CYCLES // 1000}", "event", "call", "event", "wait"]


def test_a_case_takes_the_time_that_it_may(gpu):
    """What a time costs beyond its call counts."""

    def call():
        gpu.log.append("call")
        gpu.now[0] += 1e-6
        return ONES

    case = Case("stub", "brief", "float32", "forward", lambda: Inputs([]), {"fusenc": lambda: lambda inputs: call})
    gpu.device.head_start = 1e-3
    limits = measure.Limits(rounds=60, seconds=0.5, least=20, launches=False)
    outcome = measure.measure(case, gpu.device, None, limits)["fusenc"]
    assert len(outcome.seconds) >= 20 and len(outcome.seconds) * outcome.calls * 1.1e-3 < 1.0 + 1e-9


@pytest.fixture
def graphs(gpu, monkeypatch):
    """CUDA graphs of the GPU that is pretended."""

    class Stream:
        def wait_stream(self, other):
            gpu.log.append("ordered")

    class Graph:
        def replay(self):
            gpu.log.append("replay")

    @contextlib.contextmanager
    def inside(name):
        gpu.log.append(f"{name} begins")
        yield
        gpu.log.append(f"{name} ends")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda of: inside("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", lambda of, pool: inside("capture"))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: gpu.log.append("stream restored"))


def test_a_captured_call_is_replayed(gpu, graphs):
    replayed = gpu.device.captured(lambda: gpu.log.append("call") or ONES)
    warm = ["ordered", "stream begins", *["call"] * 3, "stream ends", "ordered"]
    assert gpu.log == [*warm, "capture begins", "call", "capture ends"]
    assert replayed() is ONES and gpu.log[-1] == "replay" and gpu.log.count("call") == 4


def test_after_a_failed_capture_none_is_tried(gpu, graphs):
    def call():
        gpu.log.append("call")
        if "capture begins" in gpu.log:
            raise ValueError("waits")

    with pytest.raises(ValueError, match="waits"):
        gpu.device.captured(call)
    assert gpu.log[-1] == "stream restored"
    with pytest.raises(RuntimeError, match="an earlier capture failed"):
        gpu.device.captured(call)
    assert gpu.log.count("call") == 4


def test_inputs_take_turns_and_memory_is_counted(gpu):
    made = []

    def make(inputs):
        made.append(inputs)

        def call():
            gpu.log.append(inputs.leaves[0].data_ptr())
            gpu.now[0] += 1e-4
            gpu.memory.peak = gpu.memory.now + 4096
            return inputs.leaves[0] * 2

        return call

    def inputs():
        return Inputs([torch.ones(3)])

    case = Case("stub", "turns", "float32", "forward", inputs, {"fusenc": lambda: make}, reference=lambda: make)
    outcome = measure.measure(case, gpu.device, None, measure.Limits(rounds=6))["fusenc"]
    assert outcome.status == "measured" and outcome.peak_memory == 4096 and outcome.calls == 2
    assert outcome.seconds == pytest.approx([1e-4 + EVENT] * 6)
    turns = [entry for entry in gpu.log if isinstance(entry, int)][-12:]
    assert len(set(turns)) == 3 and turns[:3] == turns[3:6] == turns[6:9]  # three copies, one after the other
    assert len({each.leaves[0].data_ptr() for each in made[-3:]}) == 3
    assert gpu.log[-1] == "emptied"


def test_peaks_are_those_of_exactly_this_board(gpu):
    half, single = gpu.device.peaks("float16"), gpu.device.peaks("float32")
    assert (half.tflops, half.gb_s, single.tflops) == (989.4, 3350.0, 66.9) and "H100 SXM" in half.source
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert gpu.device.peaks("float32") is None and gpu.device.peaks("bfloat16") is not None
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name in ("NVIDIA H100 PCIe", "NVIDIA GB200", "NVIDIA A100-SXM4-40GB", "NVIDIA H200", "NVIDIA RTX A4000"):
        gpu.device.name = name
        assert gpu.device.peaks("float16") is None


def test_the_gpus_default_cases_are_made_without_running_them(gpu):
    found = cases.cases(["all"], {}, gpu.device)
    assert {case.op for case in found} == set(cases.OPS) - {"host"} and not any(case.targets for case in found)
    assert {case.dtype for case in found} == {"float16", "bfloat16"}


def test_a_command_on_a_gpu_measures_all_that_it_reports(gpu, monkeypatch, tmp_path):
    from fusenc.bench import benchmark, results

    monkeypatch.setattr(timing, "find_gpu", lambda: gpu.device)
    of = {"batch": "1", "length": "8", "width": "16", "dtype": "float32", "direction": "forward"}
    asked = benchmark.Asked(["add_norm"], of, "eager,fusenc", "cuda")
    assert benchmark.run(asked, benchmark.Files(json=tmp_path / "out.json"), measure.Limits(3)) == 0
    found = results.load(tmp_path / "out.json")
    assert found.device == "NVIDIA H100 80GB HBM3" and found.peaks["float32"].tflops == 66.9
    assert all(outcome.peak_memory is not None for _, _, outcome in found.rows())


def test_a_wait_ends_calls_for_another_clock(gpu):
    gpu.device.finished(lambda: gpu.log.append("call"))()
    assert gpu.log == ["call", "wait"]
