"""A Transformer encoder layer against torch.nn's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import fusenc
import torch
from torch import Tensor, nn

from ..checking import LARGEST_DIFFERENCE_OF_A_MODEL
from ..timing import Device
from .case import (
    DROPOUT,
    AbsentError,
    Call,
    Case,
    Given,
    Grid,
    Inputs,
    Maker,
    Point,
    Provider,
    View,
    directed,
    points,
    real_rows,
)

_HALF = ("float16", "bfloat16")
GRIDS = {
    "cpu": [Grid(("float32",), (8,), (128,), (384,), (12,), (1.0, 0.58))],
    "cuda": [Grid(_HALF, (32,), (128, 512), (768,), (12,), (1.0, 0.58), ("forward", "backward", "both"))],
}


def cases(given: Given, device: Device) -> list[Case]:
    """One case a point; a ragged batch with its padding masked, and packed. Without padding, training with dropout
    too."""
    return [
        case(point, dropout=dropout)
        for point in points(GRIDS, given, device)
        for dropout in ((0.0, 0.1) if point.direction == "both" and point.fill == 1.0 else (0.0,))
    ]


def case(point: Point, hidden: int | None = None, dropout: float = 0.0) -> Case:
    """A post-norm layer with GELU at one point."""
    ragged, direction, width = point.fill < 1.0, point.direction, point.width
    hidden = 4 * width if hidden is None else hidden
    inference = direction == "forward"

    def layer(kind: type[nn.TransformerEncoderLayer], recompute: bool = False) -> nn.TransformerEncoderLayer:
        torch.manual_seed(0)  # the same seed gives the same weights
        made = kind(width, point.heads, hidden, dropout, "gelu", batch_first=True)
        if recompute:
            made.recompute = True  # type: ignore[assignment]
        return made.to(point.device, point.torch_dtype).train(not inference)

    def inputs() -> Inputs:
        rows = (point.batch, point.length, width)
        source, upstream = point.random(rows, rows)
        if not ragged:
            return Inputs([source], [], [upstream])
        real = point.real()
        return Inputs([source], [~real], [upstream * real[:, :, None]])

    def module(of: nn.Module, fast: bool = True) -> Maker:
        parameters = list(of.parameters())

        def call(source: Tensor, padding: Tensor | None = None) -> Tensor:
            return of(source, src_key_padding_mask=padding)

        def plain(source: Tensor, padding: Tensor | None = None) -> Tensor:
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # part of what is timed, some 0.2 us
            out = of(source, src_key_padding_mask=padding)
            torch.backends.mha.set_fastpath_enabled(before)
            return out

        return lambda inputs: directed(call if fast else plain, inputs, direction, parameters)

    def fast_path() -> Maker:
        if not inference:
            raise AbsentError("torch.nn's fast path serves inference only")
        return module(layer(nn.TransformerEncoderLayer))

    def compiled() -> Maker:
        of = layer(nn.TransformerEncoderLayer)
        parameters = list(of.parameters())
        call = torch.compile(lambda source, padding=None: of(source, src_key_padding_mask=padding), dynamic=False)
        return lambda inputs: directed(call, inputs, direction, parameters)

    def packed() -> Maker:
        weights, parameters = _weights(layer(nn.TransformerEncoderLayer))
        starts, longest = point.starts(), point.length
        encoder_layer: Any = fusenc.kernels.encoder_layer

        def make(inputs: Inputs) -> Call:
            """Packing is not timed, since a model does it once for all its layers."""
            real = point.real()
            tokens = Inputs([inputs.leaves[0][real]], [], [inputs.upstream[0][real]])
            options = {"cu_seqlens": starts, "max_seqlen": longest}
            return directed(lambda x: encoder_layer(x, weights, point.heads, **options), tokens, direction, parameters)

        return make

    def reference() -> Maker:
        wide = copy.deepcopy(layer(nn.TransformerEncoderLayer))
        return lambda inputs: module(wide.to(inputs.leaves[0].dtype), fast=False)(inputs)

    providers: dict[str, Provider] = {
        "torch.nn": lambda: module(layer(nn.TransformerEncoderLayer), fast=False), "fast-path": fast_path,
        "compile": compiled, "fusenc": lambda: module(layer(fusenc.TransformerEncoderLayer)),
        **({} if inference else {"fusenc-recompute": lambda: module(layer(fusenc.TransformerEncoderLayer, True))}),
        **({"fusenc-packed": packed} if ragged and not dropout else {}),
    }  # fmt: skip
    whole = ("torch.nn", "fast-path", "compile", "fusenc", "fusenc-recompute", "reference")
    views: dict[str, View] = dict.fromkeys(whole, real_rows(point)) if ragged else {}
    pairs = sum(n * n for n in point.lengths)
    weights = 4 * width * width + 2 * width * hidden
    flops, moved = work(point.tokens, pairs, width, weights, direction)
    name = f"{point.batch}x{point.length}x{width}, {point.heads} heads{f', dropout {dropout}' if dropout else ''}"
    return Case(
        "layer", point.describe(name), point.dtype, direction, inputs, providers, ("torch.nn", "fast-path"), {},
        None if dropout else reference, DROPOUT if dropout else "", views, LARGEST_DIFFERENCE_OF_A_MODEL, flops,
        moved * point.item, point.tokens, point.sizes(),
        judge=None if dropout or point.dtype == "float32" else
        lambda: module(layer(nn.TransformerEncoderLayer), fast=False),
        kept_unit=point.tokens * width * point.item,
    )  # fmt: skip


def work(tokens: int, pairs: int, width: int, weights: int, direction: str) -> tuple[float, float]:
    """FLOPs of one layer, and the elements that it has to move at least: what goes in and out, and the weights."""
    products, matrices = {"forward": (1, 2), "backward": (2, 5), "both": (3, 7)}.get(direction, (1, 2))
    rows = {"forward": 2, "backward": 3, "both": 5}.get(direction, 2)
    flops = 2.0 * products * tokens * weights + 2.0 * matrices * pairs * width
    return flops, float(rows * tokens * width + products * weights)


def _weights(layer: nn.TransformerEncoderLayer) -> tuple[Any, Sequence[Tensor]]:
    attention, norm1, norm2 = layer.self_attn, layer.norm1, layer.norm2
    names = fusenc.kernels.LayerWeights(
        attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias,
        norm1.weight, norm1.bias, layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias,
        norm2.weight, norm2.bias,
    )  # fmt: skip
    return names, list(layer.parameters())
