"""`fusenc bench compare`: two result files, and which differences are more than chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import intervals
from .measure import ABSENT
from .results import Record, Results, load, ratios, yardstick

FALSE_ALARMS = 0.01
"""The probability that two results of one build show any difference by the chance of their rounds; shared out evenly
among the figures compared (Bonferroni)."""

BETWEEN_RUNS = 0.05
"""What two processes of one build differ by for reasons that stay the same within each: where memory lies, which
core serves, what the clock does. No round sees it, so it is added to the band."""

SAME, FASTER, SLOWER, UNKNOWN, LOST = "same", "faster", "slower", "too few rounds", "without a time now"


@dataclass
class Change:
    """One figure in both files."""

    key: str
    provider: str
    ratio: float
    """Time of the second file over that of the first; where there is a yardstick, in its units."""
    band: tuple[float, float]
    """What the ratio could be by the rounds' spread and `BETWEEN_RUNS`."""
    yardstick: str
    """The provider whose time in the same round is the unit; nothing where seconds are compared."""

    @property
    def verdict(self) -> str:
        """Whether the band leaves out 1."""
        if self.band[0] == 0.0 and math.isinf(self.band[1]):
            return UNKNOWN
        return SLOWER if self.band[0] > 1.0 else FASTER if self.band[1] < 1.0 else SAME


def compare(before: Results, after: Results) -> list[Change]:
    """Every figure that both files have, but for the yardsticks themselves."""
    pairs = list(_pairs(before, after))
    level = 1.0 - FALSE_ALARMS / max(len(pairs), 1)
    changes = []
    for old, new, name in pairs:
        unit = yardstick(old)
        before_in, after_in = ratios(old, name, unit), ratios(new, name, unit)
        if before_in is None or after_in is None:
            unit, a, b = None, old.outcomes[name].seconds, new.outcomes[name].seconds
        else:
            a, b = ([1.0 / ratio for ratio in each] for each in (before_in, after_in))
        ratio, low, high = intervals.of_ratio(a, b, level)
        band = low / (1.0 + BETWEEN_RUNS), high * (1.0 + BETWEEN_RUNS)
        changes.append(Change(old.key, name, ratio, band, unit or ""))
    return changes


def _pairs(before: Results, after: Results) -> Iterator[tuple[Record, Record, str]]:
    later = {record.key: record for record in after.records}
    for old in before.records:
        new = later.get(old.key)
        if new is None:
            continue
        for name, outcome in old.outcomes.items():
            # A yardstick tells what the machine did, not what the build does.
            if name != yardstick(old) and outcome.seconds and name in new.outcomes and new.outcomes[name].seconds:
                yield old, new, name


def lost(before: Results, after: Results) -> list[tuple[str, str, str]]:
    """Case, provider and reason of every time that the second file should have and has not: its values are wrong there,
    it failed, or memory ran out."""
    later = {record.key: record for record in after.records}
    return [
        (old.key, name, f"{now.status}: {now.reason}" if now.reason else now.status)
        for old in before.records
        if old.key in later
        for name, outcome in old.outcomes.items()
        if outcome.seconds and (now := later[old.key].outcomes.get(name)) is not None
        if not now.seconds and now.status != ABSENT
    ]


def run(first: Path, second: Path) -> int:
    """Compare two files and print; the exit status is 1 if anything became slower or has no time any more.

    Raises:
        ValueError: a file that is no result file, or two that have no figure in common.
        OSError: a file that cannot be read.
    """
    before, after = load(first), load(second)
    console = Console()
    console = console if console.is_terminal else Console(width=170)
    for what in sorted({*before.machine, *after.machine}):
        values = [of.machine.get(what, "none") for of in (before, after)]
        if values[0] != values[1]:
            console.print(f"{what}: {values[0]}, then {values[1]}", highlight=False)
    changes, gone = compare(before, after), lost(before, after)
    if not changes and not gone:
        raise ValueError(
            f"nothing to compare: {first} and {second} have no time of the same case and provider in common"
        )
    table = Table("case", "provider", "time then / before", "band", "in units of", "")
    for change in changes:
        style = {SLOWER: "red", FASTER: "green"}.get(change.verdict, "")
        band = f"{change.band[0]:.3f} to {change.band[1]:.3f}"
        cells = (change.key, change.provider, f"{change.ratio:.3f}", band, change.yardstick or "seconds")
        table.add_row(*cells, change.verdict, style=style)
    for key, provider, reason in gone:
        table.add_row(key, provider, "", "", reason, LOST, style="red")
    console.print(table)
    seen = {change.key for change in changes} | {key for key, *_ in gone}
    for file, results in ((first, before), (second, after)):
        alone = [record.key for record in results.records if record.key not in seen]
        if alone:
            console.print(f"Not compared, of {file}: {'; '.join(alone)}", highlight=False)
    counts = {v: sum(c.verdict == v for c in changes) for v in (SLOWER, FASTER, SAME, UNKNOWN)}
    if gone:
        counts[LOST] = len(gone)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    console.print(
        "A difference counts if 1 is outside the band: the Mann-Whitney interval of the ratio, by which two results of "
        f"one build differ anywhere with a probability of at most {FALSE_ALARMS:.0%}, widened by {BETWEEN_RUNS:.0%} "
        "for what differs between processes."
    )
    return 1 if counts[SLOWER] or gone else 0
