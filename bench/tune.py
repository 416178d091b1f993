"""`fusenc tune`: measure ways to do the same on this GPU and keep the fastest; docs/tuning.md says how."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from fusenc.kernels.common import device as gpu
from fusenc.kernels.common import tuned
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from . import timing
from .checking import DTYPES, difference
from .files import replace
from .roofline import Shape

Call = Callable[[], Sequence[Tensor]]

ROUNDS = 21
WARM_UP = 3
DEVICE = "cuda"
LOCK_SECONDS = 60.0


class TuneError(Exception):
    """What was asked for cannot be tuned; the message says why."""


@dataclass
class Tunable:
    """One operation at one size and the ways to do it."""

    operation: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    """As the library passes them to `tuned.choice`."""
    candidates: Mapping[str, Call]
    """By the name that `tuned.choice` returns; each gives its results."""
    reference: Call
    """Gives what every candidate's results are compared with."""


@dataclass
class Measured:
    """One tunable's outcome."""

    tunable: Tunable
    seconds: dict[str, float]
    """Medians of the candidates whose results are right."""
    refused: dict[str, str]
    """Why a candidate does not take part."""

    @property
    def winner(self) -> str | None:
        """The fastest candidate, None if all were refused."""
        return min(self.seconds, key=lambda name: self.seconds[name]) if self.seconds else None


def measure(tunable: Tunable, device: timing.Device, rounds: int = ROUNDS) -> Measured:
    """Check the candidates, then time them in turns, so that a slow moment hits all alike."""
    expected = tunable.reference()
    refused: dict[str, str] = {}
    for name, call in tunable.candidates.items():
        try:
            if fault := difference(call(), expected, tunable.dtype):
                refused[name] = fault
        except Exception as error:  # a chip may lack what a candidate needs; the others still serve
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    running = [name for name in tunable.candidates if name not in refused]
    seconds = timing.take_turns({name: tunable.candidates[name] for name in running}, device, rounds, warm_up=WARM_UP)
    return Measured(tunable, {name: statistics.median(taken) for name, taken in seconds.items()}, refused)


class Size(NamedTuple):
    """What is tuned for: tokens in sequences of one length, and a model's widths."""

    rows: int
    length: int
    d_model: int
    hidden: int
    heads: int


def _forced(table: Any, key: Any, call: Call) -> dict[str, Call]:
    """The call with each configuration that a kernel's table knows for the key."""

    def way(config: Any) -> Call:
        def run() -> Sequence[Tensor]:
            with table.forced(config):
                return call()

        return run

    return {name: way(config) for name, config in table.candidates(key).items()}


def _attention_tensors(size: Size, dtype: torch.dtype) -> list[Tensor]:
    head = size.d_model // size.heads
    shape = max(1, size.rows // size.length), size.heads, size.length, head
    return [torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(3)]


def _attention(table: Any, size: Size, dtype: torch.dtype, call: Call, reference: Call) -> Tunable:
    head = max(16, gpu.power_of_2(size.d_model // size.heads))
    key = max(2, dtype.itemsize), head
    return Tunable(table.operation, dtype, (size.length, head), _forced(table, key, call), reference)


def _attention_forward(size: Size, dtype: torch.dtype) -> Tunable:
    from fusenc.kernels import attention
    from fusenc.kernels.attention import configs

    q, k, v = _attention_tensors(size, dtype)
    call = _without_gradients(lambda: attention(q, k, v))
    return _attention(configs.FORWARD, size, dtype, call, _eager(call))


def _attention_gradient(operation: str, size: Size, dtype: torch.dtype) -> Tunable:
    """Of the query alone, or of key and value, so that one kernel does the work."""
    from fusenc.kernels import attention
    from fusenc.kernels.attention import configs

    q, k, v = _attention_tensors(size, dtype)
    table, leaves = (configs.DQ, [q]) if operation == "attention_dq" else (configs.DKDV, [k, v])
    for leaf in leaves:
        leaf.requires_grad_()
    upstream = torch.randn_like(q)
    call = _backward(lambda: attention(q, k, v), leaves, upstream)
    reference = _eager(_backward(lambda: attention(q, k, v), leaves, upstream))
    return _attention(table, size, dtype, call, reference)


def _linear_act(size: Size, dtype: torch.dtype) -> Tunable:
    from fusenc import kernels
    from fusenc.kernels.ffn import configs

    x, w1, b1, _, _ = _ffn_tensors(size, dtype)
    linear_act: Any = kernels.linear_act  # type: ignore[attr-defined]
    call = _without_gradients(lambda: linear_act(x, w1, b1, "gelu", fused=True))
    ways = _forced(configs.FORWARD, (dtype.itemsize, False), call)
    return Tunable("linear_act", dtype, (size.rows, size.hidden, size.d_model), ways, _eager(call))


def _hidden_gradient(size: Size, dtype: torch.dtype) -> Tunable:
    from fusenc import kernels
    from fusenc.kernels.ffn import configs

    leaves = [t.detach().requires_grad_() for t in _ffn_tensors(size, dtype)]
    ffn: Any = kernels.ffn
    upstream = torch.randn(size.rows, size.d_model, dtype=dtype, device=DEVICE)
    needed = leaves[1:3]  # the first product's weight and bias: both need the hidden gradient, no input's product
    call = _backward(lambda: ffn(*leaves, fused=True), needed, upstream)
    ways = _forced(configs.BACKWARD, (dtype.itemsize, False), call)
    reference = _eager(_backward(lambda: ffn(*leaves), needed, upstream))
    return Tunable("hidden_gradient", dtype, (size.rows, size.hidden, size.d_model), ways, reference)


def _ffn_tensors(size: Size, dtype: torch.dtype) -> list[Tensor]:
    rows, _, d_model, hidden, _ = size
    shapes = ((rows, d_model), (hidden, d_model), (hidden,), (d_model, hidden), (d_model,))
    x, w1, b1, w2, b2 = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    return [x, w1 / d_model**0.5, b1, w2 / hidden**0.5, b2]


def _without_gradients(call: Callable[[], Tensor]) -> Call:
    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            return [call()]

    return run


def _backward(call: Callable[[], Tensor], leaves: Sequence[Tensor], upstream: Tensor) -> Call:
    """The backward pass alone: the forward pass happens once, outside what is measured."""
    graph: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        if not graph:
            graph.append(call())
        return torch.autograd.grad(graph[0], list(leaves), upstream, retain_graph=True)

    return run


def _eager(call: Callable[[], Sequence[Tensor]]) -> Call:
    def run() -> Sequence[Tensor]:
        import fusenc

        with fusenc.kernels.use_backend("eager"):
            return call()

    return run


def _ffn_forward(size: Size, dtype: torch.dtype) -> Tunable:
    from fusenc import kernels

    x, w1, b1, _, _ = _ffn_tensors(size, dtype)
    linear_act: Any = kernels.linear_act  # type: ignore[attr-defined]
    ways = {
        name: _without_gradients(lambda fused=name == "fused": linear_act(x, w1, b1, "gelu", fused=fused))  # type: ignore[misc]
        for name in ("fused", "unfused")
    }
    return Tunable("ffn_forward", dtype, (size.rows, size.hidden, size.d_model), ways, _eager(ways["unfused"]))


def _ffn_output(size: Size, dtype: torch.dtype) -> Tunable:
    from fusenc.kernels.ffn import forward

    rows, _, d_model, hidden, _ = size
    residual, _, _, weight, bias = _ffn_tensors(size, dtype)
    activated = torch.randn(rows, hidden, dtype=dtype, device=DEVICE)
    tensors = (activated, weight, bias, residual, None)
    made: Any = {name: forward.output_forward(*tensors, 0.0, name == "fused") for name in ("fused", "unfused")}  # type: ignore[attr-defined]
    ways = {name: _without_gradients(lambda run=run: run(*tensors)) for name, run in made.items()}  # type: ignore[misc]
    reference = _without_gradients(lambda: residual + torch.nn.functional.linear(activated, weight, bias))
    return Tunable("ffn_output", dtype, (rows, d_model, hidden), ways, reference)


def _ffn_backward(size: Size, dtype: torch.dtype) -> Tunable:
    from fusenc import kernels

    rows, _, d_model, hidden, _ = size
    leaves = [t.detach().requires_grad_() for t in _ffn_tensors(size, dtype)]
    ffn: Any = kernels.ffn
    upstream = torch.randn(rows, d_model, dtype=dtype, device=DEVICE)

    def way(fused: bool) -> Call:
        return _backward(lambda: ffn(*leaves, fused=fused), leaves, upstream)

    ways = {name: way(name == "fused") for name in ("fused", "unfused")}
    return Tunable("ffn_backward", dtype, (rows, hidden, d_model), ways, _eager(way(False)))


TUNABLES: dict[str, Callable[[Size, torch.dtype], Tunable]] = {
    "attention_forward": _attention_forward,
    "attention_dq": functools.partial(_attention_gradient, "attention_dq"),
    "attention_dkdv": functools.partial(_attention_gradient, "attention_dkdv"),
    "linear_act": _linear_act,
    "hidden_gradient": _hidden_gradient,
    "ffn_forward": _ffn_forward,
    "ffn_output": _ffn_output,
    "ffn_backward": _ffn_backward,
}
"""What `fusenc tune` knows, by operation: makes one tunable of a size. Configurations of a kernel come before the
choices between it and another way, which then is with the best of them."""

BY_LENGTH = ("attention_forward", "attention_dq", "attention_dkdv")
"""Operations measured for each length; the others for each number of rows."""


def add_choices(file: Path, sections: Mapping[str, Mapping[str, str]]) -> None:
    """Merge choices into a table, which is made if it is not there.

    Under a lock, so that of two writers at once neither loses anything, and by replacing the file as a whole, so that
    a process killed at any moment leaves the old table. One that cannot be read is replaced.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(file.name + ".lock"), timeout=LOCK_SECONDS):
        try:
            merged = tuned.read_table(file)
        except (OSError, ValueError, RecursionError):
            merged = {}
        for section, choices in sections.items():
            merged[section] = {**merged.get(section, {}), **choices}
        table = {"fusenc_table": tuned.VERSION, "choices": merged}
        replace(file, json.dumps(table, indent=1, sort_keys=True) + "\n")


def tune(
    tunables: Iterable[Callable[[], Tunable]], device: timing.Device, file: Path, rounds: int = ROUNDS
) -> Iterator[Measured]:
    """Measure one after the other; each winner is written at once, so that stopping loses none."""
    section = tuned.section_of(device.name)
    for make in tunables:
        measured = measure(make(), device, rounds)
        if measured.winner is not None:
            of = measured.tunable
            add_choices(file, {section: {tuned.text_of(of.operation, of.dtype, of.sizes): measured.winner}})
        tuned.forget()
        yield measured


def run(
    operations: Sequence[str], rows: Sequence[int], lengths: Sequence[int], shape: Shape, dtype: str,
    export: Path | None, reset: bool,
) -> int:  # fmt: skip
    """Tune and print; the exit status is 1 if an operation was left without a choice.

    Raises:
        TuneError: an unknown operation or dtype, a width that is not positive, no GPU, a lock that is not given free.
    """
    for name in operations:
        if name not in TUNABLES:
            raise TuneError(f"unknown operation {name!r}, expected one of {', '.join(TUNABLES)}")
    if dtype not in DTYPES:
        raise TuneError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    widths = shape.d_model, shape.dim_feedforward, shape.nhead
    for option, value in zip(("--d-model", "--hidden", "--nhead"), widths, strict=True):
        if value < 1:
            raise TuneError(f"{option}: expected at least 1, got {value}")
    if shape.d_model % shape.nhead:
        raise TuneError(f"--nhead: expected a divisor of the width {shape.d_model}, got {shape.nhead}")
    device = timing.find_gpu()
    if device is None:
        raise TuneError("tune measures on a GPU, and torch finds none here")
    file = tuned.cache_file()
    if reset:
        file.unlink(missing_ok=True)
        tuned.forget()
    by_length = [Size(max(rows), n, *widths) for n in lengths]
    by_rows = [Size(n, min(lengths), *widths) for n in rows]
    work = [
        functools.partial(make, size, DTYPES[dtype])
        for name, make in TUNABLES.items()
        if not operations or name in operations
        for size in (by_length if name in BY_LENGTH else by_rows)
    ]
    console = Console()
    table = Table("operation", "sizes", "candidate", "median us", "verdict", title=device.name, title_justify="left")
    without_choice = 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(work))
        for measured in tune(work, device, file):
            progress.advance(task)
            without_choice += measured.winner is None
            _add_rows(table, measured)
    console.print(table)
    console.print(f"Written to {file}", soft_wrap=True)
    if export is not None:
        section = tuned.section_of(device.name)
        add_choices(export, {section: tuned.read_table(file).get(section, {}) if file.exists() else {}})
        console.print(f"Written to {export}; {tuned.ENVIRONMENT}={export} makes it count", soft_wrap=True)
    return 1 if without_choice else 0


def _add_rows(table: Table, measured: Measured) -> None:
    of = measured.tunable
    for name in of.candidates:
        if name in measured.refused:
            cells = "", f"[red]refused: {measured.refused[name]}[/red]"
        else:
            cells = f"{1e6 * measured.seconds[name]:.1f}", "chosen" if name == measured.winner else ""
        table.add_row(of.operation, " x ".join(map(str, of.sizes)), name, *cells)
