"""Checking and timing a model unfused and fused on the same batches, in turns."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import checking, timing
from .workload import Case

HIDDEN_DIFFERENCE = 32.0
"""Of hidden states, fused from unfused, in units of eps times the largest value: layers of sums in another order; a
lost mask or a wrong index differs by the values themselves. A six-layer BERT shows 4 in float32, 1 in 16 bit."""


@dataclass
class Measured:
    """One case: its tokens and the time that each side takes for them."""

    order: str
    batch: int
    length: int | None
    tokens: int
    positions: int
    rounds: dict[str, list[float]] = field(default_factory=dict)
    """Seconds, by side (``unfused``, ``fused``); empty where the case failed."""
    difference: float | None = None
    """Of hidden states, fused from unfused, in units of the largest value."""
    fault: str = ""
    """Why there is no time."""
    useful_flops: float | None = None
    padded_flops: float | None = None

    def seconds(self, side: str) -> float:
        """The median."""
        return statistics.median(self.rounds[side])

    def tokens_per_second(self, side: str) -> float:
        """Real tokens; padding does not count."""
        return self.tokens / self.seconds(side)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the rounds' own ratios, for sides that took turns."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


class Runner:
    """Runs a model's sides on batches: inference, or a forward and a backward pass."""

    def __init__(self, sides: Mapping[str, nn.Module], training: bool) -> None:
        self.sides = dict(sides)
        self.training = training
        self._waves: dict[torch.Size, Tensor] = {}
        for model in self.sides.values():
            model.train(training)

    def call(self, side: str, batch: Mapping[str, Tensor]) -> None:
        """One step, as it is timed."""
        self._step(self.sides[side], batch)

    def _step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if not self.training:
            with torch.inference_mode():
                return model(**batch).last_hidden_state
        model.zero_grad(set_to_none=True)
        hidden: Tensor = model(**batch).last_hidden_state
        hidden.backward(self._upstream(hidden, batch))
        return hidden.detach()

    def _upstream(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """A gradient of the real tokens' hidden states, the same for both sides and not cancelled by a last norm."""
        wave = self._waves.get(hidden.shape)
        if wave is None:
            wave = torch.arange(hidden.numel(), device=hidden.device).sin().view(hidden.shape).to(hidden.dtype)
            self._waves[hidden.shape] = wave
        return wave * batch["attention_mask"].unsqueeze(-1)

    def difference(self, case: Case) -> tuple[float, str]:
        """Largest difference of the sides on a case, in units of the largest value, and what is wrong with it.

        Dropout is off meanwhile.
        """
        if len(self.sides) < 2:
            return 0.0, ""
        largest = 0.0
        with self._evaluating():
            for batch in case.batches:
                real = batch["attention_mask"].bool()
                hidden, grads = {}, {}
                for side, model in self.sides.items():
                    hidden[side] = self._step(model, batch)[real]
                    grads[side] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                    model.zero_grad(set_to_none=True)
                got, expected = hidden["fused"], hidden["unfused"]
                difference = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
                largest = max(largest, difference)
                fault = checking.difference([got], [expected], expected.dtype, HIDDEN_DIFFERENCE)
                if fault:
                    return largest, fault.replace("result 0", "a hidden state")
                fault = _difference_of_gradients(grads["fused"], grads["unfused"], expected.dtype)
                if fault:
                    return largest, fault
        return largest, ""

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        for model in self.sides.values():
            model.eval()
        try:
            yield
        finally:
            for model in self.sides.values():
                model.train(self.training)


def _difference_of_gradients(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    names = list(expected)
    pairs = [got.get(name) for name in names], list(expected.values())
    fault = checking.difference(*pairs, dtype, checking.LARGEST_DIFFERENCE_OF_A_MODEL)
    return re.sub(r"result (\d+)", lambda found: f"the gradient of {names[int(found[1])]}", fault)


def measure(
    cases: Sequence[Case], runner: Runner, device: timing.Device, rounds: int, flops: Callable[[int], float] | None
) -> list[Measured]:
    """Check the cases, then time all sides of all of them in turns; a case that fails gets no time.

    Args:
        cases: what is compared with each other.
        runner: the model's sides.
        device: whose clock counts.
        rounds: times taken of each.
        flops: operations of a sequence by its length, if known.
    """
    results = []
    calls: dict[str, Callable[[], None]] = {}
    for i, case in enumerate(cases):
        result = Measured(case.order, case.batch, case.length, case.tokens, case.positions)
        if flops is not None:
            result.useful_flops, result.padded_flops = case.useful_flops(flops), case.padded_flops(flops)
        results.append(result)
        try:
            result.difference, result.fault = runner.difference(case)
            if not result.fault:  # as a warm-up, and to find out here what does not fit in memory
                for side in runner.sides:
                    _run(runner, side, case)
        except torch.OutOfMemoryError:
            result.fault = "out of memory"
            device.release()
        if not result.fault:
            for side in runner.sides:
                calls[f"{i} {side}"] = lambda side=side, case=case: _run(runner, side, case)  # type: ignore[misc]
    try:
        seconds = timing.take_turns(calls, device, rounds, warm_up=0)
    except torch.OutOfMemoryError:
        seconds = {}
        device.release()
    for i, result in enumerate(results):
        if not result.fault:
            result.rounds = {side: seconds[f"{i} {side}"] for side in runner.sides if f"{i} {side}" in seconds}
            result.fault = "" if result.rounds else "out of memory"
    return results


def _run(runner: Runner, side: str, case: Case) -> None:
    for batch in case.batches:
        runner.call(side, batch)
