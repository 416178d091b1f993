"""How this folder takes times: calls in turns, on a device's own clock."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from fusenc.kernels.common import device as gpu

from .checking import DTYPES

Call = Callable[[], Any]

CYCLES = 2_000_000_000
"""Clock cycles per second of a fast GPU; `_sleep` counts cycles."""


@dataclass(frozen=True)
class Peaks:
    """What a device can do at best, in one dtype."""

    source: str
    tflops: float
    gb_s: float


class Device(Protocol):
    """What a call runs on, and its clock."""

    name: str
    kind: str
    """``"cpu"`` or ``"cuda"``: whose cases and reports are meant."""
    where: str
    """Where tensors live, as torch calls it."""
    least: float
    """Seconds that one time has to cover, in as many calls as that takes."""
    copies: int
    """Inputs that take turns, so that none is warm."""
    head_start: float
    """Seconds that the device is kept busy before each call, so that what the host takes for the call does not count;
    0: it counts where the device waits for the host."""
    overhead: float
    """About how long taking the time of a call lasts beyond the call, in seconds, without the head start."""

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Time of one call, the mean over `calls` in a row."""

    def peaks(self, dtype: str) -> Peaks | None:
        """What the device can do at best, None if that is not known."""

    def peak_memory(self, call: Call) -> int | None:
        """Bytes that a call allocates beyond what was there before, at most; None if that is not known."""

    def finished(self, call: Call) -> Call:
        """The same call, which returns when all is computed: for a clock that is not the device's."""

    def captured(self, call: Call) -> Call:
        """The same call as one CUDA graph; its results are in the same memory each time."""

    def release(self) -> None:
        """Give back memory that nothing uses any more."""


class Cpu:
    """The host, with its monotonic clock."""

    name = kind = where = "cpu"
    least = 1e-3
    copies = 1
    head_start = overhead = 0.0

    def __init__(self) -> None:
        self._peaks: dict[str, Peaks] = {}

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Mean time of some calls in a row, enough to dwarf the clock's own cost."""
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def peaks(self, dtype: str) -> Peaks | None:
        """The best of some products and copies on this machine, with its threads; no data sheet says it better."""
        if dtype not in self._peaks:
            n, of = 1024, DTYPES[dtype]
            a, b = (torch.randn(n, n).to(of) for _ in range(2))
            source = torch.ones(1 << 24, dtype=torch.float32)  # 64 MiB, more than caches hold
            copy = torch.empty_like(source)
            product = min(self.seconds(lambda: torch.mm(a, b)) for _ in range(6))
            copying = min(self.seconds(lambda: copy.copy_(source)) for _ in range(6))
            moved = 2 * source.numel() * source.element_size()
            text = f"measured: product of {n} x {n} {dtype} matrices, copy of 64 MiB"
            self._peaks[dtype] = Peaks(text, 2e-12 * n**3 / product, 1e-9 * moved / copying)
        return self._peaks[dtype]

    def peak_memory(self, call: Call) -> int | None:
        """Not known: torch counts allocations on GPUs alone."""
        return None

    def finished(self, call: Call) -> Call:
        """The call itself."""
        return call

    def captured(self, call: Call) -> Call:
        """The call itself: a CPU has no graphs."""
        return call

    def release(self) -> None:
        """Nothing to do."""


class Gpu:
    """The current GPU, with times from its own events."""

    kind = where = "cuda"
    least = 2e-4
    copies = 3
    head_start = 0.0
    overhead = 1e-4

    def __init__(self) -> None:
        self._capture_failed = False
        self.name = str(gpu.name(torch.cuda.current_device()))
        cache = int(getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0))
        # Writing twice the L2 cache's size pushes the operands out.
        self._flush = torch.empty(max(2 * cache, 64 << 20), dtype=torch.uint8, device=self.where)

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Mean time of single calls, each between two events and with cold caches."""
        total = 0.0
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            if self.head_start:
                torch.cuda._sleep(int(self.head_start * CYCLES))
            start.record()
            call()
            end.record()
            end.synchronize()
            total += 1e-3 * float(start.elapsed_time(end))
        return total / calls

    def peaks(self, dtype: str) -> Peaks | None:
        """The published peaks of a chip that `chips.toml` knows by the name that torch reports."""
        from .machine_code.chips import reported

        chip = reported(self.name)
        if chip is None:
            return None
        half = DTYPES[dtype].itemsize == 2
        if not half and torch.backends.cuda.matmul.fp32_precision == "tf32":
            return None  # TF32's peak is not in the table
        return Peaks(f"published: {chip.name}", chip.tensor_tflops if half else chip.fp32_tflops, 1e3 * chip.dram_tb_s)

    def peak_memory(self, call: Call) -> int | None:
        """By torch's own count of its allocations."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def finished(self, call: Call) -> Call:
        """With a wait for the GPU at its end."""

        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    def captured(self, call: Call) -> Call:
        """Captured after three calls on another stream, as PyTorch's manual asks for.

        Raises:
            RuntimeError: an earlier capture failed.
        """
        if self._capture_failed:
            raise RuntimeError("an earlier capture failed")
        before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                results = call()
        except Exception:
            self._capture_failed = True
            _leave_capture(before, pool)
            raise

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def release(self) -> None:
        """Empty torch's cache, so that one case's leftovers do not make the next one run out."""
        gc.collect()
        torch.cuda.empty_cache()


def _leave_capture(stream: Any, pool: Any) -> None:
    """Undo what a failed capture leaves behind: torch ends its own state only after the driver ended the capture."""
    torch.cuda.set_stream(stream)
    with contextlib.suppress(Exception):  # else emptying the cache fails; raises where the capture was ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with contextlib.suppress(Exception):  # else random numbers on the GPU fail
        fresh = torch.Generator("cuda").graphsafe_get_state()
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)


def find_gpu() -> Gpu | None:
    """The current GPU, None where there is none."""
    return Gpu() if torch.cuda.is_available() else None


def find_device() -> Device:
    """The current GPU, else the host."""
    return find_gpu() or Cpu()


def take_turns(
    sides: Mapping[str, Call], device: Device, rounds: int, calls: int = 1, warm_up: int = 3
) -> dict[str, list[float]]:
    """Time all sides in each round, in alternating order, so that a slow moment of the machine hits all alike.

    Args:
        sides: what is called, by name.
        device: whose clock counts.
        rounds: times taken of each side.
        calls: calls that one time is the mean of.
        warm_up: rounds before them that do not count.

    Returns:
        Seconds of one call, by side, one for each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(-warm_up, rounds):
            for name in sides if i % 2 else reversed(list(sides)):
                taken = device.seconds(sides[name], calls)
                if i >= 0:
                    seconds[name].append(taken)
    finally:
        if collecting:
            gc.enable()
    return seconds
