"""Part 5: `fusenc tune` for the shapes of the other parts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from unittest import mock

import torch
from fusenc.kernels.common import tuned

from .. import tune
from ..measure import first_line
from ..timing import Device
from .clock import Clock
from .state import Run

SHAPES = ((768, 12), (2048, 16))
"""Width and heads: bert-base, and heads of 128."""
ROWS = (4096, 16384, 512, 128)
LENGTHS = (512, 2048, 128)
ATTENTION_ROWS = 16384

Make = Callable[[], tune.Tunable]


def tunables(tiny: bool) -> list[tuple[str, Make]]:
    """What is tuned, in order of value; kernels of a size before the choice between them and another way."""
    if tiny:
        size, names = tune.Size(16, 8, 32, 64, 2), ("attention_forward", "ffn_forward")
        return [_named(name, size, torch.bfloat16) for name in names]
    by_length = [tune.Size(ATTENTION_ROWS, n, w, 4 * w, h) for n in LENGTHS for w, h in SHAPES]
    by_rows = [tune.Size(rows, min(LENGTHS), w, 4 * w, h) for rows in ROWS for w, h in SHAPES[:1]]
    work = []
    for i in range(max(len(by_length), len(by_rows))):
        for name in tune.TUNABLES:
            sizes = by_length if name in tune.BY_LENGTH else by_rows
            if i < len(sizes):
                work.append(_named(name, sizes[i], torch.bfloat16))
    return work


def _named(name: str, size: tune.Size, dtype: torch.dtype) -> tuple[str, Make]:
    return f"{name} {' x '.join(map(str, size))}", functools.partial(tune.TUNABLES[name], size, dtype)


def run(state: Run, clock: Clock, device: Device, left_out: list[str]) -> None:
    """Tune while there is time; each choice is kept at once, in the run's own table, and counts from then on."""
    file = state.file(".tuned.json")
    tune.add_choices(file, {})
    skipped: list[tuple[str, Make]] = []
    first = 1.0 if state.rehearsal else 30.0
    work = clock.fitting("tune", tunables(state.rehearsal), lambda of: of[0].split()[0], lambda of: first, skipped)
    with on(device), mock.patch.dict(os.environ, {tuned.ENVIRONMENT: str(file)}):
        for name, make in work:
            try:
                (measured,) = tune.tune([make], device, file)
                of = measured.tunable
                key = tuned.text_of(of.operation, of.dtype, of.sizes)
                entry = {"winner": measured.winner, "seconds": measured.seconds, "refused": measured.refused}
            except Exception as error:  # the other tunables still serve
                key, entry = name, {"winner": None, "seconds": {}, "refused": {"all": first_line(error)}}
            state.tuned.append({"key": key, **entry})
            state.save()
            print(f"{clock.elapsed() / 60:5.2f} min  {key}: {entry['winner'] or entry['refused']}", flush=True)
            device.release()
    tuned.forget()
    left_out += [name for name, _ in skipped]


def on(device: Device) -> mock._patch[str]:
    """Inside, tensors are made where the device's are."""
    return mock.patch.object(tune, "DEVICE", device.where)
