"""What one measurement compares: one form for a kernel, a layer and a whole model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checking import DTYPES, LARGEST_DIFFERENCE
from ..timing import Device

DIRECTIONS = ("forward", "backward", "both")
"""Without gradients; the backward pass of a graph that stays; both, with a new graph each time."""

RECORDED = "forward with gradients"
"""A forward pass that records for a backward pass which does not follow; for host cost, not on the command line."""

PROVIDERS = {
    "fusenc": "this library",
    "fusenc-packed": "this library on packed tokens, without the padding",
    "fusenc-recompute": "this library, which computes the activation again in the backward pass",
    "fusenc-flattened": "this library on a flattened batch, as transformers' collator makes it",
    "fusenc-graph": "this library on the padded batch, as one CUDA graph",
    "eager": "the plain composition of PyTorch's functions",
    "compile": "torch.compile of it (on a CPU only if asked for: it compiles for minutes)",
    "sdpa": "F.scaled_dot_product_attention, torch choosing its backend",
    "sdpa-math": "its backend MATH",
    "sdpa-flash": "its backend FLASH_ATTENTION",
    "sdpa-efficient": "its backend EFFICIENT_ATTENTION",
    "sdpa-cudnn": "its backend CUDNN_ATTENTION",
    "flex": "FlexAttention, compiled (on a CPU only if asked for)",
    "torch.nn": "torch.nn's module, its plain path",
    "fast-path": "torch.nn's module, its fast path (inference)",
    "hf-eager": "Hugging Face's module, eager attention",
    "hf-sdpa": "Hugging Face's module, SDPA",
    "hf-sdpa-flash": "the same with SDPA's backend FLASH_ATTENTION alone",
    "hf-sdpa-cudnn": "the same with SDPA's backend CUDNN_ATTENTION alone",
    "hf-flash": "Hugging Face's module, flash-attn",
    "flash-attn": "flash-attn",
    "xformers": "xformers",
    "liger": "Liger-Kernel",
}
"""Who can take part, and what it is."""

COMPILED = ("compile", "flex")

DROPOUT = "dropout draws other masks; the same case without it is checked"
"""`Case.unchecked` of a case with dropout."""

Call = Callable[[], Any]
"""Gives its results, tensors in any nesting: outputs, and after them gradients if the direction has any."""

View = Callable[[list[Tensor | None]], list[Tensor | None]]


class AbsentError(Exception):
    """A provider that cannot take part here; the message says why."""


@dataclass
class Inputs:
    """What a call is made of; several copies exist where inputs take turns."""

    leaves: list[Tensor]
    """Floating tensors whose gradients are results."""
    others: list[Tensor] = field(default_factory=list)
    upstream: list[Tensor] = field(default_factory=list)
    """The gradient of each output."""

    def copy(self) -> Inputs:
        """The same values in other memory."""
        return Inputs(*([t.detach().clone() for t in part] for part in (self.leaves, self.others, self.upstream)))

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values, the floating ones in another dtype."""
        return Inputs([t.to(dtype) for t in self.leaves], self.others, [t.to(dtype) for t in self.upstream])


Maker = Callable[[Inputs], Call]
Provider = Callable[[], Maker]
"""Imports what it needs, builds modules, and returns what makes a call of inputs. May raise `AbsentError`."""


@dataclass
class Case:
    """One thing to do, and who can do it."""

    op: str
    name: str
    """Unique within the op."""
    dtype: str
    direction: str
    inputs: Callable[[], Inputs]
    """Makes them, on the device."""
    providers: Mapping[str, Provider]
    against: tuple[str, ...] = ()
    """The providers of which the fastest is the yardstick: ratios are taken against it."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """The ratio that a provider should reach, the yardstick's time over its own; below 1: a bounded cost."""
    reference: Provider | None = None
    """Gives the values that all have to agree with, on inputs of a wider dtype. None: nothing can be compared."""
    unchecked: str = ""
    """Why there is no reference."""
    views: Mapping[str, View] = field(default_factory=dict)
    """What of a provider's results (and of "reference"'s) is compared: real tokens, where some leave padding out."""
    tolerance: float = LARGEST_DIFFERENCE
    flops: float = 0.0
    """Useful ones, of real tokens alone; 0 where memory decides. Attention's backward pass counts five products."""
    bytes: float = 0.0
    """The least that has to be moved: every input once, every result once."""
    tokens: int = 0
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """What a plot can use as an axis: batch, length, width, heads, fill, and the kind of the case."""
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """A state of the process in which the case is built and measured."""
    judge: Provider | None = None
    """The plain composition in the case's own dtype. Other providers may have at most `JUDGED` times its error. For
    half precision, where the tolerance of a whole model is as large as its values. None: the tolerance alone counts.
    """
    kept_unit: int = 0
    """Bytes of the hidden states of all real tokens, in which the memory kept for a backward pass is stated; 0: it is
    not."""

    @property
    def key(self) -> str:
        """Its name among all cases."""
        return f"{self.op}: {self.name}"


@dataclass(frozen=True)
class Point:
    """One size, dtype and direction."""

    dtype: str
    batch: int
    length: int
    width: int
    heads: int
    fill: float
    direction: str
    kind: str
    """``"cpu"`` or ``"cuda"``."""
    device: str
    """Where tensors live, as torch calls it."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.dtype]

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return self.torch_dtype.itemsize

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each sequence: evenly spread so that `fill` of the batch is real, the longest whole."""
        shortest = max(1.0, (2.0 * self.fill - 1.0) * self.length)
        longest = min(float(self.length), 2.0 * self.fill * self.length - shortest)
        step = (longest - shortest) / max(self.batch - 1, 1)
        lengths = [max(1, round(shortest + i * step)) for i in range(self.batch)]
        return [*lengths[:-1], self.length]

    @property
    def tokens(self) -> int:
        """Real tokens of the batch."""
        return sum(self.lengths)

    def sizes(self, kind: str = "") -> dict[str, Any]:
        """`Case.sizes` of this point."""
        names = ("batch", "length", "width", "heads", "fill")
        return {"kind": kind, **{name: getattr(self, name) for name in names}}

    def describe(self, shape: str) -> str:
        """A name of this point."""
        parts = [shape] if self.fill == 1.0 else [shape, f"fill {self.tokens / (self.batch * self.length):.2f}"]
        return ", ".join([*parts, self.dtype, self.direction])

    def real(self) -> Tensor:
        """Bool ``[B, L]``, True where a token is real."""
        return torch.arange(self.length, device=self.device) < torch.tensor(self.lengths, device=self.device)[:, None]

    def starts(self) -> Tensor:
        """int32 ``[B + 1]``, the first token of each sequence once they are packed."""
        ends = itertools.accumulate(self.lengths)
        return torch.tensor([0, *ends], dtype=torch.int32, device=self.device)

    def random(self, *shapes: Sequence[int]) -> list[Tensor]:
        """Tensors of unit size, the same each time."""
        generator = torch.Generator(device=self.device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        return [torch.randn(tuple(shape), **options).to(self.torch_dtype) for shape in shapes]

    def target(self, ratio: float) -> float | None:
        """A target that is promised on CPUs in float32, None elsewhere: a GPU's are not known yet."""
        return ratio if self.kind == "cpu" and self.dtype == "float32" else None


@dataclass(frozen=True)
class Grid:
    """Sizes, dtypes and directions, each with each."""

    dtype: tuple[str, ...]
    batch: tuple[int, ...]
    length: tuple[int, ...]
    width: tuple[int, ...]
    heads: tuple[int, ...]
    fill: tuple[float, ...] = (1.0,)
    direction: tuple[str, ...] = ("forward", "both")


Given = Mapping[str, tuple[Any, ...]]
"""What the command line asks for, by `Grid`'s names; what is missing is an op's own choice."""


def points(
    grids: Mapping[str, Sequence[Grid]], given: Given, device: Device, needs_heads: bool = True
) -> Iterator[Point]:
    """All points, each once.

    Args:
        grids: an op's own choice, for each kind of device.
        given: what replaces parts of it.
        device: where the cases will run.
        needs_heads: False for an op without heads.

    Raises:
        ValueError: a width that heads do not divide.
    """
    seen: dict[Point, None] = {}
    for grid in grids[device.kind]:
        chosen = dataclasses.replace(grid, **given)
        if not needs_heads:
            chosen = dataclasses.replace(chosen, heads=grid.heads[:1])
        for values in itertools.product(*vars(chosen).values()):
            point = Point(**dict(zip(vars(chosen), values, strict=True)), kind=device.kind, device=device.where)
            if needs_heads and point.width % point.heads:
                raise ValueError(f"--heads: expected a divisor of width {point.width}, got {point.heads}")
            seen.setdefault(point)
    yield from seen


def directed(function: Callable[..., Any], inputs: Inputs, direction: str, parameters: Sequence[Tensor] = ()) -> Call:
    """A call of `function` on the inputs in one direction.

    Args:
        function: of the leaves and the others; gives one tensor or a sequence of them.
        inputs: what it is called with.
        direction: one of `DIRECTIONS`, or `RECORDED`.
        parameters: more tensors with gradients, which the function knows.
    """
    if direction == "forward":
        arguments = [t.detach() for t in inputs.leaves] + inputs.others
        if not parameters:
            return lambda: function(*arguments)

        def forward() -> Any:
            with torch.no_grad():
                return function(*arguments)

        return forward
    leaves = [t.detach().requires_grad_() for t in inputs.leaves]
    arguments, wanted, upstream = [*leaves, *inputs.others], [*leaves, *parameters], inputs.upstream
    if direction == RECORDED:
        return lambda: function(*arguments)

    def gradients(out: Any, keep: bool = False) -> Any:
        outputs = [out] if isinstance(out, Tensor) else list(out)
        return torch.autograd.grad(outputs, wanted, upstream, allow_unused=True, retain_graph=keep)

    if direction == "backward":
        out = function(*arguments)  # the forward pass happens once, outside what is measured
        return lambda: (out, gradients(out, keep=True))

    def both() -> Any:
        out = function(*arguments)
        return out, gradients(out)

    return both


def function(of: Callable[..., Any], direction: str) -> Provider:
    """The provider that calls a function of the leaves and the others."""
    return lambda: functools.partial(directed, of, direction=direction)


def compiled(of: Callable[..., Any], direction: str) -> Provider:
    """The same through torch.compile."""
    return lambda: functools.partial(directed, optimized(of), direction=direction)


def optimized(of: Callable[..., Any]) -> Callable[..., Any]:
    """A function through torch.compile, for inputs of one size."""
    from torch._functorch import config

    config.donated_buffer = False  # the graph of a backward pass is called again
    return torch.compile(of, dynamic=False)


def real_rows(point: Point) -> View:
    """Of tensors ``[B, L, width]`` the rows of real tokens; the others are as they are."""

    def view(results: list[Tensor | None]) -> list[Tensor | None]:
        rows, real = (point.batch, point.length, point.width), point.real()
        return [t[real.to(t.device)] if t is not None and t.shape == rows else t for t in results]

    return view


def flat(results: Any) -> list[Tensor | None]:
    """The results of a call in one list, without their graphs."""
    if results is None or isinstance(results, Tensor):
        return [results if results is None else results.detach()]
    return [each for part in results for each in flat(part)]


def package(module: str, name: str) -> Any:
    """A module of another project.

    Raises:
        AbsentError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            raise AbsentError(f"{name} is not installed") from None
        raise AbsentError(f"{name} does not import: {error}") from None
    except Exception as error:  # some look for a GPU or a library as they are imported
        raise AbsentError(f"{name} does not import: {type(error).__name__}: {error}".splitlines()[0]) from None
