"""Tiny inputs, where all that is measured is what a call costs before the work begins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fusenc
import torch
import torch.nn.functional as F
from torch import nn

from .case import Call, Case


def cases() -> list[Case]:
    torch.manual_seed(0)
    x, residual, weight, bias = (torch.randn(s) for s in ((8, 64), (8, 64), (64,), (64,)))
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    upstream = torch.ones(8, 64)

    def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + residual, (64,), weight, bias)

    def without_gradients(call: Call) -> Call:
        def run() -> None:
            with torch.no_grad():
                call()

        return run

    add_norm: Any = fusenc.kernels.add_norm
    arguments = (x, residual, weight, bias)
    cases = [
        Case("add_norm 8x64, no gradients", lambda: eager(*arguments), lambda: add_norm(*arguments), 500, 1 / 1.3,
             "F.layer_norm(x + r)"),
        Case("add_norm 8x64, forward with gradients", lambda: eager(*leaves), lambda: add_norm(*leaves), 500, 1 / 1.8,
             "F.layer_norm(x + r)"),
        Case("add_norm 8x64, forward and backward", lambda: eager(*leaves).backward(upstream),
             lambda: add_norm(*leaves).backward(upstream), 100, 1 / 1.8, "F.layer_norm(x + r)"),
    ]  # fmt: skip
    source = torch.randn(1, 8, 64)
    for dropout in (0.0, 0.1):
        options: dict[str, Any] = {"dropout": dropout, "activation": "gelu", "batch_first": True}
        theirs = nn.TransformerEncoderLayer(64, 4, 128, **options)
        ours = fusenc.TransformerEncoderLayer(64, 4, 128, **options)
        ours.load_state_dict(theirs.state_dict())
        if dropout == 0.0:
            evaluated = copy.deepcopy(theirs).eval(), copy.deepcopy(ours).eval()
            cases.append(_layer_case("layer 1x8x64, inference", evaluated, source, without_gradients))
            cases.append(
                _layer_case("layer 1x8x64, inference, torch's plain path", evaluated, source, without_gradients, False)
            )
        name = f"layer 1x8x64, training, dropout {dropout}"
        cases.append(_layer_case(f"{name}, forward", (theirs, ours), source, lambda call: call))
        cases.append(
            Case(f"{name}, forward and backward", lambda t=theirs: t(source).sum().backward(),  # type: ignore[misc]
                 lambda o=ours: o(source).sum().backward(), 20, 1 / 1.2, "nn.TransformerEncoderLayer")  # type: ignore[misc]
        )  # fmt: skip
    return cases


def _layer_case(
    name: str,
    layers: tuple[nn.Module, nn.Module],
    source: torch.Tensor,
    wrap: Callable[[Call], Call],
    fast: bool = True,
) -> Case:
    def theirs() -> None:
        layers[0](source)

    def plain() -> None:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # part of what is timed, some 0.2 us
        layers[0](source)
        torch.backends.mha.set_fastpath_enabled(before)

    return Case(
        name,
        wrap(theirs if fast else plain),
        wrap(lambda: layers[1](source)),
        50,
        1 / 1.2,
        "nn.TransformerEncoderLayer",
    )
