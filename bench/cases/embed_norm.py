"""embed_norm: word, position and type embeddings with their norm, against what BertEmbeddings calls."""

from __future__ import annotations

from typing import Any

import fusenc
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..timing import Device
from .case import Call, Case, Given, Grid, Inputs, Point, Provider, compiled, directed, function, package, points

GRIDS = {
    "cpu": [Grid(("float32",), (32,), (128,), (384, 768), (1,))],
    "cuda": [Grid(("float16", "bfloat16"), (32,), (512,), (768, 1024), (1,), direction=("forward", "backward"))],
}
VOCABULARY, TYPES = 30522, 2
EPS = 1e-12


def plain(word: Tensor, position: Tensor, type_: Tensor, weight: Tensor, bias: Tensor, *ids: Tensor) -> Tensor:
    """The plain composition."""
    total = F.embedding(ids[0], word) + F.embedding(ids[1], type_) + F.embedding(ids[2], position)
    return F.layer_norm(total, weight.shape, weight, bias, EPS)


def cases(given: Given, device: Device) -> list[Case]:
    """One case a point."""
    return [case(p) for p in points(GRIDS, given, device, needs_heads=False) if p.fill == 1.0]


def case(point: Point, vocabulary: int = VOCABULARY) -> Case:
    """The embeddings at one point."""
    embed_norm: Any = fusenc.kernels.embed_norm
    width, length, direction = point.width, point.length, point.direction
    positions = max(length, 512)

    def inputs() -> Inputs:
        tables = point.random((vocabulary, width), (positions, width), (TYPES, width), (width,), (width,))
        upstream = point.random((point.batch, length, width))
        generator = torch.Generator().manual_seed(0)
        size = (point.batch, length)
        ids = [torch.randint(0, n, size, generator=generator).to(point.device) for n in (vocabulary, TYPES)]
        return Inputs(tables, [*ids, torch.arange(length, device=point.device)[None]], upstream)

    def ours(*arguments: Tensor) -> Tensor:
        *tables, ids, types, _ = arguments
        return embed_norm(ids, *tables, token_type_ids=types, eps=EPS)

    def huggingface() -> Any:
        of = package("transformers.models.bert.modeling_bert", "transformers").BertEmbeddings
        config = package("transformers", "transformers").BertConfig(
            vocab_size=vocabulary, hidden_size=width, max_position_embeddings=positions, hidden_dropout_prob=0.0,
            layer_norm_eps=EPS, pad_token_id=None,
        )  # fmt: skip
        module = of(config).to(point.device)
        norm = module.LayerNorm
        places: list[tuple[nn.Module, str]] = [
            (module.word_embeddings, "weight"), (module.position_embeddings, "weight"),
            (module.token_type_embeddings, "weight"), (norm, "weight"), (norm, "bias"),
        ]  # fmt: skip

        def make(inputs: Inputs) -> Call:
            for (owner, name), leaf in zip(places, inputs.leaves, strict=True):
                setattr(owner, name, nn.Parameter(leaf))
            parameters = [getattr(owner, name) for owner, name in places]
            ids = Inputs([], inputs.others[:2], inputs.upstream)
            return directed(lambda i, t: module(input_ids=i, token_type_ids=t), ids, direction, parameters)

        return make

    rows, tables = point.tokens * width, (vocabulary + positions + TYPES) * width
    passes = {"forward": 2 * rows, "backward": 2 * rows + tables, "both": 4 * rows + tables}
    target = point.target(1.0)
    providers: dict[str, Provider] = {
        "eager": function(plain, direction), "compile": compiled(plain, direction), "hf-eager": huggingface,
        "fusenc": function(ours, direction),
    }  # fmt: skip
    return Case(
        "embed_norm", point.describe(f"{point.batch}x{length}x{width}"), point.dtype, direction, inputs, providers,
        ("eager",), {} if target is None else {"fusenc": target}, function(plain, direction),
        bytes=float(passes.get(direction, 2 * rows) * point.item), tokens=point.tokens, sizes=point.sizes(),
    )  # fmt: skip
