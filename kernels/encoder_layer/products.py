"""What both passes of a layer share: the norms' numbers, and the products with what they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..add_norm.arguments import Options as NormOptions
from .arguments import Options, Tensors
from .casts import cast
from .neighbours import find, stacked


def norm_options(o: Options, dtype: torch.dtype) -> tuple[NormOptions, NormOptions]:
    first, second = (0.0, o.projection_p) if o.norm_first else (o.projection_p, o.output_p)
    of_first = NormOptions(first, o.eps1, o.rms, dtype=dtype)
    of_second = NormOptions(second, o.eps2, o.rms, return_sum=o.norm_first, dtype=dtype)
    if o.half is None:
        return of_first, of_second
    # Sums and what goes from part to part are float32; products read a copy.
    wide: dict[str, Any] = {"float32_sum": True, "float32_residual": True, "dtype": o.half}
    if o.norm_first:
        return of_first._replace(out_dtype=o.half), of_second._replace(**wide)
    wide |= {"out_dtype": torch.float32, "also_dtype": o.half}
    return of_first._replace(**wide), of_second._replace(**wide)


class Projections:
    """Products of the same rows with several weights, side by side in one matrix: query, key and value."""

    def __init__(self, t: Tensors) -> None:
        self.widths = [weight.shape[0] for weight in of_qkv(t)[0]]

    def forward(self, x: Tensor, weights: Sequence[Any], biases: Sequence[Any]) -> Tensor:
        """``[T, widths of all]``"""
        if len(weights) == 1:
            return F.linear(x, weights[0], biases[0])
        out = x.new_empty((x.shape[0], sum(self.widths)))
        for weight, bias, part in zip(weights, biases, out.split(self.widths, 1), strict=True):
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        return out

    def of_input(self, dout: Tensor, weights: Sequence[Any], added_to: Tensor | None) -> Tensor:
        """The gradient of `x`, added to another one if there is one."""
        parts = (dout,) if len(weights) == 1 else dout.split(self.widths, 1)
        for part, weight in zip(parts, weights, strict=True):
            added_to = torch.mm(part, weight) if added_to is None else torch.addmm(added_to, part, weight)
        return added_to  # type: ignore[return-value]

    def of_weights(self, dout: Tensor, x: Tensor, needs: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
        """Those of the weights, at their places."""
        if all(needs):
            gradients: Sequence[Any] = torch.unsafe_split_with_sizes(torch.mm(dout.t(), x).to(dtype), self.widths)
        else:
            parts = zip(dout.split(self.widths, 1), needs, strict=True)
            gradients = [torch.mm(part.t(), x).to(dtype) if need else None for part, need in parts]
        return _three(gradients, needs)

    def of_biases(self, dbias: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Those of the biases, from the one of all."""
        return _three(torch.unsafe_split_with_sizes(dbias, self.widths), needs)


def _three(gradients: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed, followed by None."""
    found = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return [*found, *[None] * (3 - len(found))]


class Operands(NamedTuple):
    """What products read."""

    qkv: tuple[Any, ...]
    """One weight for all three, or one each, followed by None."""
    qkv_biases: tuple[Any, ...]
    out: Any
    first: Any
    first_bias: Any
    second: Any
    second_bias: Any


def operands(t: Tensors, o: Options) -> Operands:
    """Of a call; under autocast in its dtype."""
    qkv, biases = of_qkv(t)
    first, first_bias = ((t.weight1, t.up_weight), (t.bias1, t.up_bias)) if t.up_weight is not None else (
        (t.weight1,), (t.bias1,),
    )  # fmt: skip
    if o.half is None:
        (joined, weight), (joined_biases, bias) = find(qkv), find(biases)
        if joined and joined_biases:
            qkv, biases = (weight,), (bias,)
        out, second, second_bias = t.out_proj_weight, t.weight2, t.bias2
        return Operands(qkv, biases, out, stacked(first), stacked(first_bias), second, second_bias)
    groups, groups_of_biases = casts_of_qkv(t)
    qkv, biases = (tuple([cast(group, o.half) for group in of]) for of in (groups, groups_of_biases))
    # After attention and of a post-norm layer after the feed-forward, the norm's kernel adds the bias.
    second_bias = cast((t.bias2,), o.half) if o.norm_first else None
    casts: Any = (cast((each,), o.half) for each in (t.out_proj_weight, t.weight2))
    out, second = casts
    return Operands(qkv, biases, out, cast(first, o.half), cast(first_bias, o.half), second, second_bias)


def casts_of_qkv(t: Any) -> tuple[Any, Any]:
    """Which weights of query, key and value, and which biases, are cast into one: all, if all or none have a bias."""
    weights, biases = of_qkv(t)
    if len({bias is None for bias in biases}) == 1:
        return (weights,), (biases,)
    return tuple((weight,) for weight in weights), tuple((bias,) for bias in biases)


def of_qkv(t: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return all_three(t) if t.k_proj_weight is not None else ((t.in_proj_weight,), (t.in_proj_bias,))


def all_three(t: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (t.in_proj_weight, t.k_proj_weight, t.v_proj_weight), (t.in_proj_bias, t.k_proj_bias, t.v_proj_bias)
