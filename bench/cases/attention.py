"""Attention alone: dense against torch's own, and packed against torch's with padding and a mask."""

from __future__ import annotations

from typing import Any

import fusenc
import torch
import torch.nn.functional as F

from .case import Call, Case


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    attention: Any = fusenc.kernels.attention
    attention_varlen: Any = fusenc.kernels.attention_varlen
    sdpa: Any = F.scaled_dot_product_attention

    def both(name: str, theirs: Call, ours: Call, leaves: list[torch.Tensor], calls: int, target: float) -> None:
        # Packed outputs lack the padding, so each side has an upstream gradient of its own shape.
        ends = {
            "": lambda out: None,
            ", forward and backward": lambda out: torch.autograd.grad(out.sum(), leaves, allow_unused=True),
        }
        for end, finish in ends.items():
            sides = [lambda call=call, finish=finish: finish(call()) for call in (theirs, ours)]
            cases.append(Case(name + end, sides[0], sides[1], calls, target, "F.scaled_dot_product_attention"))

    q, k, v = (torch.randn(4, 8, 256, 64, generator=generator).requires_grad_() for _ in range(3))
    keep = (torch.arange(256) < torch.tensor([256, 200, 130, 90])[:, None])[:, None, None]
    options: dict[str, dict[str, Any]] = {"dense": {}, "causal": {"is_causal": True}, "bool mask": {"attn_mask": keep}}
    for name, chosen in options.items():
        theirs, ours = (lambda call=call, chosen=chosen: call(q, k, v, **chosen) for call in (sdpa, attention))
        both(f"attention 4x8x256x64, {name}", theirs, ours, [q, k, v], 5, 0.95)

    lengths = torch.randint(16, 257, (16,), generator=generator).sort().values.tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    fill = sum(lengths) / (16 * 256)
    packed = [torch.randn(int(starts[-1]), 8, 64, generator=generator).requires_grad_() for _ in range(3)]
    padded = [torch.randn(16, 8, 256, 64, generator=generator).requires_grad_() for _ in range(3)]
    real = (torch.arange(256) < torch.tensor(lengths)[:, None])[:, None, None]
    both(
        f"attention_varlen, 16 sequences up to 256, fill {fill:.2f}",
        lambda: sdpa(*padded, real),
        lambda: attention_varlen(*packed, starts, starts, 256, 256),
        [*padded, *packed], 2, 0.9 / fill,
    )  # fmt: skip
    return cases
