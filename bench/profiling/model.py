"""`fusenc profile MODEL`: throughput, operators and advice of one text encoder."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fusenc
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import nn

from .. import environment, timing
from ..checking import DTYPES
from . import flops as counting
from . import report, workload
from .advice import advise
from .operators import profile_sides
from .result import Autocast, Result
from .throughput import Runner, measure
from .workload import Case, ProfileError

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended."""


def run(
    folder: Path | None, text: Path | None, batches: Sequence[int], lengths: Sequence[int], dtype: str, training: bool,
    threads: int | None, rounds: int, out: Path, device: timing.Device | None = None, console: Console | None = None,
) -> int:  # fmt: skip
    """Profile a model, print what was found and write it into a folder.

    Args:
        folder: of the model; the packaged sentence encoder if None.
        text: one sentence a line; Python's documentation if None.
        batches: sizes of batches.
        lengths: of the sequences of dense batches.
        dtype: of the parameters.
        training: a forward and a backward pass instead of inference.
        threads: of torch on the CPU.
        rounds: times taken of each side.
        out: where files are written; made if it is not there.
        device: whose clock counts; this machine's GPU or CPU if None.
        console: where tables are printed.

    Returns:
        The exit status: 1 if a case has no time, 130 after Ctrl-C, else 0.

    Raises:
        ProfileError: the model, the text or a number cannot be used.
        OSError: `out` cannot be written.
    """
    console = report.wide_console(console)
    if dtype not in DTYPES:
        raise ProfileError(f"--dtype: unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    sentences, source = workload.read_text(text)
    model, tokenizer = workload.load_model(folder)
    workload.require_length(model, max(lengths))
    out.mkdir(parents=True, exist_ok=True)
    device = device or timing.find_device()

    unfused = model.to(device.where, DTYPES[dtype])
    fused = copy.deepcopy(unfused)
    fuse_report = fusenc.fuse(fused)
    sides = {"unfused": unfused, "fused": fused} if fuse_report.fused else {"unfused": unfused}
    name = "the packaged all-MiniLM-L6-v2" if folder is None else folder.absolute().name
    result = Result(
        f"{type(model).__name__} ({name})", source, device.name, dtype, training, environment.summary(),
        list(fuse_report.fused), dict(fuse_report.left),
    )  # fmt: skip
    console.print(f"Model: {result.model}, {dtype}, {'training' if training else 'inference'}", highlight=False)
    console.print(f"Text: {len(sentences):,} sentences of {source}", highlight=False)
    console.print(f"Fused: {_fused_text(result)}", highlight=False)
    machine = (f"{key} {value}" for key, value in result.machine.items() if value != "none")
    console.print(f"On: {device.name}; {', '.join(machine)}", highlight=False)

    ragged = [
        workload.ragged_cases(tokenizer, model, sentences, batch, workload.BATCHES * max(batches), device.where)
        for batch in sorted(set(batches))
    ]
    dense = [
        [workload.dense_case(tokenizer, sentences, batch, length, device.where) for batch in sorted(set(batches))]
        for length in sorted(set(lengths))
    ]
    runner = Runner(sides, training)
    try:
        with _progress(console, len(ragged) + len(dense) + 3) as (progress, task):
            _measure_all(result, runner, device, rounds, ragged, dense, out, (progress, task))
    except KeyboardInterrupt:
        result.interrupted = True
    result.advice = advise(result)
    report.print_result(console, result)
    report.write_json(result.as_json(), out / "profile.json")
    columns = {f"{case}, {side}": b for case, by_side in result.operators.items() for side, b in by_side.items()}
    if columns:
        report.plot_operators(columns, out / "operators.svg")
    if result.ragged or result.dense:
        report.plot_throughput(result, out / "throughput.svg")
    console.print(f"Written to {out}; open the traces at https://ui.perfetto.dev", soft_wrap=True, highlight=False)
    return INTERRUPTED if result.interrupted else 1 if result.failed else 0


def _fused_text(result: Result) -> str:
    if not result.fused:
        return f"nothing ({'; '.join(sorted(set(result.left.values())))})"
    left = f", {len(result.left)} left: {'; '.join(sorted(set(result.left.values())))}" if result.left else ""
    return f"{len(result.fused)} modules{left}"


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress, progress.add_task("", total=total)


def _measure_all(
    result: Result, runner: Runner, device: timing.Device, rounds: int, ragged: Sequence[list[Case]],
    dense: Sequence[list[Case]], out: Path, bar: tuple[Progress, TaskID],
) -> None:  # fmt: skip
    """Fill the result, what matters most first, so that Ctrl-C leaves as much as was there."""
    progress, task = bar

    def step(what: str) -> None:
        progress.update(task, description=what, advance=1)

    progress.update(task, description="peak and operations")
    result.peak = device.peaks(result.dtype)
    result.flops = counting.fit(lambda length: _count(runner, length), _step_of(runner))
    for cases in ragged:
        step(f"ragged, batches of {cases[0].batch}")
        result.ragged += measure(cases, runner, device, rounds, result.flops)
    for cases in dense:  # all batch sizes of a length take turns, as do both orders of a text: they are compared
        step(f"dense, length {cases[0].length}")
        result.dense += measure(cases, runner, device, rounds, result.flops)
    step("operators")
    _profile(result, runner, device, {"dense": dense[-1][-1], "ragged": ragged[-1][0]}, out)
    step("bfloat16")
    if result.dtype == "float32" and not result.dense[-1].fault:
        result.autocast = _autocast(runner, dense[-1][-1], device, rounds)
    again = timing.Cpu().peaks(result.dtype) if device.kind == "cpu" else None
    if result.peak is not None and again is not None and again.tflops > result.peak.tflops:
        result.peak = again  # the first time the machine was busier


def _count(runner: Runner, length: int) -> int:
    """Operations of a step of the unfused model on one sequence."""
    place = next(runner.sides["unfused"].parameters()).device
    ids = torch.ones(1, length, dtype=torch.long, device=place)
    return counting.count(lambda: runner.call("unfused", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))


def _step_of(runner: Runner) -> int:
    """A quarter of what a short model takes at most."""
    config: Any = runner.sides["unfused"].config
    longest = getattr(config, "max_position_embeddings", None) or 4 * counting.STEP
    return max(min(counting.STEP, (longest - 2) // 4), 1)


def _profile(result: Result, runner: Runner, device: timing.Device, cases: dict[str, Case], out: Path) -> None:
    for kind, case in cases.items():
        batch = case.batches[0]
        calls = {side: device.finished(functools.partial(runner.call, side, batch)) for side in runner.sides}
        # The traces are of real text: they show the packing too.
        traces = {side: out / f"trace-{side}.json" for side in runner.sides} if kind == "ragged" else {}
        result.operators[kind] = profile_sides(calls, device.kind == "cuda", traces)
        shape = " x ".join(map(str, batch["input_ids"].shape))
        fill = float(batch["attention_mask"].float().mean())
        result.operators_of[kind] = f"one step on {shape} tokens, {fill:.0%} of them real"


def _autocast(runner: Runner, case: Case, device: timing.Device, rounds: int) -> Autocast | None:
    side = list(runner.sides)[-1]
    batch = case.batches[0]
    kind = batch["input_ids"].device.type

    def own() -> None:
        runner.call(side, batch)

    def bfloat16() -> None:
        with torch.autocast(kind, dtype=torch.bfloat16):
            runner.call(side, batch)

    model: nn.Module = runner.sides[side].eval()
    with torch.inference_mode():
        expected = model(**batch).last_hidden_state
        with torch.autocast(kind, dtype=torch.bfloat16):
            got = model(**batch).last_hidden_state
    model.train(runner.training)
    difference = float((got.float() - expected).abs().max() / expected.abs().max())
    rounds_of = timing.take_turns({"own": own, "bfloat16": bfloat16}, device, rounds, warm_up=1)
    return Autocast(side, rounds_of, difference)
