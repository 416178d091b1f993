"""What a run has found so far, and the files that hold it: whole at every moment."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import environment, results
from ..files import replace
from ..timing import Device
from .clock import SHARES

NOT_STARTED, RUNNING, DONE, CUT, FAILED = "not started", "running", "done", "cut", "failed"


@dataclass
class Part:
    """How far a part came."""

    state: str = NOT_STARTED
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list)
    """What there was no time for."""
    reason: str = ""


@dataclass
class Run:
    """One run of the command.

    The file is a result file of `fusenc bench`, which `fusenc bench compare` reads, with one key more.
    """

    found: results.Results
    rehearsal: bool
    minutes: float
    stem: Path
    """The files' path, without what follows the name."""
    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in SHARES})
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By node id: outcome, seconds and, of a failure, the reason."""
    tuned: list[dict[str, Any]] = field(default_factory=list)
    _entries: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """What the file holds of each case, which no longer changes."""

    def file(self, suffix: str) -> Path:
        """A file of this run."""
        return self.stem.with_name(self.stem.name + suffix)

    def text(self) -> str:
        """All of it, as JSON."""
        own = {
            "rehearsal": self.rehearsal, "minutes": self.minutes,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "tests": self.tests, "tuned": self.tuned,
        }  # fmt: skip
        for of in self.found.records:
            if of.key not in self._entries:
                self._entries[of.key] = results.entry(self.found, of)
        return json.dumps({**results.whole(self.found, list(self._entries.values())), "gpu": own}) + "\n"

    def save(self) -> None:
        """Write the JSON and the table."""
        from .report import markdown

        replace(self.file(".json"), self.text())
        replace(self.file(".md"), markdown(self))


def load(file: Path) -> Run:
    """Read a file that `Run.save` wrote.

    Raises:
        ValueError: it is another file.
        OSError: it cannot be read.
    """
    found = results.load(file)
    try:
        own = json.loads(file.read_text(encoding="utf-8"))["gpu"]
        parts = {name: Part(**fields) for name, fields in own["parts"].items()}
        return Run(found, own["rehearsal"], own["minutes"], file.with_suffix(""), parts, own["tests"], own["tuned"])
    except (KeyError, TypeError):
        raise ValueError(f"{file} is no result file of the GPU run") from None


def begin(device: Device, rehearsal: bool, minutes: float, out: Path, commit: str | None) -> Run:
    """A run without results; its folder is made.

    Files of a GPU are named after GPU and date, so that the folder can be committed; a rehearsal's are not.
    """
    now = datetime.datetime.now(datetime.UTC)
    slug = "rehearsal" if rehearsal else re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    stem = out / slug / ("last" if rehearsal else f"{now:%Y-%m-%d-%H%M}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        **environment.summary(), **_chip(), "cuda": str(torch.version.cuda or "none"),
        **{name: environment.version(name) for name in ("triton", "transformers")},
        "date": f"{now:%Y-%m-%d %H:%M} UTC", "minutes": f"{minutes:g}",
    }  # fmt: skip
    if commit:
        machine["commit"] = commit
    if rehearsal:
        machine["gpu"] = "none (rehearsal)"
    return Run(results.Results(machine, device.name), rehearsal, minutes, stem)


_ASKED = {"driver_version": "driver", "clocks.sm": "clock now", "clocks.max.sm": "clock at most",
          "clocks.mem": "memory clock", "power.limit": "power limit"}  # fmt: skip


def _chip() -> dict[str, str]:
    """What the driver says of torch's current GPU; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    asked = "0" if uuid is None else f"GPU-{uuid}"  # the driver's numbers are not those of CUDA_VISIBLE_DEVICES
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", f"--id={asked}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_ASKED.values(), (value.strip() for value in answer.strip().split(",")), strict=False))
