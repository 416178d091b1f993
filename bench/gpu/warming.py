"""Compile in other processes what a part will need, so that its own minutes go into measuring.

Triton and inductor keep what they compiled on the disk, for all processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .. import timing
from ..cases.case import COMPILED, Case
from ..measure import out_of_memory
from . import host, kernels, models, tuning
from .rehearsal import Rehearsal
from .state import Run

MEMORY, BESIDE_TESTS = 0.3, 0.1
"""The largest share of the GPU's memory that one of these processes may take: alone, and beside the tests. All of them
together may ask for more than there is, since few jobs take much; a job that runs out of memory is not done."""

DONE, ERRORS = ".warmed", ".warming.txt"
"""The run's files that say which work was done, and what the processes wrote to stderr."""

Job = Callable[[], object]
LISTS: dict[str, Callable[[timing.Device, bool], list[Case]]] = {
    "host": host.cases, "kernels": kernels.cases, "models": models.cases,
    "kernels compiled": kernels.compiled, "models compiled": models.compiled,
}  # fmt: skip
"""The cases that are measured, in the order in which they are worth compiling; the first word is the part."""


@contextlib.contextmanager
def warming(names: list[str], processes: int, memory: float, run: Run) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside, processes compile for some lists in their order; after it they are ended.

    Args:
        names: keys of `LISTS`, or "tune".
        processes: how many share the work.
        memory: the share of the GPU's memory that each may take.
        run: whose files say which work was done, so that none is done again, and what failed.
    """
    command = [
        sys.executable, "-P", "-m", "fusenc.bench.gpu.warming", *names, "--done", str(run.file(DONE)), "--of",
        str(processes), "--memory", str(memory), *(["--rehearse"] if run.rehearsal else []),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    workers: list[subprocess.Popen[bytes]] = []
    log = run.file(ERRORS)
    try:
        with log.open("ab") as errors:
            for worker in range(processes):
                workers.append(
                    subprocess.Popen([*command, "--worker", str(worker)], stdout=subprocess.DEVNULL, stderr=errors,
                                     env=environment)
                )  # fmt: skip
        yield workers
    finally:
        if failed := sum(bool(each.poll()) for each in workers):
            print(f"{failed} of {processes} processes that compile ended with an error: {log}", flush=True)
        for each in workers:
            each.kill()
        for each in workers:
            each.wait()


def wait(workers: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Until all have ended, at most so long."""
    until = time.monotonic() + seconds
    while any(each.poll() is None for each in workers) and time.monotonic() < until:
        time.sleep(0.1)


def missing(name: str, device: timing.Device, run: Run) -> bool:
    """Whether something of a list has not been compiled."""
    return not {f"{name} {i}" for i in range(len(_jobs(name, device, run.rehearsal)))} <= _lines(run.file(DONE))


def _lines(done: Path) -> set[str]:
    return set(done.read_text(encoding="utf-8").splitlines()) if done.exists() else set()


def _jobs(name: str, device: timing.Device, tiny: bool) -> list[Job]:
    if name == "tune":
        return [lambda make=make: _each_candidate(make) for _, make in tuning.tunables(tiny)]  # type: ignore[misc]
    return [lambda case=case: _each_provider(case) for case in LISTS[name](device, tiny)]  # type: ignore[misc]


def _each_provider(case: Case) -> None:
    """One call of each provider that compiles something."""
    with case.within():
        inputs = case.inputs()
        for name, provider in case.providers.items():
            if name in COMPILED or (name.startswith("fusenc") and name != "fusenc-graph"):
                with _failing():
                    provider()(inputs)()


def _each_candidate(make: tuning.Make) -> None:
    for call in make().candidates.values():
        with _failing():
            call()


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """What fails is left to the part itself, which says why; out of memory ends the job."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise


def main() -> None:
    """One of the processes: every so-many-th piece of work."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--memory", type=float, required=True)
    parser.add_argument("--done", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    parent = os.getppid()
    torch.set_num_threads(1)
    if not asked.rehearse:
        torch.cuda.set_per_process_memory_fraction(asked.memory)
    device: timing.Device = Rehearsal() if asked.rehearse else timing.Gpu()
    before = _lines(asked.done)
    with tuning.on(device):
        jobs = {f"{name} {i}": job for name in asked.names for i, job in enumerate(_jobs(name, device, asked.rehearse))}
        for name in [each for each in jobs if each not in before][asked.worker :: asked.of]:
            done = True
            try:
                jobs[name]()
            except Exception as error:
                traceback.print_exc()
                done = not out_of_memory(error)
            if os.getppid() != parent:
                return
            if done:
                with asked.done.open("a", encoding="utf-8") as out:
                    out.write(f"{name}\n")
            device.release()


if __name__ == "__main__":
    main()
