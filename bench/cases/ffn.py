"""The feed-forward block against the same composition of PyTorch's own functions."""

from __future__ import annotations

from typing import Any

import fusenc
import torch.nn.functional as F
from torch import Tensor

from ..timing import Device
from .case import AbsentError, Case, Given, Grid, Inputs, Maker, Point, Provider, compiled, function, package, points

GRIDS = {
    "cpu": [Grid(("float32",), (batch,), (512,), (width,), (1,)) for batch, width in ((8, 384), (4, 768))],
    "cuda": [Grid(("float16", "bfloat16"), (32,), (512,), (768, 1024), (1,), direction=("forward", "backward"))],
}
VARIANTS = {"gelu": (False, False), "gelu, residual": (False, True), "swiglu": (True, False)}
"""Whether gated, and whether a residual is added."""


def cases(given: Given, device: Device) -> list[Case]:
    """Plain, with a residual, and gated, at each point; the hidden layer is four times as wide as the model."""
    chosen = points(GRIDS, given, device, needs_heads=False)
    return [case(point, variant) for point in chosen if point.fill == 1.0 for variant in VARIANTS]


def product(point: Point) -> Case:
    """The first product alone with its bias and GELU, `linear_act`, at one point."""
    linear_act: Any = fusenc.kernels.linear_act
    width, hidden, direction = point.width, 4 * point.width, point.direction

    def inputs() -> Inputs:
        rows = (point.batch, point.length)
        x, weight, bias, upstream = point.random((*rows, width), (hidden, width), (hidden,), (*rows, hidden))
        return Inputs([x, weight * width**-0.5, bias], [], [upstream])

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    passes = {"forward": 1, "backward": 2, "both": 3}.get(direction, 1)
    elements = point.tokens * (width + hidden) + width * hidden
    providers: dict[str, Provider] = {
        "eager": function(plain, direction), "compile": compiled(plain, direction),
        "fusenc": function(lambda *tensors: linear_act(*tensors, "gelu"), direction),
    }  # fmt: skip
    return Case(
        "linear_act", point.describe(f"{point.tokens}x{width}x{hidden}"), point.dtype, direction, inputs, providers,
        ("eager", "compile"), {}, function(plain, direction), flops=2.0 * passes * point.tokens * width * hidden,
        bytes=float(passes * elements * point.item), tokens=point.tokens, sizes=point.sizes(),
    )  # fmt: skip


def case(point: Point, variant: str, hidden: int | None = None) -> Case:
    """One variant at one point."""
    ffn: Any = fusenc.kernels.ffn
    gated, residual = VARIANTS[variant]
    width, direction = point.width, point.direction
    hidden = 4 * width if hidden is None else hidden
    first = 2 * hidden if gated else hidden

    def inputs() -> Inputs:
        rows = (point.batch, point.length, width)
        shapes = (rows, (first, width), (first,), (width, hidden), (width,), rows)
        x, w1, b1, w2, b2, upstream = point.random(*shapes)
        return Inputs([x, w1 * width**-0.5, b1, w2 * hidden**-0.5, b2], [], [upstream])

    def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        inner = F.linear(x, w1, b1)
        if gated:
            gate, up = inner.chunk(2, -1)
            out = F.linear(F.silu(gate) * up, w2, b2)
        else:
            out = F.linear(F.gelu(inner), w2, b2)
        return out + x if residual else out

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        activation = "silu" if gated else "gelu"
        return ffn(x, *weights, activation=activation, gated=gated, residual=x if residual else None)

    def liger() -> Maker:
        if not gated:
            raise AbsentError("Liger-Kernel has no feed-forward without a gate")
        if direction == "backward":
            raise AbsentError("its backward pass overwrites what the forward pass saved, so it cannot be repeated")
        of = package("liger_kernel.ops", "Liger-Kernel").LigerSiLUMulFunction

        def call(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            return F.linear(of.apply(*F.linear(x, w1, b1).chunk(2, -1)), w2, b2)

        return function(call, direction)()

    weights = first * width + hidden * width
    passes = {"forward": 1, "backward": 2, "both": 3}.get(direction, 1)
    rows = point.tokens * width * {"forward": 2, "backward": 3, "both": 5}.get(direction, 2)
    target = point.target(1.0)
    providers: dict[str, Provider] = {
        "eager": function(plain, direction), "compile": compiled(plain, direction), "liger": liger,
        "fusenc": function(ours, direction),
    }  # fmt: skip
    return Case(
        "ffn", point.describe(f"{variant}, {point.batch}x{point.length}x{width}x{hidden}"), point.dtype, direction,
        inputs, providers, ("eager",), {} if target is None else {"fusenc": target}, function(plain, direction),
        flops=2.0 * passes * point.tokens * weights, bytes=float((rows + passes * weights) * point.item),
        tokens=point.tokens, sizes=point.sizes(variant),
    )  # fmt: skip
