"""`MultiheadAttention` and a decoder layer against torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fusenc
import torch
from torch import Tensor, nn

from ..checking import LARGEST_DIFFERENCE_OF_A_MODEL
from ..timing import Device
from .case import AbsentError, Case, Given, Grid, Inputs, Maker, Point, Provider, View, directed, points, real_rows
from .layer import work

_HALF = ("float16", "bfloat16")
GRIDS = {
    "cpu": [Grid(("float32",), (8,), (128,), (384,), (12,), (1.0, 0.58))],
    "cuda": [Grid(_HALF, (32,), (128, 512), (768,), (12,), (1.0, 0.58), ("forward", "backward", "both"))],
}
LEAST_RATIO = 0.97
"""Of torch's better path, without padding; with it nothing is promised: packing pays over several layers."""


@dataclass(frozen=True)
class _Module:
    """A module that both libraries have."""

    name: str
    theirs: type[nn.Module]
    ours: type[nn.Module]
    arguments: Callable[[Point], dict[str, Any]]
    call: Callable[..., Tensor]
    """Of the module, as many tensors ``[B, L, width]`` as it reads, and the padding (True is masked) or None."""
    reads: int
    weights: Callable[[int], int]
    """Elements of its matrices at a width."""
    attentions: int


def _attend(of: nn.Module, source: Tensor, padding: Tensor | None = None) -> Tensor:
    return of(source, source, source, key_padding_mask=padding, need_weights=False)[0]


def _decode(of: nn.Module, target: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
    causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], target.device, target.dtype)
    return of(target, memory, causal, memory_key_padding_mask=padding, tgt_is_causal=True)


MODULES = (
    _Module(
        "MultiheadAttention", nn.MultiheadAttention, fusenc.MultiheadAttention,
        lambda point: {"embed_dim": point.width, "num_heads": point.heads}, _attend, 1, lambda width: 4 * width**2, 1,
    ),
    _Module(
        "TransformerDecoderLayer", nn.TransformerDecoderLayer, fusenc.TransformerDecoderLayer,
        lambda point: {"d_model": point.width, "nhead": point.heads, "dim_feedforward": 4 * point.width,
                       "dropout": 0.0, "activation": "gelu"},
        _decode, 2, lambda width: 16 * width**2, 2,
    ),
)  # fmt: skip


def cases(given: Given, device: Device) -> list[Case]:
    """Each module at each point: self-attention, and a causal decoder layer on a memory; padding is masked."""
    return [case(module, point) for point in points(GRIDS, given, device) for module in MODULES]


def case(module: _Module, point: Point) -> Case:
    """A module without dropout at one point."""
    ragged, direction = point.fill < 1.0, point.direction
    rows = (point.batch, point.length, point.width)

    def made(kind: type[nn.Module], dtype: torch.dtype = point.torch_dtype) -> nn.Module:
        torch.manual_seed(0)  # the same seed gives the same weights
        of = kind(batch_first=True, **module.arguments(point))
        return of.to(point.device, point.torch_dtype).to(dtype).train(direction != "forward")

    def inputs() -> Inputs:
        *leaves, upstream = point.random(*[rows] * (module.reads + 1))
        real = point.real()
        return Inputs(leaves, [~real] if ragged else [], [upstream * real[:, :, None]])

    def run(of: nn.Module, fast: bool = True) -> Maker:
        def call(*tensors: Tensor) -> Tensor:
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(fast)  # part of what is timed, some 0.2 us
            out = module.call(of, *tensors)
            torch.backends.mha.set_fastpath_enabled(before)
            return out

        return lambda inputs: directed(call, inputs, direction, list(of.parameters()))

    def fast_path() -> Maker:
        if direction != "forward":
            raise AbsentError("torch.nn's fast path serves inference only")
        return run(made(module.theirs))

    def reference() -> Maker:
        return lambda inputs: run(made(module.theirs, inputs.leaves[0].dtype), fast=False)(inputs)

    providers: dict[str, Provider] = {
        "torch.nn": lambda: run(made(module.theirs), fast=False), "fast-path": fast_path,
        "fusenc": lambda: run(made(module.ours)),
    }  # fmt: skip
    views: dict[str, View] = dict.fromkeys((*providers, "reference"), real_rows(point)) if ragged else {}
    target = None if ragged else point.target(LEAST_RATIO)
    pairs = module.attentions * sum(n * n for n in point.lengths)
    flops, moved = work(point.tokens, pairs, point.width, module.weights(point.width), direction)
    name = f"{module.name}, {point.batch}x{point.length}x{point.width}, {point.heads} heads"
    return Case(
        "decoder", point.describe(name), point.dtype, direction, inputs, providers, ("torch.nn", "fast-path"),
        {} if target is None else {"fusenc": target}, reference, "", views, LARGEST_DIFFERENCE_OF_A_MODEL, flops,
        moved * point.item, point.tokens, point.sizes(module.name),
    )  # fmt: skip
