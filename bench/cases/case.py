"""What one measurement compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]


@dataclass
class Case:
    """Two ways to do the same and what their ratio should be."""

    name: str
    theirs: Call
    ours: Call
    calls: int
    """Calls that one measurement averages over: enough to dwarf the clock's own cost."""
    target: float | None
    """The ratio to reach, theirs over ours; below 1 where a bounded cost is the target. None: for information."""
    theirs_is: str
