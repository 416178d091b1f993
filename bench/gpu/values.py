"""Part 1: the tests that matter most, from the checkout, many at once so that their kernels compile in parallel."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .clock import Clock
from .state import CUT, DONE, FAILED, Run

MARKS = ("essential and not gpu", "gpu")
"""The tests of all functions, then those that need a GPU and more of it: a cut leaves the first. Only files that name
the first marker are collected."""

PROCESSES = 12, 4
"""Of each."""

SPARE_CORES = 4
"""For warming what the other parts will compile."""

FIRST_SHARE = 0.75
"""How much of the time the first of `MARKS` may take."""

SAMPLE = 8
"""Tests of each in a rehearsal."""

POLL = 0.3


def run(state: Run, clock: Clock, checkout: Path) -> tuple[str, str]:
    """Run both sets of tests, each result saved as it comes; how the part ended, and why."""
    if not (checkout / "tests" / "conftest.py").is_file():
        return FAILED, f"there are no tests in {checkout}"
    log = state.file(".tests.jsonl")
    log.unlink(missing_ok=True)
    endings = []
    for marks, processes, share in zip(MARKS, PROCESSES, (FIRST_SHARE, 1.0), strict=True):
        until = time.monotonic() + share * clock.left("values")
        endings.append(_pytest(state, marks, processes, until, checkout, log))
    if "" not in endings and not state.tests:
        return FAILED, "; ".join(endings)
    cut = "; ".join(ending for ending in endings if ending)
    return (CUT if cut else DONE), cut


def _pytest(state: Run, marks: str, processes: int, until: float, checkout: Path, log: Path) -> str:
    """Run the tests of some markers; why not all of them ran, or ""."""
    count = max(1, min(processes, (os.cpu_count() or 1) - SPARE_CORES))
    chosen = ["--device", "cpu", "--sample", str(SAMPLE)] if state.rehearsal else ["--device", "cuda"]
    mark = f"mark.{marks.split()[0]}"
    files = [file for file in (checkout / "tests").rglob("test_*.py") if mark in file.read_text(encoding="utf-8")]
    if not files:
        return ""
    # -P: the checkout's folders must not be importable, since a package of another project is named kernels.
    command = [
        sys.executable, "-P", "-m", "pytest", *map(str, sorted(files)), "-m", marks, *chosen, "-q", "--tb=short",
        "-p", "fusenc.bench.gpu.stream", "--stream", str(log.resolve()), "-p", "no:cacheprovider",
        "-n", str(count), "--dist", "load", "--maxschedchunk", "2",
    ]  # fmt: skip
    with state.file(".tests.txt").open("a", encoding="utf-8") as out, _killed_in_the_end(
        subprocess.Popen(command, cwd=checkout, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                         env={**os.environ, "PYTHONSAFEPATH": "1"})
    ) as tests:  # fmt: skip
        while tests.poll() is None and time.monotonic() < until:
            time.sleep(POLL)
            _read(state, log)
        ended = tests.poll()
    _read(state, log)
    if ended is None:
        return f"not all tests marked {marks!r} ran in time"
    return "" if ended in (0, 1) else f"pytest of {marks!r} ended with status {ended}: {_last_line(out.name)}"


@contextlib.contextmanager
def _killed_in_the_end(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """With the processes that it started, whatever happens."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(state: Run, log: Path) -> None:
    """Take over new results and save them; the last line may be half written."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    found = dict(state.tests)
    for line in lines:
        with contextlib.suppress(ValueError):
            of = json.loads(line)
            if found.get(of["test"], {}).get("outcome") != "failed":  # a worker that ends is blamed on its test again
                found[of.pop("test")] = of
    if found != state.tests:
        state.tests = found
        state.save()


def _last_line(path: str) -> str:
    lines = Path(path).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no output"
