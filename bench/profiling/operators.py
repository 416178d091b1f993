"""Where the time of a step goes: torch.profiler's events, each counted once, in a few categories."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    "attention": r"scaled_dot_product|(?<!log_)(?<!log)softmax|bmm|flash|fmha|attention|rotary",
    "matrix products": (
        r"linear|addmm|addmv|\bmm\b|\bmv\b|conv(?!ert)|gemm|gemv|cutlass|xmma|cublas|nvjet|cijk_|splitk|"
        r"hidden_gradient|whole_ffn"
    ),
    "normalisation": r"(layer|rms|group|batch|add)_?norm|gammabeta",
    "dropout": r"dropout|bernoulli|philox|\brandom_|randint|masked_scale|distribution_elementwise",
    "activation": r"gelu|relu|silu|sigmoid|tanh|activation|epilogue_(gradient_)?kernel",
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


@dataclass(slots=True)
class Event:
    """What torch.profiler recorded of one call; times in nanoseconds."""

    name: str
    start: int
    end: int
    thread: int = 1
    forward_thread: int = 0
    """Of a backward pass: where its forward pass ran."""
    sequence: int = -1
    """The number of the next node that autograd makes; of a backward pass that of its node."""
    on_device: bool = False
    mark: bool = False
    """Set by a program, not by an operator."""
    own: int = 0
    """Without the events inside it."""
    category: str = OTHER


def events_of(recorded: profile) -> list[Event]:
    """All events, in order of time.

    torch's own list of events holds some kilobytes for each of them; a script may have a million.
    """
    results = getattr(recorded.profiler, "kineto_results", None)
    events = [
        Event(
            e.name(), e.start_ns(), e.end_ns(), e.start_thread_id(), e.fwd_thread_id(), e.sequence_nr(),
            e.device_type() != DeviceType.CPU, e.is_user_annotation(),
        )
        for e in (results.events() if results is not None else ())
        if not e.is_async() and e.start_thread_id() == e.end_thread_id()
    ]  # fmt: skip
    return sorted(events, key=lambda e: (e.start, -e.end))


def break_down(events: Sequence[Event], seconds: float, on_gpu: bool, since: int = 0) -> Breakdown:
    """Add up the events' own time by category and by name.

    On a GPU the events are its kernels, and their names decide. On a CPU they are operators within operators: the
    outermost one that has a category decides, so that a dropout's multiplication is dropout; and in the backward pass
    the operator of the forward pass that it belongs to, where that was recorded.

    Args:
        events: in order of time, the outer of two that begin together first.
        seconds: that passed meanwhile.
        on_gpu: count the device's time, not the host's.
        since: events that begin before this time do not count.
    """
    chosen = [event for event in events if event.on_device == on_gpu]
    if on_gpu:
        for event in chosen:
            event.own, event.category = event.end - event.start, category_of(event.name)
    else:
        _nest(chosen)
    operators: dict[tuple[str, str], Operator] = {}
    for event in chosen:
        # A mark's own time is Python's, unless it marks what has no operator of its own; on a GPU it is its kernels'.
        if event.start < since or (event.mark and (on_gpu or category_of(event.name) == OTHER)):
            continue
        entry = operators.setdefault(
            (event.name, event.category), Operator(event.name, event.category, 0, 0.0)
        )  # fmt: skip
        entry.calls += 1
        entry.seconds += 1e-9 * event.own
    by_category = dict.fromkeys(CATEGORIES, 0.0)
    for entry in operators.values():
        by_category[entry.category] += entry.seconds
    inside = sum(by_category.values())
    by_category[OUTSIDE] = max(seconds - inside, 0.0)  # threads and streams may do more than a second's work in one
    found = {category: value for category, value in by_category.items() if value}
    return Breakdown(max(seconds, inside), found, sorted(operators.values(), key=lambda entry: -entry.seconds))


def _nest(events: Sequence[Event]) -> None:
    """Set the own time and the category of events on the host."""
    makers: dict[tuple[int, int], Event] = {}
    open_events: dict[int, list[Event]] = {}
    for event in events:
        outer = open_events.setdefault(event.thread, [])
        while outer and event.end > outer[-1].end:
            outer.pop()
        event.own = event.end - event.start
        event.category = OTHER
        if outer:
            outer[-1].own -= event.own
            event.category = outer[-1].category
        outer.append(event)
        if event.category == OTHER and event.forward_thread:
            maker = makers.get((event.forward_thread, event.sequence))
            event.category = OTHER if maker is None else maker.category
        if event.category == OTHER:
            event.category = category_of(event.name)
        if event.sequence >= 0 and not event.forward_thread:
            makers[event.thread, event.sequence] = event  # the last one with a number is the one that makes the node


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
        sides: one step each, which is done when the call returns.
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
                seconds = time.perf_counter() - start
            if step >= 0:
                taken[side].append((seconds, recorded))
    found = {}
    for side, recordings in taken.items():
        seconds, recorded = min(recordings, key=lambda entry: entry[0])
        found[side] = break_down(events_of(recorded), seconds, on_gpu)
        if side in traces:
            recorded.export_chrome_trace(str(traces[side]))
    return found
