"""How this folder takes times: calls in turns, on a device's own clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from fusenc.kernels.common import tuned

Call = Callable[[], Any]


class Device(Protocol):
    """What a call runs on, and its clock."""

    name: str

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Time of one call, the mean over `calls` in a row."""


class Cpu:
    """The host, with its monotonic clock."""

    name = "cpu"

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Mean time of some calls in a row, enough to dwarf the clock's own cost."""
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


class Gpu:
    """The current GPU, with times from its own events."""

    def __init__(self) -> None:
        self.name = str(tuned.gpu_name(torch.cuda.current_device()))
        cache = int(getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0))
        # Writing twice the L2 cache's size pushes the operands out, and takes longer than the host needs to launch.
        self._flush = torch.empty(max(2 * cache, 64 << 20), dtype=torch.uint8, device="cuda")

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Mean time of single calls, each between two events and with cold caches."""
        total = 0.0
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            total += 1e-3 * float(start.elapsed_time(end))
        return total / calls


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
