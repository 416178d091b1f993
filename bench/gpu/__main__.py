"""`python -m fusenc.bench.gpu`: the parts in order of value, in the minutes given; docs/gpu.md."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .. import environment, timing
from ..cases.case import Case
from ..files import replace
from ..measure import ABSENT, FAILED, WRONG, Limits, measure
from ..results import Record, figures, record
from . import report, state, tuning, values, warming
from .clock import SHARES, Clock, age_of_the_process
from .host import HostClock
from .rehearsal import Rehearsal

LIMITS = Limits(rounds=60, seconds=0.5, least=20, launches=False)
HEAD_STARTS = {"kernels": 1e-3, "tune": 1e-3}
"""Of parts where the GPU's own time counts; in the others the host's counts too, as in a program."""
REHEARSED = Limits(rounds=20, seconds=0.0, least=20, launches=False)
GUESSES = {"host": 2.0, "kernels": 4.0, "models": 8.0, "kernels compiled": 10.0, "models compiled": 30.0}
"""Seconds that the first case of a kind is expected to take."""
WARMING, REHEARSED_WARMING = 0.3, 5.0
"""The share of what is left to a part that compiling in advance may take; in a rehearsal, seconds."""
BUGS = ("NameError", "AttributeError", "TypeError", "KeyError", "IndexError", "ImportError", "ModuleNotFoundError",
        "AssertionError", "UnboundLocalError")  # fmt: skip
"""Exception names that a rehearsal counts as a mistake in this package."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fusenc.bench.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole run, from the start of the process; 8")
    parser.add_argument("--parts", default=",".join(SHARES), help="comma-separated; all if not given")
    parser.add_argument("--out", type=Path, help="the folder of the results; bench/results, or build/gpu-rehearsal")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, with a device that stands for a GPU")
    parser.add_argument("--checkout", type=Path, default=Path(), help="where tests/ is")
    parser.add_argument("--commit", help="of the build, where git cannot tell")
    parser.add_argument("--page", type=Path, help="only write the results in --out into this page")
    asked = parser.parse_args(arguments)
    asked.out = asked.out or Path("build/gpu-rehearsal" if asked.rehearse else "bench/results")
    asked.parts = asked.parts.split(",")
    for part in asked.parts:
        if part not in SHARES:
            parser.error(f"--parts: unknown part {part!r}, expected some of {', '.join(SHARES)}")
    asked.parts.sort(key=list(SHARES).index)
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status is 1 if a part did not run to its end for another reason than time."""
    asked = parse(arguments)
    if asked.page is not None:
        replace(asked.page, report.page(asked.page.read_text(encoding="utf-8"), report.committed(asked.out)))
        return 0
    device: timing.Device | None = Rehearsal() if asked.rehearse else timing.find_gpu()
    if device is None:
        print("fusenc: torch finds no GPU here; --rehearse runs everything on the CPU", file=sys.stderr)
        return 2
    clock = Clock(asked.minutes, asked.parts, age_of_the_process())
    run = state.begin(device, asked.rehearse, asked.minutes, asked.out, asked.commit or environment.commit())
    run.save()
    print(f"{device.name}: results in {run.file('.json')}, {clock.elapsed():.1f} s after the process began", flush=True)
    for suffix in (warming.DONE, warming.ERRORS):
        run.file(suffix).unlink(missing_ok=True)
    try:
        for part in asked.parts:
            _part(run, part, asked, device, clock)
    except BaseException:  # an interrupt, or the end of the time, which may also come between two parts
        for of in run.parts.values():
            if of.state == state.RUNNING:
                of.state, of.reason = state.CUT, "stopped"
        run.save()
        raise
    problems = _problems(run)
    print("\n".join([report.markdown(run), *problems, f"{clock.elapsed() / 60:.2f} of {asked.minutes:g} minutes"]))
    return 1 if problems else 0


def _part(run: state.Run, name: str, asked: argparse.Namespace, device: timing.Device, clock: Clock) -> None:
    """One part, whose failure ends no other."""
    part, begin = run.parts[name], clock.elapsed()
    part.state, device.head_start = state.RUNNING, HEAD_STARTS.get(name, 0.0)
    run.save()
    try:
        if name == "values":
            later = [each for each in warming.LISTS if each.split()[0] in asked.parts]
            beside = warming.warming(later, _spare(), warming.BESIDE_TESTS, run)
            with beside if later else nullcontext():
                part.state, part.reason = values.run(run, clock, asked.checkout.resolve())
        else:
            for work in [each for each in (*warming.LISTS, "tune") if each.split()[0] == name]:
                if warming.missing(work, device, run):
                    with warming.warming([work], _all(), warming.MEMORY, run) as workers:
                        warming.wait(workers, REHEARSED_WARMING if run.rehearsal else WARMING * clock.left(name))
                if name == "tune":
                    tuning.run(run, clock, device, part.left_out)
                else:
                    _cases(run, work, device, clock)
            part.state = state.CUT if part.left_out else state.DONE
    except Exception as error:
        traceback.print_exc()
        part.state, part.reason = state.FAILED, f"{type(error).__name__}: {error}"[:300]
    finally:
        part.seconds = clock.elapsed() - begin
        run.save()


def _cases(run: state.Run, work: str, device: timing.Device, clock: Clock) -> None:
    """Measure a list of cases while there is time, each saved at once."""
    part = work.split()[0]
    clocked = HostClock(device) if part == "host" else device
    left_out: list[Case] = []
    guess = 0.5 if run.rehearsal else GUESSES[work]
    cases = warming.LISTS[work](device, run.rehearsal)
    for case in clock.fitting(part, cases, lambda of: (of.op, of.direction), lambda of: guess, left_out):
        if case.dtype not in run.found.peaks and (peaks := device.peaks(case.dtype)) is not None:
            run.found.peaks[case.dtype] = peaks
        made = record(case, measure(case, clocked, None, REHEARSED if run.rehearsal else LIMITS))
        run.found.records.append(made)
        run.save()
        print(f"{clock.elapsed() / 60:5.2f} min  {made.key}: {_line(run, made)}", flush=True)
    run.parts[part].left_out += [case.key for case in left_out]


def _line(run: state.Run, of: Record) -> str:
    texts = []
    for name, outcome in of.outcomes.items():
        found = figures(run.found, of, name)
        texts.append(f"{name} {1e6 * found.seconds:.4g} us" if found else f"{name} {outcome.status}")
    return ", ".join([*texts, *filter(None, [report.ratio(run, of)])])


def _spare() -> int:
    """Processes beside the tests."""
    return max(1, min(values.SPARE_CORES, (os.cpu_count() or 1) - values.PROCESSES[0]))


def _all() -> int:
    return max(1, min(14, (os.cpu_count() or 1) - 2))


def _problems(run: state.Run) -> list[str]:
    """What is wrong with the run itself; in a rehearsal also what looks like a mistake in what it ran."""
    found = [f"{name}: {part.reason}" for name, part in run.parts.items() if part.state == state.FAILED]
    if run.rehearsal:
        found += [f"{test}: {of['reason']}" for test, of in run.tests.items() if of["outcome"] == "failed"]
        found += [
            f"{of.key}: {name} {outcome.status}: {outcome.reason}"
            for of, name, outcome in run.found.rows()
            if outcome.status == FAILED or (outcome.status in (ABSENT, WRONG) and outcome.reason.startswith(BUGS))
        ]
        found += [
            f"{of['key']}: {reason}" for of in run.tuned for reason in of["refused"].values() if reason.startswith(BUGS)
        ]
        found += [f"{name}: was cut" for name, part in run.parts.items() if part.state == state.CUT]
    return found


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    asked = parse(None)
    # Whatever hangs is ended in time, by a thread that needs no lock of Python's; results are on the disk already.
    faulthandler.dump_traceback_later(max(1.0, 60.0 * asked.minutes - age_of_the_process()), exit=True)
    signal.signal(signal.SIGTERM, _stop)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    torch.set_num_threads(min(torch.get_num_threads(), 8))
    status = main()
    sys.stdout.flush()
    faulthandler.cancel_dump_traceback_later()
    os._exit(status)  # whatever still runs in the interpreter must not hold up a run that ended in time
