"""The feed-forward block against the same composition of PyTorch's own functions."""

from __future__ import annotations

from typing import Any

import fusenc
import torch
import torch.nn.functional as F

from .case import Case


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    ffn: Any = fusenc.kernels.ffn
    cases = []

    def theirs(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, gated: bool, residual: bool) -> torch.Tensor:
        hidden = F.linear(x, w1, b1)
        if gated:
            gate, up = hidden.chunk(2, -1)
            out = F.linear(F.silu(gate) * up, w2, b2)
        else:
            out = F.linear(F.gelu(hidden), w2, b2)
        return out + x if residual else out

    def ours(*arguments: Any) -> torch.Tensor:
        *tensors, gated, residual = arguments
        activation = "silu" if gated else "gelu"
        return ffn(*tensors, activation=activation, gated=gated, residual=tensors[0] if residual else None)

    for rows, d_model, d_hidden in ((8, 64, 128), (4096, 384, 1536), (2048, 768, 3072)):
        tiny = rows == 8
        for gated, residual in ((False, False), (False, True), (True, False)):
            width = 2 * d_hidden if gated else d_hidden
            shapes = ((rows, d_model), (width, d_model), (width,), (d_model, d_hidden), (d_model,))
            plain = [torch.randn(shape, generator=generator) for shape in shapes]
            leaves = [t.clone().requires_grad_() for t in plain]
            upstream = torch.ones(rows, d_model)
            name = f"ffn {rows}x{d_model}x{d_hidden}{', gated' * gated}{', residual' * residual}"

            def train(call: Any, options: Any, leaves: Any = leaves, upstream: Any = upstream) -> None:
                torch.autograd.grad(call(*leaves, *options), leaves, upstream)

            options = (gated, residual)
            for kind, calls, target, pair in (
                ("no gradients", 500 if tiny else 1, 1 / 1.3 if tiny else 1.0,
                 [lambda call=call, p=plain, o=options: call(*p, *o) for call in (theirs, ours)]),
                ("forward and backward", 100 if tiny else 1, 1 / 1.8 if tiny else 1.0,
                 [lambda call=call, t=train, o=options: t(call, o) for call in (theirs, ours)]),
            ):  # fmt: skip
                cases.append(Case(f"{name}, {kind}", pair[0], pair[1], calls, target, "F.linear, F.gelu or F.silu"))
    return cases
