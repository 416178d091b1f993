"""The file of a benchmark: what was measured, where and of which commit; JSON whole at every moment, or CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import intervals
from .cases.case import Case
from .measure import MEASURED, STATUSES, Outcome
from .timing import Peaks

VERSION = 2


@dataclass
class Record:
    """One case as measured; the fields are those of `Case`."""

    op: str
    name: str
    dtype: str
    direction: str
    against: list[str]
    targets: dict[str, float]
    flops: float
    bytes: float
    tokens: int
    unchecked: str
    sizes: dict[str, Any]
    outcomes: dict[str, Outcome]

    @property
    def key(self) -> str:
        """Its name among all cases."""
        return f"{self.op}: {self.name}"


@dataclass
class Figures:
    """What a report says of one provider in one case; None where there is nothing to say."""

    seconds: float
    ratio: float | None
    """How many times as fast as the yardstick: the median of the rounds' own ratios."""
    band: tuple[float, float] | None
    """An interval that holds it with a probability of 95 %."""
    tflops: float | None
    gb_s: float | None
    peak: float | None
    """Share of the device's peak FLOP/s."""
    roofline: float | None
    """Share of what the device could reach at this intensity: the longer of the least times for FLOPs and bytes."""
    tokens_s: float | None


@dataclass
class Results:
    """One benchmark."""

    machine: dict[str, str]
    device: str
    peaks: dict[str, Peaks] = field(default_factory=dict)
    """By dtype."""
    records: list[Record] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[Record, str, Outcome]]:
        """Every provider of every case."""
        for record in self.records:
            for name, outcome in record.outcomes.items():
                yield record, name, outcome


def record(case: Case, outcomes: dict[str, Outcome]) -> Record:
    """What is kept of a case."""
    return Record(
        case.op, case.name, case.dtype, case.direction, list(case.against), dict(case.targets), case.flops, case.bytes,
        case.tokens, case.unchecked, dict(case.sizes), outcomes,
    )  # fmt: skip


def yardstick(of: Record) -> str | None:
    """The fastest of those that ratios are taken against; None where none was measured."""
    there = [name for name in of.against if name in of.outcomes and of.outcomes[name].seconds]
    return min(there, key=lambda name: statistics.median(of.outcomes[name].seconds), default=None)


def ratios(of: Record, name: str, against: str | None) -> list[float] | None:
    """How many times as fast as another a provider was, round by round; None where one of them was not measured."""
    ours, theirs = of.outcomes[name].seconds, of.outcomes[against].seconds if against in of.outcomes else []
    return [t / o for t, o in zip(theirs, ours, strict=True)] if ours and theirs else None


def figures(results: Results, of: Record, name: str) -> Figures | None:
    """What a report says; None for a provider that has no time."""
    outcome = of.outcomes[name]
    if outcome.status != MEASURED:
        return None
    seconds = statistics.median(outcome.seconds)
    by_round, peaks = ratios(of, name, yardstick(of)), results.peaks.get(of.dtype)
    tflops = 1e-12 * of.flops / seconds if of.flops else None
    gb_s = 1e-9 * of.bytes / seconds if of.bytes else None
    return Figures(
        seconds,
        None if by_round is None else statistics.median(by_round),
        None if by_round is None else intervals.of_median(by_round),
        tflops,
        gb_s,
        None if peaks is None or tflops is None else tflops / peaks.tflops,
        None if peaks is None or gb_s is None else max((tflops or 0.0) / peaks.tflops, gb_s / peaks.gb_s),
        of.tokens / seconds if of.tokens else None,
    )


REACHED, MISSED, LEVEL = "reached", "missed", "within noise"


def verdict(of: Record, name: str, found: Figures) -> str:
    """Whether a provider reached its target; `LEVEL` where the ratio is below it and its band not; "" without one."""
    if name not in of.targets or found.ratio is None or found.band is None:
        return ""
    target = of.targets[name]
    return REACHED if found.ratio >= target else MISSED if found.band[1] < target else LEVEL


def text(results: Results) -> str:
    """The file, as JSON."""
    return json.dumps(whole(results, [entry(results, of) for of in results.records]), indent=1) + "\n"


def whole(results: Results, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What the file holds.

    Args:
        results: all of them.
        entries: `entry` of each record.
    """
    return {
        "fusenc_bench": VERSION, "machine": results.machine, "device": results.device,
        "peaks": {dtype: asdict(peaks) for dtype, peaks in results.peaks.items()}, "cases": entries,
    }  # fmt: skip


def entry(results: Results, of: Record) -> dict[str, Any]:
    """What the file holds of one case."""
    providers = {}
    for name, outcome in of.outcomes.items():
        found = figures(results, of, name)
        providers[name] = {**asdict(outcome), "figures": None if found is None else asdict(found)}
    return {**{k: v for k, v in vars(of).items() if k != "outcomes"}, "providers": providers}


def load(file: Path) -> Results:
    """Read a file that holds `text`.

    Raises:
        ValueError: it is not one, or of another version.
        OSError: it cannot be read.
    """
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        if whole["fusenc_bench"] != VERSION:
            raise ValueError(f"{file} is of version {whole['fusenc_bench']}, expected {VERSION}")
        peaks = {dtype: Peaks(**fields) for dtype, fields in whole["peaks"].items()}
        results = Results(whole["machine"], whole["device"], peaks)
        for case in whole["cases"]:
            providers = case.pop("providers")
            outcomes = {n: Outcome(**{k: v for k, v in p.items() if k != "figures"}) for n, p in providers.items()}
            results.records.append(Record(**case, outcomes=outcomes))
        sound = _sound(results)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
        sound = False
    if not sound:
        raise ValueError(f"{file} is no result file of fusenc bench")
    return results


def _sound(results: Results) -> bool:
    """Whether what a file said is what `text` writes: times that are ones, as many of each provider of a case."""
    texts = [results.device, *results.machine, *results.machine.values()]
    for of in results.records:
        texts += [of.op, of.name, of.dtype, of.direction, *of.against, *of.targets]
        for outcome in of.outcomes.values():
            times = outcome.seconds
            if outcome.status not in STATUSES or (outcome.status == MEASURED) != bool(times):
                return False
            if not all(isinstance(t, float) and math.isfinite(t) and t > 0.0 for t in times):
                return False
        if len({len(outcome.seconds) for outcome in of.outcomes.values() if outcome.seconds}) > 1:
            return False
    return all(isinstance(text, str) for text in texts)


def table(results: Results) -> str:
    """The same as CSV, a line for each provider of each case."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    columns = ("op", "case", "dtype", "direction", "provider", "status", "reason", "median_us", "rounds", "calls",
               "times_as_fast", "at_least", "at_most", "against", "target", "tflop_s", "gb_s", "share_of_peak",
               "share_of_roofline", "tokens_s", "peak_memory_bytes", "kept", "launches")  # fmt: skip
    lines.writerow((*columns, *results.machine))
    for of, name, outcome in results.rows():
        found = figures(results, of, name)
        numbers: tuple[Any, ...] = (None,) * 4
        rates: tuple[Any, ...] = (None,) * 5
        if found is not None:
            band = found.band or (None, None)
            numbers = (f"{1e6 * found.seconds:.3f}", found.ratio, *band)
            rates = (found.tflops, found.gb_s, found.peak, found.roofline, found.tokens_s)
        lines.writerow(
            (of.op, of.name, of.dtype, of.direction, name, outcome.status, outcome.reason, numbers[0],
             len(outcome.seconds), outcome.calls, *numbers[1:], yardstick(of), of.targets.get(name), *rates,
             outcome.peak_memory, outcome.kept, outcome.launches, *results.machine.values())
        )  # fmt: skip
    return out.getvalue()
