"""Embeddings with their norm against BertEmbeddings' calls, rotary positions against Hugging Face's, and the host cost
of both on tiny inputs."""

from __future__ import annotations

from typing import Any

import fusenc
import torch
import torch.nn.functional as F

from .case import Case


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    embed_norm, rotary = fusenc.kernels.embed_norm, fusenc.kernels.rotary
    cases = []
    for shape, width, vocabulary in (((32, 128), 768, 30522), ((32, 128), 384, 30522), ((1, 8), 64, 100)):
        tiny = shape[0] == 1
        tables = [torch.randn(n, width, generator=generator) for n in (vocabulary, 512, 2)]
        norm = [torch.ones(width), torch.zeros(width)]
        leaves = [t.clone().requires_grad_() for t in (*tables, *norm)]
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        kinds, places = torch.randint(0, 2, shape, generator=generator), torch.arange(shape[1])[None]
        upstream = torch.randn(*shape, width, generator=generator)

        def theirs(tables: Any, ids: Any = ids, kinds: Any = kinds, places: Any = places) -> torch.Tensor:
            word, position, type_, weight, bias = tables
            total = F.embedding(ids, word) + F.embedding(kinds, type_) + F.embedding(places, position)
            return F.layer_norm(total, weight.shape, weight, bias, 1e-12)

        def ours(tables: Any, ids: Any = ids, kinds: Any = kinds) -> torch.Tensor:
            return embed_norm(ids, *tables, token_type_ids=kinds)

        name = f"embed_norm {shape[0]}x{shape[1]}x{width}"
        for kind, given, calls, target in (
            ("no gradients", [*tables, *norm], 500 if tiny else 5, 1 / 1.3 if tiny else 1.0),
            ("forward and backward", leaves, 200 if tiny else 2, 1 / 1.8 if tiny else 1.0),
        ):
            finish = (lambda out, u=upstream: out.backward(u)) if given is leaves else (lambda out: None)  # type: ignore[misc]
            sides = [lambda f=f, g=given, end=finish: end(f(g)) for f in (theirs, ours)]  # type: ignore[misc]
            cases.append(Case(f"{name}, {kind}", sides[0], sides[1], calls, target, "F.embedding, F.layer_norm"))
    sizes: list[tuple[int, ...]] = [(8, 12, 128, 64), (1, 1, 8, 64)]
    for size in sizes:
        tiny = size[0] == 1
        heads = [torch.randn(size, generator=generator) for _ in range(2)]
        heads = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in heads]
        leaves = [t.clone().requires_grad_() for t in heads]
        turns = fusenc.kernels.rotary_tables(size[2], size[3])
        doubled = [torch.cat((t, t), -1)[None] for t in turns]

        def turned(x: torch.Tensor) -> torch.Tensor:
            a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return torch.cat((-b, a), dim=-1)

        def composed(q: Any, k: Any, doubled: Any = doubled) -> list[torch.Tensor]:
            cos, sin = (t.unsqueeze(1) for t in doubled)
            return [(x * cos) + (turned(x) * sin) for x in (q, k)]

        def fused(q: Any, k: Any, turns: Any = turns) -> Any:
            return rotary(q, k, *turns)

        for kind, given, calls, target in (
            ("no gradients", heads, 500 if tiny else 10, 1 / 1.3 if tiny else 1.0),
            ("forward and backward", leaves, 200 if tiny else 5, 1 / 1.8 if tiny else 1.0),
        ):
            finish = (  # type: ignore[assignment]
                (lambda out, h=heads, g=given: torch.autograd.grad(list(out), g, h))
                if given is leaves
                else (lambda out: None)
            )
            sides = [lambda f=f, g=given, end=finish: end(f(*g)) for f in (composed, fused)]  # type: ignore[misc]
            name = f"rotary {'x'.join(map(str, size))}, {kind}"
            cases.append(Case(name, sides[0], sides[1], calls, target, "apply_rotary_pos_emb"))
    return cases
