"""Check and time one case: every provider in turns, on the device's own clock, and none whose values are wrong."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fusenc.kernels.common import device as gpu
from torch import Tensor

from . import timing
from .cases.case import COMPILED, AbsentError, Call, Case, Inputs, Maker, flat
from .checking import DTYPES, difference, errors
from .kept import kept_bytes

LEAST_ROUNDS = 11
"""What the time for a case may not cut: with fewer, no difference between two runs can be told from chance."""

JUDGED, LEAST_ERROR = 3.0, 1.0
"""The largest error of a result, as a multiple of the judge's error; and the smallest error that a judge is taken to
have, in units of `checking.difference`."""

MOST_OF_A_ROUND = 0.05
"""Seconds that a round should not exceed for the sake of many calls in each time."""

MEASURED, ABSENT, WRONG, MEMORY, FAILED = "measured", "absent", "wrong values", "out of memory", "failed"
STATUSES = (MEASURED, ABSENT, WRONG, MEMORY, FAILED)


@dataclass
class Outcome:
    """What came of one provider in one case."""

    status: str
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    """Of one call, by round; rounds of one case go together across its providers."""
    calls: int = 0
    """That each of them is the mean of."""
    peak_memory: int | None = None
    """Bytes."""
    launches: int | None = None
    kept: float | None = None
    """What a call keeps for its backward pass, in the case's unit."""


@dataclass
class Limits:
    """How long one may measure."""

    rounds: int = 100
    seconds: float = 4.0
    """Of one case; it cuts the rounds, down to `least`."""
    least: int = LEAST_ROUNDS
    launches: bool = True
    """Whether kernels are counted."""


def chosen(case: Case, device: timing.Device, wanted: Sequence[str] | None) -> list[str]:
    """The providers of a case that are to be tried."""
    if wanted is None:
        return [name for name in case.providers if device.kind != "cpu" or name not in COMPILED]
    return [name for name in case.providers if name in wanted]


def measure(case: Case, device: timing.Device, wanted: Sequence[str] | None, limits: Limits) -> dict[str, Outcome]:
    """Outcomes by provider, in the case's order.

    A provider that raises ends its own part alone; out of memory is one way to end.

    Args:
        case: what is measured.
        device: where its tensors are, and whose clock counts.
        wanted: providers to try; None for all, but on a CPU none of those that compile for minutes.
        limits: how long.
    """
    names = chosen(case, device, wanted)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # its limit on compiling anew counts over all cases
    outcomes: dict[str, Outcome] = {}
    with case.within():
        try:
            _time(case, checked(case, device, names, outcomes), device, limits, outcomes)
        except Exception as error:  # inputs or reference that do not fit, or do not run
            status = MEMORY if out_of_memory(error) else FAILED
            outcomes |= {n: Outcome(status, first_line(error)) for n in names if n not in outcomes}
    device.release()
    return {name: outcomes[name] for name in names}


def checked(case: Case, device: timing.Device, names: Sequence[str], outcomes: dict[str, Outcome]) -> dict[str, Call]:
    """The calls of those providers whose values are right; what the others came to goes into `outcomes`."""
    inputs = case.inputs()
    makers: dict[str, Maker] = {}
    for name in names:
        with _ending(name, outcomes):
            makers[name] = case.providers[name]()
    expected = None
    if case.reference is not None and makers:
        expected = _view(case, "reference", case.reference()(inputs.to(torch.float64))())
    allowed = case.tolerance if expected is None or case.judge is None else _judged(case, inputs, expected)
    copies = [inputs, *(inputs.copy() for _ in range(device.copies - 1))]
    sides: dict[str, Call] = {}
    for name, make in makers.items():
        with _ending(name, outcomes):
            calls = [make(copy) for copy in copies]
            results = _view(case, name, calls[0]())
            wrong = "" if expected is None else difference(results, expected, DTYPES[case.dtype], allowed)
            if wrong:
                outcomes[name] = Outcome(WRONG, wrong)
            else:
                sides[name] = rotating(calls)
    return sides


def _judged(case: Case, inputs: Inputs, expected: list[Tensor | None]) -> list[float]:
    """The difference that each result may have: a multiple of the judge's.

    The judge may be right by chance in one of many results, so its median error counts for each of them.
    """
    assert case.judge is not None
    found = errors(_view(case, "reference", case.judge()(inputs)()), expected, DTYPES[case.dtype])
    least = max(LEAST_ERROR, statistics.median(found))
    return [min(case.tolerance, JUDGED * max(error, least)) for error in found]


def _time(
    case: Case, sides: dict[str, Call], device: timing.Device, limits: Limits, outcomes: dict[str, Outcome]
) -> None:  # fmt: skip
    for name, call in sides.items():
        with _ending(name, outcomes):
            outcomes[name] = Outcome(MEASURED, peak_memory=device.peak_memory(call))
            outcomes[name].launches = _launches(name, call, device) if limits.launches else None
            outcomes[name].kept = _kept(case, name, call, device)
    sides = {name: call for name, call in sides.items() if outcomes[name].status == MEASURED}
    if not sides:
        return
    try:
        once = {name: _once(call, device) for name, call in sides.items()}
        turn = sum(once.values()) + len(once) * (device.overhead + device.head_start)
        calls = max(1, min(math.ceil(device.least / min(once.values())), int(MOST_OF_A_ROUND / turn)))
        rounds = min(limits.rounds, max(limits.least, int(limits.seconds / (turn * calls))))
        seconds = timing.take_turns(sides, device, rounds, calls, warm_up=1)
    except BaseException:  # which of them it was is not known
        for name in sides:
            del outcomes[name]
        raise
    for name, taken in seconds.items():
        outcomes[name].seconds, outcomes[name].calls = taken, calls


def _once(call: Call, device: timing.Device) -> float:
    """About how long a call takes; of two, where that is cheap, since one may fall into a slow moment."""
    seconds = device.seconds(call)
    return seconds if seconds > MOST_OF_A_ROUND else min(seconds, device.seconds(call))


def rotating(calls: Sequence[Call]) -> Call:
    """One call after the other, from the first again after the last."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _view(case: Case, name: str, results: object) -> list[Tensor | None]:
    found = flat(results)
    return case.views[name](found) if name in case.views else found


@contextlib.contextmanager
def _ending(name: str, outcomes: dict[str, Outcome]) -> Iterator[None]:
    """What a provider raises becomes its outcome: only this library has to run everywhere."""
    try:
        yield
    except AbsentError as absent:
        outcomes[name] = Outcome(ABSENT, str(absent))
    except Exception as error:
        ours = name.startswith("fusenc")
        status = MEMORY if out_of_memory(error) else FAILED if ours else ABSENT
        outcomes[name] = Outcome(status, first_line(error))


def first_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def out_of_memory(error: Exception) -> bool:
    """True if an error says that memory did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@functools.cache
def _counts_launches() -> bool:
    return importlib.util.find_spec("triton") is not None


def _launches(name: str, call: Call, device: timing.Device) -> int | None:
    """Kernels of one call as on a GPU; None where compiled code hides them."""
    if name in COMPILED or not _counts_launches():
        return None
    from .launches import count_call

    return count_call(call, gpu.architecture(0) if device.kind == "cuda" else "")


def _kept(case: Case, name: str, call: Call, device: timing.Device) -> float | None:
    """What a forward and backward pass keeps in between, on a CPU as on a GPU; None where compiled code hides it."""
    if not case.kept_unit or case.direction != "both" or name in COMPILED:
        return None
    as_on_a_gpu: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if device.kind != "cuda":
        if not _counts_launches():
            return None
        from .machine_code.compiling import record_launches

        as_on_a_gpu = record_launches()
    with as_on_a_gpu:
        return kept_bytes(call) / case.kept_unit
