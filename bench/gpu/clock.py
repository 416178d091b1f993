"""How the minutes are shared out: parts in order of value, and no work that does not fit in what is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

SHARES = {"values": 2.0, "host": 1.0, "kernels": 3.0, "models": 2.0, "tune": 0.0}
"""Minutes of 8. Tuning has what the others leave."""

RESERVE = 4.0
"""Seconds at the end for writing the results."""

RECENT = 3
"""The longest of so many items of a kind is what the next one is expected to take."""


class Clock:
    """The time of one run, by a monotonic clock.

    Args:
        minutes: of the whole run.
        parts: the parts that will run, in this order.
        elapsed: seconds since the process began.
        now: the clock.
    """

    def __init__(
        self, minutes: float, parts: Sequence[str], elapsed: float = 0.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now, self._start = now, now() - elapsed
        self._end = self._start + 60.0 * minutes - RESERVE
        total, before = sum(SHARES[part] for part in parts), 0.0
        self._until: dict[str, float] = {}
        for part in parts:
            before += SHARES[part]
            self._until[part] = self._start + (self._end - self._start) * (before / total if total else 1.0)

    def elapsed(self) -> float:
        """Seconds since the process began."""
        return self._now() - self._start

    def left(self, part: str) -> float:
        """Seconds that a part still has, with what earlier parts left."""
        return max(0.0, self._until[part] - self._now())

    def fitting(
        self, part: str, items: Iterable[Item], kind: Callable[[Item], Hashable], guess: Callable[[Item], float],
        left_out: list[Item],
    ) -> Iterator[Item]:  # fmt: skip
        """The items whose expected time fits in what the part has left.

        Args:
            part: whose time counts.
            items: in order of value.
            kind: items of one kind take about as long as each other.
            guess: seconds that the first of a kind is expected to take.
            left_out: the items that did not fit are appended.
        """
        taken: dict[Hashable, list[float]] = {}
        for item in items:
            recent = taken.setdefault(kind(item), [])
            expected = max(recent[-RECENT:]) if recent else guess(item)
            if expected > self.left(part):
                left_out.append(item)
                continue
            begin = self._now()
            yield item
            recent.append(self._now() - begin)


def age_of_the_process() -> float:
    """Seconds since this process began; where the system does not say, the CPU time it has used."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.process_time()
    return age if 0.0 <= age < 600.0 else time.process_time()
