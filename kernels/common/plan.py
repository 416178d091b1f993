"""Launch plans: everything about a call that follows from its signature is worked out once and kept.

A signature is a hashable description of the arguments: dtypes, devices, alignment, widths, strides, options. Numbers
that differ from batch to batch (tokens, sequences, lengths) are no part of it: they are arguments of the launch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import compat, device

MOST_PLANS = 1024
"""Plans that one operation keeps; then the least recently used one goes."""

switches: tuple[str, int] = ("auto", 0)
"""What plans depend on besides the arguments: the backend in force, and how often a table of choices has changed.
Part of every key."""


def change_switches(backend: str | None = None) -> None:
    """Let later calls make plans of their own: for another backend, or else because tables of choices have changed."""
    global switches
    now, changes = switches
    switches = (now, changes + 1) if backend is None else (backend, changes)


@dataclass(slots=True, eq=False)
class Plan:
    """What serves the calls of one signature. It keeps no tensor of the call that it was made for."""

    backend: str | None
    """What runs, as `last_backend` says."""
    seeds: tuple[bool, ...] = ()
    """For each dropout of the operation whether it takes a key; empty: none does."""
    call: Callable[..., Any] = tuple
    """What a call runs, and of kernels with gradients what that in turn needs:"""
    operation: Any = None
    numbers: Any = None
    launch: Callable[..., Any] = tuple
    backwards: Plans | None = None
    prepare: tuple[tuple[int, Callable[[Tensor], Tensor]], ...] = ()
    """Conversions of arguments, by position. Where there are any, this is no more than the first half of a plan:"""
    make: Callable[..., Plan] = tuple  # type: ignore[assignment]
    """``(tensors, sizes)``: the plan of converted tensors,"""
    converted: Any = None
    """and those that were made, since the strides of a converted tensor do not follow from those of its source."""
    recent: bool = True


_all: weakref.WeakSet[Plans] = weakref.WeakSet()


def forget() -> None:
    """Drop all plans of all operations, as when launches begin to go somewhere else."""
    for plans in list(_all):
        plans.clear()


class Plans:
    """The plans of one operation by their keys, at most `most`.

    Look-ups take no lock. Which plan was used last is known roughly: one that was used since the last search for a
    plan to drop is passed over (the clock algorithm: Corbató, "A paging experiment with the Multics system", 1968).
    """

    __slots__ = ("__weakref__", "_lock", "found", "misses", "most")

    def __init__(self, most: int = MOST_PLANS) -> None:
        self.found: dict[Hashable, Any] = {}
        self.most = most
        self.misses = 0
        self._lock = threading.Lock()
        _all.add(self)

    def add(self, key: Hashable, plan: Any) -> Any:
        """Keep a plan, and return it."""
        with self._lock:
            self.misses += 1
            while len(self.found) >= self.most:
                oldest = next(iter(self.found))
                candidate = self.found.pop(oldest)
                if candidate.recent:
                    candidate.recent = False
                    self.found[oldest] = candidate
            self.found[key] = plan
        return plan

    def get(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """The plan of a key; if there is none, the one that `make` makes."""
        plan = self.found.get(key)
        if plan is None:
            plan = self.add(key, make())
        plan.recent = True
        return plan  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Forget all plans."""
        with self._lock:
            self.found.clear()


def launch(kernel: Any, index: int | None, *fixed: Any, **constants: Any) -> Callable[..., None]:
    """A function ``(x, y, *changing)`` that launches `kernel` on a grid of `x` times `y` programs, on the current
    stream of the GPU `index`.

    `changing` are the kernel's first arguments; those that follow are `fixed`, and the compile-time `constants` last.
    The first launch goes through Triton's JIT, which compiles; later ones go straight to the compiled kernel. So all
    that changes must compile alike: tensors aligned as those of the first launch, numbers not specialised and below
    2**31.
    """
    options = {**device.COMPILE_OPTIONS, **constants}
    run: Any = None
    stream: Any = None
    function, metadata, enter, leave, rest, several = None, None, None, None, (), False

    def through_jit(x: int, y: int, changing: tuple[Any, ...]) -> None:
        nonlocal run, stream, function, metadata, enter, leave, rest, several
        with device.on_device(index):
            compiled = kernel[(x, y)](*changing, *fixed, **options)
        way = compat.direct_launch(compiled, kernel, changing)
        if way is not None:
            (function, metadata), stream, (enter, leave) = way.handles, way.stream, way.hooks
            rest = (*fixed, *(options[name] for name in kernel.arg_names[len(changing) + len(fixed) :]))
            several = index is not None and device.count() > 1
            run = way.run  # last, as other threads may look

    def go(x: int, y: int, *changing: Any) -> None:
        if run is None or enter or leave:
            through_jit(x, y, changing)
        elif several and device.current() != index:
            with device.on_device(index):
                run(x, y, 1, stream(index), function, metadata, None, None, None, *changing, *rest)
        else:
            run(x, y, 1, stream(index), function, metadata, None, None, None, *changing, *rest)

    return go


def once(make: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """A function that `make` makes of the arguments of its first call."""
    made: Callable[..., Any] | None = None

    def call(*arguments: Any, **others: Any) -> Any:
        nonlocal made
        if made is None:
            made = make(*arguments, **others)
        return made(*arguments, **others)

    return call


def of_rows(x: Tensor) -> Hashable:
    """Signature of ``[..., width]`` whose number of rows does not matter."""
    return (
        x.shape[-1], x.dtype, x.device, x.is_contiguous() or (x.shape, x.stride()), x.data_ptr() & 15, x.numel() >> 31,
    )  # fmt: skip


def of_parameter(t: Tensor | None) -> Hashable:
    """Signature of a tensor whose form is the same in each call, or of none."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)


def of_parameters(tensors: Sequence[Tensor | None]) -> Hashable:
    """Signature of several such tensors."""
    return tuple([of_parameter(t) for t in tensors])


def of_vector(t: Tensor | None) -> Any:
    """Signature of a vector whose length does not matter if it has one, or of none."""
    if t is None:
        return None
    return t.dim(), t.stride(), t.is_contiguous(), t.numel() > 0, t.dtype, t.device, t.data_ptr() & 15


def of_gradients(grads: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> Hashable:
    """Signature of gradients ``[..., width]``."""
    return tuple([None if g is None else of_rows(g) for g in grads])


def as_rows(x: Tensor) -> Tensor:
    """`x` as ``[rows, width]`` with unit column stride; a view unless its memory order forbids."""
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def row_stride(x: Tensor) -> int:
    """Elements from one row of `as_rows` to the next, for all tensors of one signature `of_rows`: the stride of a
    single row says nothing."""
    return x.shape[-1] if x.is_contiguous() else as_rows(x).stride(0)
