"""add_norm: residual add and norm, against the same composition of PyTorch's own functions."""

from __future__ import annotations

from typing import Any

import fusenc
import torch.nn.functional as F
from torch import Tensor

from ..timing import Device
from .case import Case, Given, Grid, Inputs, Point, Provider, compiled, function, package, points

GRIDS = {
    "cpu": [Grid(("float32",), (8,), (512,), (768,), (1,))],
    "cuda": [Grid(("float16", "bfloat16"), (32,), (512,), (768, 1024, 4096), (1,), direction=("forward", "backward"))],
}
EPS = 1e-5


def layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The plain composition."""
    return F.layer_norm(x + residual, weight.shape, weight, bias, EPS)


def rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """The plain composition."""
    return F.rms_norm(x + residual, weight.shape, weight, EPS)


def cases(given: Given, device: Device) -> list[Case]:
    """LayerNorm and RMSNorm at each point."""
    chosen = points(GRIDS, given, device, needs_heads=False)
    return [case(point, norm) for point in chosen if point.fill == 1.0 for norm in ("layer", "rms")]


def case(point: Point, norm: str) -> Case:
    """One norm at one point."""
    add_norm: Any = fusenc.kernels.add_norm
    rms, direction = norm == "rms", point.direction
    plain: Any = rms_norm if rms else layer_norm

    def inputs() -> Inputs:
        rows, columns = (point.batch, point.length, point.width), (point.width,)
        x, residual, weight, bias, upstream = point.random(rows, rows, columns, columns, rows)
        return Inputs([x, residual, weight] if rms else [x, residual, weight, bias], [], [upstream])

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return add_norm(x, residual, weight, bias, norm=norm, eps=EPS)

    def liger() -> Any:
        ops = package("liger_kernel.ops", "Liger-Kernel")

        def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if rms:
                return ops.LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)[0]
            return ops.LigerLayerNormFunction.apply(x + residual, weight, bias, EPS)

        return function(call, direction)()

    def flash() -> Any:
        of = package("flash_attn.ops.triton.layer_norm", "flash-attn").layer_norm_fn

        def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return of(x, weight, bias, residual=residual, eps=EPS, is_rms_norm=rms)

        return function(call, direction)()

    elements = point.tokens * point.width
    passes = {"forward": 3, "backward": 3, "both": 6}.get(direction, 3)  # x, residual, result; dy, sum, dx
    target = point.target(1.0)
    providers: dict[str, Provider] = {
        "eager": function(plain, direction), "compile": compiled(plain, direction), "liger": liger,
        "flash-attn": flash, "fusenc": function(ours, direction),
    }  # fmt: skip
    return Case(
        "add_norm", point.describe(f"{norm}, {point.batch}x{point.length}x{point.width}"), point.dtype, direction,
        inputs, providers, ("eager",), {} if target is None else {"fusenc": target}, function(plain, direction),
        bytes=float(passes * elements * point.item), tokens=point.tokens, sizes=point.sizes(norm),
    )  # fmt: skip
