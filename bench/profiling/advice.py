"""What a profile says to do, each line with the figures that it rests on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .operators import OUTSIDE, Breakdown
from .throughput import Measured, ratio

if TYPE_CHECKING:
    from .result import Autocast, Result

WORTH = 1.05
"""Times as fast from which on a change is worth making: less is hard to tell from a machine's noise."""

UNCHANGED = ("matrix products", "optimiser", "data loading")
"""Whose time fusing does not change."""

LEAST_ROUNDS = 3
SPREAD = 0.1
"""Between the quartiles of a case's rounds, from which on the machine is called noisy."""

HOST_SHARE = 0.2
"""Of a step outside operators from which on it is mentioned."""


@dataclass
class Advice:
    """One piece of advice, or the finding that nothing is to be done."""

    subject: str
    do: bool
    """Whether something is to be changed."""
    text: str
    figures: dict[str, float] = field(default_factory=dict)


def advise(result: Result) -> list[Advice]:
    """All that can be said of what was measured."""
    ragged, dense = ([m for m in measured if not m.fault] for measured in (result.ragged, result.dense))
    found = [on_fusing(dense, ragged, result.left)] if dense or ragged else []
    if "dense" in result.operators:
        unfused = result.operators["dense"]["unfused"]
        found += [*on_limits(unfused), *on_host(unfused)]
    if ragged:
        found.append(on_padding(ragged))
    if dense:
        found.append(on_batches(dense, "fused" if result.fused else "unfused"))
    if result.autocast is not None:
        found.append(on_dtype(result.autocast, result.dtype))
    found += on_noise([*dense, *ragged])
    if found and not any(advice.do for advice in found):
        gain = 100 * (WORTH - 1)
        found.append(Advice("all in all", False, f"nothing here is worth a change (none gives {gain:.0f} % or more)"))
    return found


def on_noise(measured: Sequence[Measured]) -> list[Advice]:
    """Whether the rounds of a case agree, without which the other figures say little."""
    rounds = [list(m.rounds.values()) for m in measured if m.rounds]
    if not rounds:
        return []
    if len(rounds[0][0]) < LEAST_ROUNDS:
        text = f"fewer than {LEAST_ROUNDS} rounds: no telling a gain from noise"
        return [Advice("noise", False, text, {"rounds": float(len(rounds[0][0]))})]
    spreads = []
    for first, *others in rounds:
        # Of two sides their ratio, in which what slows both down cancels.
        of = [a / b for a, b in zip(first, others[0], strict=True)] if others else first
        lower, middle, upper = statistics.quantiles(of, n=4, method="inclusive")
        spreads.append((upper - lower) / middle)
    spread = statistics.median(spreads)
    if spread < SPREAD:
        return []
    text = (
        f"half of a case's rounds lie {spread:.0%} apart: take smaller gains for noise, or measure again at a quiet "
        "moment or with more --rounds"
    )
    return [Advice("noise", False, text, {"spread": spread})]


def on_fusing(dense: Sequence[Measured], ragged: Sequence[Measured], left: Mapping[str, str]) -> Advice:
    """Whether `fusenc.fuse` pays."""
    if not any("fused" in m.rounds for m in (*dense, *ragged)):
        reasons = "; ".join(sorted(set(left.values())))
        return Advice("fuse", False, f"nothing in this model can be fused: {reasons}")
    figures, parts = {}, []
    for name, cases in (("ragged", [m for m in ragged if m.order == "random"]), ("dense", dense)):
        if cases:
            figures[name] = statistics.median(ratio(m.rounds["unfused"], m.rounds["fused"]) for m in cases)
            parts.append(f"{figures[name]:.2f} times as fast on {_KINDS[name]}")
    measured = ", ".join(parts)
    if max(figures.values()) < WORTH:
        return Advice("fuse", False, f"fusing changes too little here: {measured}", figures)
    text = f"call fusenc.fuse(model): {measured}"
    if min(figures.values()) < 1 / WORTH:
        slow = min(figures, key=lambda name: figures[name])
        text += f"; not if all you run is {_KINDS[slow]}"
    return Advice("fuse", True, text, figures)


_KINDS = {"ragged": "this text in batches as it comes", "dense": "batches without padding"}


def on_limits(breakdown: Breakdown, of: str = "an unfused step") -> list[Advice]:
    """What bounds any gain from fusion where nothing is padded (Amdahl's law)."""
    shares = {category: breakdown.share(category) for category in UNCHANGED if breakdown.share(category)}
    if not shares:
        return []
    bound = 1 / sum(shares.values())
    parts = ", ".join(f"{category} {share:.0%}" for category, share in shares.items())
    text = (
        f"fusing leaves some of {of} as it is ({parts}): without padding to leave out it cannot give more than "
        f"{bound:.2f} times"
    )
    return [Advice("limit", False, text, {**shares, "bound": bound})]


def on_host(breakdown: Breakdown, of: str = "an unfused step") -> list[Advice]:
    """Whether the host is what limits: Python, or the loading of data."""
    found = []
    for category, cause, remedy in (
        (OUTSIDE, "passes outside operators (Python, waiting, the profiler)", "larger batches dilute that"),
        ("data loading", "goes into loading data", "give the DataLoader workers"),
    ):
        share = breakdown.share(category)
        if share >= HOST_SHARE:
            found.append(Advice("host", True, f"{share:.0%} of {of} {cause}: {remedy}", {"share": share}))
    return found


def on_padding(ragged: Sequence[Measured]) -> Advice:
    """Whether to leave padding out by fusing, to sort by length before batching, or both; at the largest batch size."""
    batch = max(m.batch for m in ragged)
    by_order = {m.order: m for m in ragged if m.batch == batch}
    random, by_length = by_order.get("random"), by_order.get("sorted")
    if random is None or by_length is None:
        return Advice("padding", False, "not known: one of the two orders failed")
    wasted = 1 - random.tokens / random.positions
    figures = {"padding": wasted}
    if wasted < 1 - 1 / WORTH:
        return Advice("padding", False, f"padding is only {wasted:.1%} of the positions: nothing to save", figures)
    ways = {"sort by length": ("unfused", by_length)}
    if "fused" in random.rounds:
        ways = {"fuse": ("fused", random), **ways, "fuse and sort by length": ("fused", by_length)}
    gains = {way: ratio(random.rounds["unfused"], m.rounds[side]) for way, (side, m) in ways.items()}
    figures |= gains
    # The first way, the least work for the user, that comes within the noise of the best.
    best = next(way for way in gains if gains[way] * WORTH >= max(gains.values()))
    measured = ", ".join(f"{way} {gain:.2f}" for way, gain in gains.items())
    expected = ""
    if random.padded_flops and by_length.padded_flops and random.useful_flops:
        figures["sorting by operations"] = random.padded_flops / by_length.padded_flops
        figures["no padding by operations"] = random.padded_flops / random.useful_flops
        expected = (
            f"; by operations sorting would give {figures['sorting by operations']:.2f} and leaving all padding out "
            f"{figures['no padding by operations']:.2f}"
        )
    text = (
        f"{wasted:.0%} of the positions are padding at batches of {batch}. Times as fast as unfused in random order: "
        f"{measured}{expected}"
    )
    if gains[best] < WORTH:
        return Advice("padding", False, f"no way of saving it pays: {text}", figures)
    return Advice("padding", True, f"{best}: {text}", figures)


def on_batches(dense: Sequence[Measured], side: str) -> Advice:
    """Whether a larger batch gives more tokens a second, or a smaller one as many; at the greatest length."""
    length = max(m.length or 0 for m in dense)
    cases = sorted((m for m in dense if m.length == length), key=lambda m: m.batch)
    rates = {m.batch: m.tokens_per_second(side) for m in cases}
    figures = {str(batch): rate for batch, rate in rates.items()}
    if len(rates) < 2:
        return Advice("batch", False, "one batch size says nothing about others: give --batch two or more", figures)
    *_, second, last = rates
    before, after = cases[-2:]
    growth = after.tokens / before.tokens * ratio(before.rounds[side], after.rounds[side])
    at = f"at length {length} batches of {last} give {growth:.2f} times the tokens a second of batches of {second}"
    if growth >= WORTH:
        return Advice("batch", True, f"take {last} or more: {at}, still growing", figures)
    best = max(rates.values())
    least = next(batch for batch, rate in rates.items() if rate * WORTH >= best)
    if growth <= 1 / WORTH:
        return Advice("batch", True, f"take {least}: {at}, past the best", figures)
    return Advice("batch", False, f"{least} is enough: {at}", figures)


def on_dtype(autocast: Autocast, dtype: str) -> Advice:
    """Whether autocast to bfloat16 pays, and what it changes."""
    figures = {"ratio": autocast.ratio, "difference": autocast.difference}
    at = (
        f"autocast to bfloat16 is {autocast.ratio:.2f} times as fast as {dtype} ({autocast.side}, dense), and hidden "
        f"states differ by up to {autocast.difference:.1e} of the largest"
    )
    if autocast.ratio >= WORTH:
        return Advice("dtype", True, f"try bfloat16: {at}", figures)
    return Advice("dtype", False, f"stay with {dtype}: {at}", figures)
