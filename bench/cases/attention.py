"""Attention alone: dense, causal, and ragged batches with a padding mask or packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusenc
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    compiled,
    directed,
    flat,
    function,
    optimized,
    package,
    points,
)

_HALF = ("float16", "bfloat16")
GRIDS = {
    "cpu": [Grid(("float32",), (4,), (256,), (512,), (8,)), Grid(("float32",), (16,), (256,), (512,), (8,), (0.58,))],
    "cuda": [
        Grid(_HALF, (batch,), (length,), (1024,), (16,), fill, ("forward", "backward"))
        for batch, length, fill in ((32, 512, (1.0, 0.58)), (8, 2048, (1.0,)), (4, 4096, (1.0,)))
    ],
}
BACKENDS = {
    "sdpa-math": SDPBackend.MATH, "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}  # fmt: skip


def cases(given: Given, device: Device) -> list[Case]:
    """A dense batch plain and causal; a ragged one with its padding masked or left out."""
    found = []
    for point in points(GRIDS, given, device):
        found += [case(point, causal) for causal in ((False, True) if point.fill == 1.0 else (False,))]
    return found


_AT_ONCE = 1 << 27
"""Scores that the reference computes at once, in float64 a GiB."""


def case(point: Point, causal: bool, dropout: float = 0.0) -> Case:
    """One kind of attention at one point."""
    ragged, direction, heads = point.fill < 1.0, point.direction, point.heads
    attention: Any = fusenc.kernels.attention
    attention_varlen: Any = fusenc.kernels.attention_varlen
    sdpa: Any = F.scaled_dot_product_attention
    # A mask only where there is one to give: torch leaves its fast kernels for it.
    options: dict[str, Any] = {"is_causal": True} if causal else {}
    if dropout:
        options["dropout_p"] = dropout

    def inputs() -> Inputs:
        shape = (point.batch, point.length, heads, point.head)  # as a model's projections leave them
        *leaves, upstream = (t.transpose(1, 2) for t in point.random(shape, shape, shape, shape))
        if not ragged:
            return Inputs(leaves, [], [upstream])
        real = point.real()
        return Inputs(leaves, [real[:, None, None]], [upstream * real[:, None, :, None]])

    def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(-1), dropout) @ value

    def in_parts(inputs: Inputs) -> Call:
        """The reference, some sequences or heads at a time, so that long ones fit in memory."""
        scores = point.length**2
        some_heads = max(1, min(heads, _AT_ONCE // scores))
        some = max(1, _AT_ONCE // (scores * heads))

        def part(b: int, h: int) -> list[Tensor | None]:
            rows, columns = slice(b, b + some), slice(h, h + some_heads)
            leaves, upstream = ([t[rows, columns] for t in of] for of in (inputs.leaves, inputs.upstream))
            return flat(directed(plain, Inputs(leaves, [t[rows] for t in inputs.others], upstream), direction)())

        def call() -> list[Tensor]:
            beside = [[part(b, h) for h in range(0, heads, some_heads)] for b in range(0, point.batch, some)]
            whole: Any = [[torch.cat(found, 1) for found in zip(*row, strict=True)] for row in beside]  # type: ignore[arg-type]
            return [torch.cat(found) for found in zip(*whole, strict=True)]

        return call

    def undropped(of: Provider) -> Provider:
        def make() -> Maker:
            if dropout:
                raise AbsentError("measured without dropout only")
            return of()

        return make

    def through(backend: SDPBackend) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(*tensors, **options)

        return call

    def flex() -> Maker:
        flexible = package("torch.nn.attention.flex_attention", "FlexAttention")
        # In a rehearsal of the GPU's cases it is not compiled: inductor's code for a CPU corrupts memory in torch 2.11.
        rehearsed = point.kind == "cuda" and point.device == "cpu"
        of = flexible.flex_attention if rehearsed else optimized(flexible.flex_attention)
        lengths = torch.tensor(point.lengths, device=point.device)

        def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q >= k if causal else k < lengths[b]

        mask = None
        if causal or ragged:
            size = (point.batch if ragged else None, None, point.length, point.length)
            mask = flexible.create_block_mask(keep, *size, device=point.device)
        return function(lambda q, k, v, *_: of(q, k, v, block_mask=mask), direction)()

    def packed(of: Callable[..., Tensor]) -> Maker:
        """Of `[T, H, D]` tensors; packing is not timed, since a model does it once for all its layers."""

        def make(inputs: Inputs) -> Call:
            real = point.real()
            leaves, upstream = ([t.transpose(1, 2)[real] for t in part] for part in (inputs.leaves, inputs.upstream))
            return directed(of, Inputs(leaves, [], upstream), direction)

        return make

    def ours_packed() -> Maker:
        starts, longest = point.starts(), point.length
        return packed(lambda q, k, v: attention_varlen(q, k, v, starts, starts, longest, longest))

    def flash() -> Maker:
        module = package("flash_attn", "flash-attn")
        if ragged:
            starts, longest = point.starts(), point.length
            return packed(lambda *qkv: module.flash_attn_varlen_func(*qkv, starts, starts, longest, longest))

        def call(*qkv: Tensor) -> Tensor:
            return module.flash_attn_func(*(t.transpose(1, 2) for t in qkv), causal=causal).transpose(1, 2)

        return function(call, direction)()

    def xformers() -> Maker:
        ops = package("xformers.ops", "xformers")
        if ragged:
            bias = ops.fmha.BlockDiagonalMask.from_seqlens(point.lengths)
            return packed(lambda *qkv: ops.memory_efficient_attention(*(t[None] for t in qkv), attn_bias=bias)[0])
        bias = ops.LowerTriangularMask() if causal else None

        def call(*qkv: Tensor) -> Tensor:
            out = ops.memory_efficient_attention(*(t.transpose(1, 2) for t in qkv), attn_bias=bias)
            return out.transpose(1, 2)

        return function(call, direction)()

    def real_tokens(results: list[Tensor | None]) -> list[Tensor | None]:
        real = point.real()
        return [None if t is None else t.transpose(1, 2)[real.to(t.device)] for t in results]

    targets = {"fusenc": point.target(0.95)}
    if ragged:
        targets["fusenc-packed"] = point.target(0.9 * point.batch * point.length / point.tokens)
    providers: dict[str, Provider] = {
        "eager": function(plain, direction), "compile": compiled(plain, direction),
        "sdpa": function(lambda *tensors: sdpa(*tensors, **options), direction),
        **{name: function(through(backend), direction) for name, backend in BACKENDS.items()},
        "flex": undropped(flex), "flash-attn": undropped(flash), "xformers": undropped(xformers),
        "fusenc": function(lambda *tensors: attention(*tensors, **options), direction),
        **({"fusenc-packed": undropped(ours_packed)} if ragged else {}),
    }  # fmt: skip
    whole = ("eager", "compile", "sdpa", *BACKENDS, "flex", "fusenc", "reference")
    views: dict[str, View] = dict.fromkeys(whole, real_tokens) if ragged else {}
    products = {"forward": 2, "backward": 5, "both": 7}.get(direction, 2)  # the backward pass forms the scores again
    pairs = sum(n * n for n in point.lengths) / (2 if causal else 1)
    passes = {"forward": 4, "backward": 8, "both": 12}.get(direction, 4)  # q, k, v, out; those, dout, dq, dk, dv
    kind = "causal" if causal else "ragged" if ragged else "dense"
    kind += f", dropout {dropout}" if dropout else ""
    return Case(
        "attention", point.describe(f"{kind}, {point.batch}x{point.length}, {heads} heads of {point.head}"),
        point.dtype, direction, inputs, providers, ("sdpa",), {k: v for k, v in targets.items() if v is not None},
        None if dropout else lambda: in_parts, DROPOUT if dropout else "", views,
        flops=2.0 * products * pairs * point.width,
        bytes=float(passes * point.tokens * point.width * point.item), tokens=point.tokens, sizes=point.sizes(kind),
    )  # fmt: skip
