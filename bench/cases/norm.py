"""add_norm on many rows, against the same composition in eager PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import fusenc
import torch
import torch.nn.functional as F

from .case import Call, Case


def cases() -> list[Case]:
    torch.manual_seed(0)
    shapes = ((4096, 768), (4096, 768), (768,), (768,))
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    upstream = torch.ones(4096, 768)
    add_norm: Any = fusenc.kernels.add_norm

    def layer_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + residual, (768,), weight, bias)

    def rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x + residual, (768,), weight, 1e-5) + bias

    def forward(call: Callable[..., torch.Tensor]) -> Call:
        def run() -> None:
            with torch.no_grad():
                call(*leaves)

        return run

    def both(call: Callable[..., torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(call(*leaves), leaves, upstream)

    cases = []
    for norm, theirs in (("layer", layer_norm), ("rms", rms_norm)):
        ours = functools.partial(add_norm, norm=norm)
        for name, wrap in (("forward", forward), ("forward and backward", both)):
            against = f"F.{norm}_norm(x + r)"
            cases.append(Case(f"add_norm 4096x768, {norm}, {name}", wrap(theirs), wrap(ours), 3, 1.0, against))
    return cases
