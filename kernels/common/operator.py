"""Operations: from a declaration the call path, the `autograd.Function`, the `torch.library` operator and its rules."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend, compat, dropout, plan
from .plan import Plan, Plans

_LIBRARY = torch.library.Library("fusenc", "FRAGMENT")
_SCHEMA_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "bool": "bool", "bool | None": "bool?",
    "int": "SymInt", "str": "str", "torch.dtype": "ScalarType", "torch.dtype | None": "ScalarType?",
}  # fmt: skip
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool)
Prepare = tuple[tuple[int, Callable[[Tensor], Tensor]], ...]
"""Conversions of arguments, by position."""


@dataclass(eq=False)
class Operation:
    """A differentiable function of tensors with kernels, as a family declares it; calling it runs it.

    A call looks up the plan of its signature. If there is none, all arguments are checked and a plan is made: for the
    kernels, or of eager PyTorch. Under torch.compile the call becomes one operator.

    `forward` and `backward` are given example tensors, and return functions that launch on tensors like them. They
    must not keep the examples.
    """

    name: str
    tensors: type[tuple]
    """NamedTuple of all tensors: the differentiable ones, the others, the keys of the dropouts."""
    options: type[tuple]
    """NamedTuple of the numbers, as `check` gives them."""
    differentiable: int
    """How many of the tensors have gradients: the first ones."""
    outputs: int
    """How many of `forward`'s results a caller gets; the rest is for the backward pass."""
    results: int
    """How many of `forward`'s results are for callers and for `keep`: the first ones."""
    signature: Callable[..., Hashable]
    """``(*tensors, *sizes)``: what checks and choices depend on, of the tensors."""
    check: Callable[..., tuple[Prepare, Any]]
    """``(tensors, options, sizes, autocast)``: raises for bad arguments; conversions of tensors, and the numbers."""
    eager: Callable[..., tuple[Tensor | None, ...]] = tuple
    """``(tensors, numbers, *sizes)``: the outputs in plain PyTorch, differentiable."""
    forward: Callable[..., Callable[..., tuple[Tensor | None, ...]]] = tuple  # type: ignore[assignment]
    """``(tensors, numbers, sizes, needs)`` to a function of ``(*tensors, *sizes)``, which gives all results. `needs`:
    which of the first tensors need gradients; empty: none, so nothing has to be kept."""
    keep: Callable[..., tuple[Tensor | None, ...]] = tuple
    """``(tensors, results, numbers)``: what the backward pass is given."""
    backward: Callable[..., Callable[..., tuple[Tensor | None, ...]]] = tuple  # type: ignore[assignment]
    """``(grads, saved, numbers, sizes, needs)`` to a function of ``(grads, saved, *sizes)``: the gradients."""
    fake: Callable[..., tuple[Tensor | None, ...]] | None = None
    """``(tensors, numbers, sizes, needs)``: empty tensors like all results of the kernels; None: no operator."""
    instead: Callable[..., Callable[..., Any] | None] | None = None
    """``(tensors, numbers, autocast)``: a differentiable function ``(*tensors, *sizes)`` that serves such calls, or
    None. Where it serves all, the operation needs no paths of its own."""
    sizes: tuple[str, ...] = ()
    """Names of numbers that differ from batch to batch."""
    dropouts: tuple[str, ...] = ()
    """The options that are probabilities of a dropout; the last tensors are their keys."""
    contiguous: tuple[int, ...] = ()
    """Positions of the tensors that kernels read as contiguous; others are copied first."""
    cast: int = 0
    """So many first tensors are cast under autocast,"""
    cast_to: torch.dtype | None = None
    """to this dtype, or to autocast's own."""
    grad_signature: Callable[..., Hashable] = plan.of_gradients
    """``(grads, saved)``: what the choices of `backward` depend on beyond the plan of the forward pass."""
    backward_is_differentiable: bool = False
    """The functions that `backward` makes can be differentiated in turn."""

    def __post_init__(self) -> None:
        self.plans, self._raw_plans, self._raw_backwards = Plans(), Plans(), Plans()
        self._fields = len(self.tensors._fields)  # type: ignore[attr-defined]
        rest = self._fields - self.differentiable + len(self.sizes)
        self.no_gradients, self.no_keys = (None,) * rest, (None,) * len(self.dropouts)
        if self.fake is not None:
            self._register()

    # A call in eager mode

    def __call__(self, tensors: tuple[Any, ...], options: tuple[Any, ...], sizes: tuple[int, ...] = ()) -> Any:
        """The outputs, for the tensors that a caller gives, options as `check` takes them, and sizes."""
        if torch.compiler.is_compiling():
            return self._traced(tensors, options, sizes)
        found: Plan | None = None
        key: Hashable = None
        needs: tuple[bool, ...] = ()
        autocast, switches = None, plan.switches
        try:
            if torch.is_grad_enabled():
                needs = tuple([t is not None and t.requires_grad for t in tensors[: self.differentiable]])
            if torch._C._is_any_autocast_enabled():
                autocast = autocast_dtype(tensors[0])
            key = (self.signature(*tensors, *sizes), options, needs, autocast, switches)
            found = self.plans.found.get(key)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            key = None  # no tensors, or such that have no memory (torch.func, fake tensors)
        if found is None:
            found = self._plan(tensors, options, sizes, needs, autocast)
            # A tensor among the options may change, a function would be kept alive with all that it knows, and another
            # thread may have set another backend meanwhile.
            fixed = not any(isinstance(o, Tensor) or callable(o) for o in options)
            if key is not None and switches is plan.switches and fixed:
                self.plans.add(key, found)
        found.recent = True
        if found.prepare:
            tensors = _apply(found.prepare, tensors)
            make = functools.partial(found.make, tensors, sizes)
            found = make() if key is None else found.converted.get(self.signature(*tensors, *sizes), make)
        backend.last = found.backend
        if found.seeds:
            return found.call(*tensors, *_draw(found.seeds, tensors[0]), *sizes)
        return found.call(*tensors, *self.no_keys, *sizes)

    def _plan(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], sizes: tuple[int, ...], needs: tuple[bool, ...],
        autocast: torch.dtype | None,
    ) -> Plan:  # fmt: skip
        prepare, examples, numbers = self._checked(tensors, options, sizes, autocast)
        make = functools.partial(self._made, numbers, needs, autocast)
        return Plan(None, prepare=prepare, make=make, converted=Plans()) if prepare else make(examples, sizes)

    def _made(
        self, numbers: Any, needs: tuple[bool, ...], autocast: torch.dtype | None, examples: tuple[Any, ...],
        sizes: tuple[int, ...],
    ) -> Plan:  # fmt: skip
        """The plan of checked and converted tensors."""
        x = examples[0]
        other = self._other(examples, numbers, autocast)
        if other is not None:
            return Plan(backend.last, call=other)
        seeds = tuple(getattr(numbers, name) > 0.0 for name in self.dropouts)
        kernels = backend.use_triton(x)
        made = Plan(backend.last, seeds if any(seeds) else ())
        if kernels:
            if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in examples):
                raise RuntimeError(
                    "fusenc's kernels do not run under torch.func's transforms; instead of vmap, give them the batch "
                    "as dimension 0"
                )
            keys = [torch.empty(1, dtype=torch.int64, device=x.device) if drops else None for drops in seeds]
            needed = needs if True in needs else ()
            launch = self.forward(self.tensors(*examples, *keys), numbers, sizes, needed)
            made.call = launch
            if needed:
                made.operation, made.numbers, made.launch, made.backwards = self, numbers, launch, Plans()
                made.call = functools.partial(_apply_kernels, made)
        else:
            made.call = functools.partial(self._eager, numbers, autocast is not None)
        return made

    def _checked(
        self, tensors: tuple[Any, ...], options: tuple[Any, ...], sizes: tuple[int, ...], autocast: torch.dtype | None
    ) -> tuple[Prepare, tuple[Any, ...], Any]:
        """Conversions, tensors after them, and numbers; raises for bad arguments."""
        casts: Prepare = ()
        if autocast is not None:
            dtype = self.cast_to or autocast
            casts = tuple(
                (i, functools.partial(_cast, dtype=dtype))
                for i, t in enumerate(tensors[: self.cast]) if _is_cast(t, dtype)
            )  # fmt: skip
        examples = _apply(casts, tensors)
        prepare, numbers = self.check(examples, options, sizes, autocast is not None)
        prepare = (*prepare, *self._copies(examples))
        return (*casts, *prepare), _apply(prepare, examples), numbers

    def _copies(self, tensors: tuple[Any, ...]) -> Prepare:
        """Conversions of the tensors that have to be contiguous and are not."""
        there = ((i, tensors[i]) for i in self.contiguous)
        return tuple((i, Tensor.contiguous) for i, t in there if t is not None and not t.is_contiguous())

    def _other(self, tensors: tuple[Any, ...], numbers: Any, autocast: torch.dtype | None) -> Any:
        if self.instead is None:
            return None
        return self.instead(self.tensors(*tensors, *self.no_keys), numbers, autocast is not None)

    def _eager(self, numbers: Any, autocast: bool, *arguments: Any) -> Any:
        tensors = self.tensors(*arguments[: self._fields])
        if not autocast:
            return self.eager(tensors, numbers, *arguments[self._fields :])
        with _without_autocast(tensors[0]):
            return self.eager(tensors, numbers, *arguments[self._fields :])

    # Under torch.compile

    def _traced(self, tensors: tuple[Any, ...], options: tuple[Any, ...], sizes: tuple[int, ...]) -> Any:
        autocast = autocast_dtype(tensors[0]) if isinstance(tensors[0], Tensor) else None
        _, tensors, numbers = self._checked(tensors, options, sizes, autocast)
        other = self._other(tensors, numbers, autocast)
        if other is not None:
            return other(*tensors, *self.no_keys, *sizes)
        seeds = tuple(getattr(numbers, name) > 0.0 for name in self.dropouts)
        keys = _draw(seeds, tensors[0]) if any(seeds) else (None,) * len(seeds)
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors[: self.differentiable]]
        if autocast is None:
            return self.operator(*tensors, *keys, *numbers, *sizes, needs)[: self.outputs]
        with _without_autocast(tensors[0]):
            return self.operator(*tensors, *keys, *numbers, *sizes, needs)[: self.outputs]

    def _register(self) -> None:
        tensors, numbers = (
            ", ".join(f"{_SCHEMA_TYPES[kind.__forward_arg__]} {name}" for name, kind in of.__annotations__.items())
            for of in (self.tensors, self.options)
        )
        sizes = "".join(f", SymInt {name}" for name in self.sizes)
        results = ", ".join(["Tensor"] * self.results)
        self.operator = _define(
            f"{self.name}({tensors}, {numbers}{sizes}, bool[] needs) -> ({results})",
            self._operator,
            self._fake_operator,
        )
        self.backward_operator = _define(
            f"{self.name}_backward(Tensor?[] grads, Tensor?[] saved, {numbers}{sizes}, bool[] needs, SymInt[] like)"
            " -> Tensor[]",
            self._backward_operator, self._fake_backward,
        )  # fmt: skip
        torch.library.register_autograd(f"fusenc::{self.name}", self._gradients, setup_context=self._save, lib=_LIBRARY)
        for device_type in ("cpu", "cuda"):
            rule = functools.partial(self._autocast_rule, device_type)
            _LIBRARY.impl(self.name, rule, f"Autocast{device_type.upper()}")

    def _split(self, arguments: Sequence[Any]) -> tuple[Any, Any, tuple[int, ...], tuple[bool, ...]]:
        """Tensors as kernels read them, numbers, sizes and needs of an operator's arguments."""
        end = self._fields + len(self.options._fields)  # type: ignore[attr-defined]
        given, needs = tuple(arguments[: self._fields]), tuple(arguments[-1])
        tensors, numbers = _apply(self._copies(given), given), self.options(*arguments[self._fields : end])
        return self.tensors(*tensors), numbers, tuple(arguments[end:-1]), needs if True in needs else ()

    def _operator(self, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, numbers, sizes, needs = self._split(arguments)
        if backend.use_triton(tensors[0]):
            key = (plan.of_parameters(tensors), numbers, sizes, needs, compat.tf32_allowed(), plan.switches)
            made = self._raw_plans.get(key, lambda: Plan(None, call=self.forward(tensors, numbers, sizes, needs)))
            results = made.call(*tensors, *sizes)
        else:
            results = self.eager(tensors, numbers, *sizes)
        return _tensors_only(tensors[0], self._all(results))

    def _fake_results(self, arguments: Sequence[Any]) -> tuple[Tensor | None, ...]:
        tensors, numbers, sizes, needs = self._split(arguments)
        kernels = backend.would_use_triton(tensors[0])
        results = self.fake(tensors, numbers, sizes, needs if kernels else ())  # type: ignore[misc]
        return self._all(results if kernels else results[: self.outputs])

    def _all(self, results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """As many results as an operator has."""
        return (*results, *[None] * (self.results - len(results)))[: self.results]

    def _fake_operator(self, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(arguments[0].new_empty(0) if t is None else t for t in self._fake_results(arguments))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.numbers, ctx.operation_sizes, _ = self._split(inputs)
        there = self._fake_results(inputs)
        ctx.there = [t is not None for t in there[: self.outputs]]
        saved: Any = tensors
        if backend.would_use_triton(tensors[0]):
            results = tuple(t if f is not None else None for t, f in zip(output, there, strict=True))
            saved = self.keep(tensors, results, ctx.numbers)
        ctx.save_for_backward(*saved)
        ctx.like = []
        for t in tensors[: self.differentiable]:
            ctx.like += [-1] if t is None else [_DTYPES.index(t.dtype), t.dim(), *t.shape]
        ctx.set_materialize_grads(False)

    def _gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [g if there else None for g, there in zip(grads[: self.outputs], ctx.there, strict=True)]
        needs = [bool(n) for n in ctx.needs_input_grad[: self.differentiable]]
        found = self.backward_operator(
            given, list(ctx.saved_tensors), *ctx.numbers, *ctx.operation_sizes, needs, ctx.like
        )
        used = [g if need else None for g, need in zip(found, needs, strict=True)]
        rest = self._fields - self.differentiable + len(ctx.numbers) + len(ctx.operation_sizes) + 1
        return (*used, *[None] * rest)

    def _split_backward(self, numbers: Sequence[Any]) -> tuple[Any, tuple[int, ...]]:
        end = len(self.options._fields)  # type: ignore[attr-defined]
        return self.options(*numbers[:end]), tuple(numbers[end:])

    def _backward_operator(self, grads: list[Any], saved: list[Any], *rest: Any) -> list[Tensor]:
        *given, needs, like = rest
        numbers, sizes = self._split_backward(given)
        first, wanted = next(g for g in (*grads, *saved) if g is not None), tuple(needs)
        with _without_autocast(first):
            kernels = backend.use_triton(first)
            if kernels == (len(saved) == self._fields):  # eager PyTorch keeps just the arguments, kernels never do
                raise RuntimeError("the backend was changed between the forward and the backward pass of compiled code")
            if kernels:
                tensors = plan.of_parameters((*grads, *saved))
                key = (tensors, numbers, sizes, wanted, compat.tf32_allowed(), plan.switches)
                made = self._raw_backwards.get(
                    key, lambda: Plan(None, call=self.backward(grads, saved, numbers, sizes, wanted))
                )
                results = made.call(grads, saved, *sizes)
            else:
                results = self._eager_gradients(grads, saved, numbers, sizes, needs)
        found, forms = [], _forms(like)
        for t, need, (dtype, size) in zip(results, needs, forms, strict=True):
            if need and t is None:  # nothing depends on it
                t = first.new_zeros(size, dtype=dtype)
            found.append(t if need else None)
        return list(_tensors_only(first, found, [dtype for dtype, _ in forms]))

    def _eager_gradients(
        self, grads: list[Any], tensors: list[Any], numbers: Any, sizes: tuple[int, ...], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients by autograd through the eager path, run again."""
        with torch.enable_grad():
            leaves: list[Any] = [t if t is None else t.detach() for t in tensors]
            wanted = [t.requires_grad_() for t, need in zip(leaves, needs, strict=False) if need]
            outputs = self.eager(self.tensors(*leaves), numbers, *sizes)
            pairs = [(out, g) for out, g in zip(outputs, grads, strict=False) if out is not None and g is not None]
            given, upstream = [out for out, _ in pairs], [g for _, g in pairs]
            found = iter(torch.autograd.grad(given, wanted, upstream, allow_unused=True, materialize_grads=True))
        return [next(found) if need else None for need in needs]

    def _fake_backward(self, grads: list[Any], saved: list[Any], *rest: Any) -> list[Tensor]:
        needs, like = rest[-2:]
        first = next(g for g in (*grads, *saved) if g is not None)
        forms = zip(needs, _forms(like), strict=True)
        return [first.new_empty(size if need else [0], dtype=dtype) for need, (dtype, size) in forms]

    def _autocast_rule(self, device_type: str, *arguments: Any) -> Any:
        dtype = self.cast_to or torch.get_autocast_dtype(device_type)
        cast = [_cast(t, dtype) if _is_cast(t, dtype) else t for t in arguments[: self.cast]]
        with torch.autocast(device_type, enabled=False):
            return self.operator(*cast, *arguments[len(cast) :])


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``fusenc::<schema>`` for every device."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusenc::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fusenc, name).default


def _tensors_only(like: Tensor, results: Sequence[Any], of_dtype: Sequence[Any] | None = None) -> tuple[Tensor, ...]:
    """As an operator returns them: contiguous, each with memory of its own, empty in the place of None."""
    found: list[Tensor] = []
    for i, t in enumerate(results):
        if t is None:
            t = like.new_empty(0, dtype=like.dtype if of_dtype is None else of_dtype[i])
        t = t.contiguous()
        found.append(t.clone() if any(t is other for other in found) else t)
    return tuple(found)


def _forms(like: Sequence[int]) -> list[tuple[torch.dtype, Sequence[int]]]:
    """Dtypes and shapes, which an operator takes as numbers: of each tensor the dtype's, -1 for no tensor, and if there
    is one the number of dimensions and the sizes."""
    found, at = [], 0
    while at < len(like):
        code, end = like[at], at + 1
        if code >= 0:
            end = at + 2 + like[at + 1]
        found.append((_DTYPES[max(code, 0)], like[at + 2 : end]))
        at = end
    return found


def _apply(prepare: Prepare, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    if not prepare:
        return tensors
    changed = list(tensors)
    for i, convert in prepare:
        changed[i] = convert(changed[i])
    return tuple(changed)


def _draw(drops: tuple[bool, ...], x: Tensor) -> tuple[Tensor | None, ...]:
    """A key for each dropout that drops, in one draw."""
    drawn = iter(dropout.new_seed(x, sum(drops)).split(1))
    return tuple([next(drawn) if each else None for each in drops])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast in force for the device of `x`."""
    return torch.get_autocast_dtype(backend.autocast_device(x)) if backend.autocast_enabled(x) else None


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype)


def _is_cast(t: Any, dtype: torch.dtype) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in (torch.float64, dtype)


class _Kernels(torch.autograd.Function):
    """The kernels of any operation in eager mode, with gradients."""

    @staticmethod
    def forward(ctx: Any, made: Plan, *arguments: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        operation, results = made.operation, made.launch(*arguments)
        fields = operation._fields
        ctx.save_for_backward(*operation.keep(arguments[:fields], results, made.numbers))
        ctx.made, ctx.sizes, ctx.hooked = made, arguments[fields:], compat.saves_through_hooks()
        ctx.set_materialize_grads(False)
        return results[: operation.outputs]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not torch.is_grad_enabled() or ctx.made.operation.backward_is_differentiable:
            return _run_backward(ctx, grads)
        with torch.no_grad():
            results = _run_backward(ctx, grads)
        depends_on = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(None if r is None else _NoSecondDerivative.apply(r, *depends_on) for r in results)


_apply_kernels = compat.quick_apply(_Kernels)


def _run_backward(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if grads[0] is None and all(g is None for g in grads):
        return (None,) * len(ctx.needs_input_grad)
    made, saved, sizes = ctx.made, ctx.saved_tensors, ctx.sizes
    operation = made.operation
    needs = ctx.needs_input_grad[1 : operation.differentiable + 1]
    restored = plan.of_parameters(saved) if ctx.hooked else None
    key = (needs, operation.grad_signature(grads, saved), restored, compat.tf32_allowed(), plan.switches)
    found = made.backwards.get(
        key, lambda: Plan(None, call=operation.backward(grads, saved, made.numbers, sizes, needs))
    )
    with _without_autocast(next(g for g in grads if g is not None)):
        return (None, *found.call(grads, saved, *sizes), *operation.no_gradients)


def _without_autocast(like: Tensor) -> Any:
    """Inside, products are of the dtype of their operands: the forward pass has chosen it."""
    if not backend.autocast_enabled(like):
        return contextlib.nullcontext()
    return torch.autocast(backend.autocast_device(like), enabled=False)


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient as it is, which raises when it is differentiated itself.

    `torch.autograd.function.once_differentiable` raises only if the incoming gradient is itself differentiable;
    otherwise its result is a constant, and a gradient penalty would add nothing without a word.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("fusenc's kernels have a first derivative only; use plain PyTorch where a second is needed")
