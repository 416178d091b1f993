"""rotary: query and key turned by their positions, against the composition that Hugging Face uses."""

from __future__ import annotations

from typing import Any

import fusenc
import torch
from torch import Tensor

from ..timing import Device
from .case import Case, Given, Grid, Inputs, Point, Provider, compiled, function, points

GRIDS = {
    "cpu": [Grid(("float32",), (8,), (128,), (768,), (12,))],
    "cuda": [Grid(("float16", "bfloat16"), (32,), (512,), (768,), (12,), direction=("forward", "backward"))],
}


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def plain(query: Tensor, key: Tensor, *tables: Tensor) -> list[Tensor]:
    """The plain composition, with tables as wide as a head."""
    cos, sin = tables[2:]
    return [x * cos + _turned(x) * sin for x in (query, key)]


def cases(given: Given, device: Device) -> list[Case]:
    """One case a point."""
    return [case(point) for point in points(GRIDS, given, device) if point.fill == 1.0]


def case(point: Point) -> Case:
    """Both tensors at one point."""
    rotary: Any = fusenc.kernels.rotary
    shape = (point.batch, point.length, point.heads, point.head)

    def inputs() -> Inputs:
        heads = [t.transpose(1, 2) for t in point.random(shape, shape, shape, shape)]
        half = fusenc.kernels.rotary_tables(point.length, point.head, device=point.device)
        whole = [torch.cat((t, t), -1).to(point.torch_dtype) for t in half]
        return Inputs(heads[:2], [*half, *whole], heads[2:])

    def ours(query: Tensor, key: Tensor, *tables: Tensor) -> Any:
        return rotary(query, key, tables[0], tables[1])

    of = function(plain, point.direction)
    providers: dict[str, Provider] = {
        "eager": of, "compile": compiled(plain, point.direction), "fusenc": function(ours, point.direction),
    }  # fmt: skip
    target = point.target(1.0)
    passes = 8 if point.direction == "both" else 4
    name = f"{point.batch}x{point.length}, {point.heads} heads of {point.head}"
    return Case(
        "rotary", point.describe(name), point.dtype, point.direction, inputs, providers, ("eager",),
        {} if target is None else {"fusenc": target}, of,
        bytes=float(passes * point.tokens * point.width * point.item), tokens=point.tokens, sizes=point.sizes(),
    )  # fmt: skip
