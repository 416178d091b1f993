"""All that one run of `fusenc profile MODEL` finds out; it fills up as the run goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..timing import Peaks
from .advice import Advice
from .flops import Polynomial
from .operators import Breakdown
from .throughput import Measured, ratio


@dataclass
class Autocast:
    """The largest dense case under autocast to bfloat16, against the same in the model's own dtype."""

    side: str
    rounds: dict[str, list[float]]
    """Seconds, by dtype."""
    difference: float
    """Of hidden states, in units of the largest value."""

    @property
    def ratio(self) -> float:
        """Times as fast."""
        return ratio(self.rounds["own"], self.rounds["bfloat16"])


@dataclass
class Result:
    """One model on one machine."""

    model: str
    text: str
    device: str
    dtype: str
    training: bool
    machine: dict[str, str]
    fused: list[str] = field(default_factory=list)
    """Paths of the modules that run fused."""
    left: dict[str, str] = field(default_factory=dict)
    """Paths of those that could not be, and why."""
    peak: Peaks | None = None
    flops: Polynomial | None = None
    ragged: list[Measured] = field(default_factory=list)
    dense: list[Measured] = field(default_factory=list)
    operators: dict[str, dict[str, Breakdown]] = field(default_factory=dict)
    """By case (``dense``, ``ragged``) and side."""
    operators_of: dict[str, str] = field(default_factory=dict)
    """What each of these cases is."""
    autocast: Autocast | None = None
    advice: list[Advice] = field(default_factory=list)
    interrupted: bool = False

    @property
    def sides(self) -> list[str]:
        """What was measured, in the order of tables."""
        return ["unfused", "fused"] if self.fused else ["unfused"]

    @property
    def failed(self) -> list[Measured]:
        """Cases without a time."""
        return [m for m in (*self.ragged, *self.dense) if m.fault]

    def mfu(self, measured: Measured, side: str) -> float | None:
        """Operations of the real tokens over the peak's (Chowdhery et al., PaLM, 2022, appendix B)."""
        if self.peak is None or measured.useful_flops is None:
            return None
        return measured.useful_flops / measured.seconds(side) / (1e12 * self.peak.tflops)

    def as_json(self) -> dict[str, Any]:
        """All of it, with the figures that follow from it."""
        found = asdict(self)
        for name in ("ragged", "dense"):
            for entry, measured in zip(found[name], getattr(self, name), strict=True):
                sides = [] if measured.fault else self.sides
                entry["tokens_per_second"] = {side: measured.tokens_per_second(side) for side in sides}
                entry["mfu"] = {side: self.mfu(measured, side) for side in sides}
        return found
