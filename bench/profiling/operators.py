"""Where the time of a step goes: torch.profiler's events, each counted once, in a few categories."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 3
"""Steps profiled of each side; the quickest, which other programs disturbed least, counts."""

ELEMENTWISE = (
    "abs add addcdiv addcmul all amax amin any arange argmax bitwise_and bitwise_not bitwise_or clamp clamp_min cos "
    "cumsum div eq exp fill full ge gt isinf isnan isneginf le lerp log log_softmax log_softmax_backward_data "
    "logical_and logical_not logical_or lt masked_fill max maximum mean min minimum mul ne neg nll_loss "
    "nll_loss_backward nll_loss_forward norm ones pow reciprocal rsqrt rsub sin sqrt square std sub sum tril triu var "
    "where zero zeros"
)

_SOME_NAMES = {
    "optimiser": r"^optimizer\.|multi_tensor_apply",
    "data loading": r"^enumerate\(dataloader\)",
    "embedding": r"embedding|embed_norm|segment_(sums|joins)",
    "attention": r"scaled_dot_product|(?<!log_)(?<!log)softmax|bmm|flash|fmha|attention|delta_kernel|rotary",
    "matrix products": (
        r"linear|addmm|addmv|\bmm\b|\bmv\b|conv(?!ert)|gemm|gemv|cutlass|xmma|cublas|nvjet|cijk_|splitk|"
        r"hidden_gradient|output_gradient|whole_ffn"
    ),
    "normalisation": r"(layer|rms|group|batch|add)_?norm|gammabeta",
    "dropout": r"dropout|bernoulli|philox|\brandom_|randint|masked_scale|distribution_elementwise",
    "activation": r"gelu|relu|silu|sigmoid|tanh|activation",
    "copies and packing": (
        r"copy|clone|contiguous|index|gather|scatter|\bcat\b|catarray|\bpad\b|constant_pad|split|nonzero|sort|unique|"
        r"repeat|roll|memcpy|^to$|nested|jagged"
    ),
    "elementwise and sums": (
        rf"^_*(foreach_)?({'|'.join(ELEMENTWISE.split())})_*$|elementwise|reduce_kernel|memset|column_sums"
    ),
}  # fmt: skip
_RULES = {category: re.compile(pattern) for category, pattern in _SOME_NAMES.items()}

OTHER = "other operators"
"""Views, allocation, what autograd does itself."""
OUTSIDE = "outside operators"
"""What is left of the step's time: on a CPU Python and the profiler, on a GPU its idle time."""

CATEGORIES = (
    "matrix products", "attention", "normalisation", "activation", "dropout", "embedding", "copies and packing",
    "elementwise and sums", "optimiser", "data loading", OTHER, OUTSIDE,
)  # fmt: skip
"""In the order in which tables and bars show them."""


@dataclass
class Operator:
    """All calls of one name in one category."""

    name: str
    category: str
    calls: int
    seconds: float


@dataclass
class Breakdown:
    """One step."""

    seconds: float
    categories: dict[str, float]
    """Seconds; they add up to the step's."""
    operators: list[Operator]
    """Most time first."""

    def share(self, category: str) -> float:
        """Of the step's time."""
        return self.categories.get(category, 0.0) / self.seconds if self.seconds else 0.0


@functools.lru_cache(maxsize=4096)
def category_of(name: str) -> str:
    """The category that a name stands for, `OTHER` if none.

    Args:
        name: of an operator of PyTorch, of a node of its backward pass, or of a GPU kernel.
    """
    if name.startswith(("aten::", "autograd::", "torch::")):
        name = name.split(": ")[-1].split("::")[-1]
    name = re.sub(r"Backward\d*$", "", name).lower()
    return next((category for category, rule in _RULES.items() if rule.search(name)), OTHER)


def break_down(events: Iterable[Any], seconds: float, on_gpu: bool, since_us: float = 0.0) -> Breakdown:
    """Add up the events' own time by category and by name.

    On a GPU the events are its kernels, and their names decide. On a CPU they are operators within operators: the
    outermost one that has a category decides, so that a dropout's multiplication is dropout; and in the backward pass
    the operator of the forward pass that it belongs to, where that was recorded.

    Args:
        events: of torch.profiler.
        seconds: that passed meanwhile.
        on_gpu: count the device's time, not the host's.
        since_us: events that begin before this time do not count.
    """
    kept = [e for e in events if (e.device_type != DeviceType.CPU) == on_gpu and e.time_range.start >= since_us]
    categories = _of_kernels(kept) if on_gpu else _of_cpu_events(kept)
    operators: dict[tuple[str, str], Operator] = {}
    for event, category in zip(kept, categories, strict=True):
        if category is None:
            continue
        entry = operators.setdefault((event.name, category), Operator(event.name, category, 0, 0.0))
        entry.calls += 1
        entry.seconds += 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    by_category = dict.fromkeys(CATEGORIES, 0.0)
    for entry in operators.values():
        by_category[entry.category] += entry.seconds
    inside = sum(by_category.values())
    by_category[OUTSIDE] = max(seconds - inside, 0.0)  # threads and streams may do more than a second's work in one
    found = {category: value for category, value in by_category.items() if value}
    return Breakdown(max(seconds, inside), found, sorted(operators.values(), key=lambda entry: -entry.seconds))


def _of_kernels(events: list[Any]) -> list[str | None]:
    return [None if event.is_user_annotation else category_of(event.name) for event in events]


def _of_cpu_events(events: list[Any]) -> list[str | None]:
    """The category of each event, None for a mark that a program sets itself."""
    # An operator carries the number of the next node that autograd will make: the last one with a number made the node.
    # Events of the backward pass carry their node's number, and the thread of the forward pass.
    makers: dict[tuple[int, int], Any] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if not event.fwd_thread and event.sequence_nr >= 0:
            makers[event.thread, event.sequence_nr] = event
    known: dict[int, str] = {}

    def category(event: Any) -> str:
        """By the outermost event that has one."""
        if id(event) not in known:
            found = OTHER if event.cpu_parent is None else category(event.cpu_parent)
            if found == OTHER and event.fwd_thread:
                maker = makers.get((event.fwd_thread, event.sequence_nr))
                found = OTHER if maker is None else category(maker)
            known[id(event)] = category_of(event.name) if found == OTHER else found
        return known[id(event)]

    found: list[str | None] = []
    for event in events:
        of = category(event)
        # A mark's own time is Python's, unless it marks what has no operator of its own.
        mine = event.is_user_annotation and category_of(event.name) == OTHER
        found.append(None if mine or event.is_async else of)
    return found


def quiet_profiler(on_gpu: bool) -> profile:
    """A profiler of operators, and on a GPU kernels, without its log lines."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when the first profiler starts
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def profile_sides(
    sides: Mapping[str, Callable[[], object]], on_gpu: bool, traces: Mapping[str, Path], steps: int = STEPS
) -> dict[str, Breakdown]:
    """Profile a step of each side, in turns.

    Args:
        sides: one step each.
        on_gpu: they run on a GPU.
        traces: where a side's trace is written, for Perfetto (https://ui.perfetto.dev).
        steps: profiled of each side.
    """
    taken: dict[str, list[tuple[float, profile]]] = {side: [] for side in sides}
    for step in range(-1, steps):
        for side, call in sides.items():
            with quiet_profiler(on_gpu) as recorded:
                start = time.perf_counter()
                call()
                if on_gpu:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            if step >= 0:
                taken[side].append((seconds, recorded))
    found = {}
    for side, recordings in taken.items():
        seconds, recorded = min(recordings, key=lambda entry: entry[0])
        found[side] = break_down(recorded.events() or (), seconds, on_gpu)
        if side in traces:
            recorded.export_chrome_trace(str(traces[side]))
    return found
