"""A device that stands for a GPU: its tensors are on the CPU and its times mean nothing."""

from __future__ import annotations

from .. import timing


class Rehearsal(timing.Cpu):
    """Takes every path of a GPU that a CPU can take."""

    name = "cpu (rehearsal)"
    kind = "cuda"
    least = 0.0
    copies = 2

    def peaks(self, dtype: str) -> timing.Peaks | None:
        """Not known."""
        return None

    def peak_memory(self, call: timing.Call) -> int | None:
        """A number, after the call that a GPU's count takes."""
        call()
        return 1 << 20
