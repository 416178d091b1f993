"""What calls of ffn and linear_act are made of, in the one form that every path takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tensors(NamedTuple):
    """The tensors of a call of ffn. None where it has none."""

    x: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    residual: Tensor | None
    seed: Tensor | None = None
    """Key of the hidden activation's dropout, int64 ``[1]``."""
    out_seed: Tensor | None = None
    """Key of the output's dropout."""


class Options(NamedTuple):
    """The numbers of a call of ffn."""

    dropout_p: float = 0.0
    out_dropout_p: float = 0.0
    activation: str = "gelu"
    gated: bool = False
    fused: bool | None = None
    """Products take their epilogue in; None: those where it pays."""
    keep_hidden: bool = True
    """The pre-activation is kept for the backward pass."""
    keep_activated: bool = True
    """The activation is kept for the backward pass."""


class Saved(NamedTuple):
    """What the backward passes are given; that of linear_act as of a first product alone."""

    x: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None
    hidden: Tensor | None
    """The pre-activation ``[rows, width]``, or None: it is not needed, or computed again."""
    activated: Tensor | None
    """The activation after dropout ``[rows, d_hidden]``, likewise."""
    seed: Tensor | None
    out_seed: Tensor | None


class LinearTensors(NamedTuple):
    """The tensors of a call of linear_act."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    seed: Tensor | None = None


class LinearOptions(NamedTuple):
    """The numbers of a call of linear_act, as those of ffn."""

    dropout_p: float = 0.0
    activation: str = "gelu"
    gated: bool = False
    fused: bool | None = None
    keep_hidden: bool = True


def stored(options: Options, needs: tuple[bool, ...]) -> tuple[bool, bool]:
    """Whether the forward pass of ffn keeps the pre-activation and the activation. `needs`: of the first tensors."""
    if not needs:
        return False, False
    first, second = True in needs[:3], needs[3]
    hidden = options.keep_hidden and (first or (second and not options.keep_activated))
    return hidden, options.keep_activated and second
