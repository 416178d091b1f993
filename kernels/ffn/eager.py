"""The feed-forward block in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import dropout
from .arguments import Options, Tensors

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": F.silu,
    "relu2": lambda x: torch.relu(x).square(),
}
ACTIVATIONS = tuple(_FUNCTIONS)


def activate(hidden: Tensor, seed: Tensor | None, dropout_p: float, activation: str, gated: bool) -> Tensor:
    """The dropped-out activation of a pre-activation; gated, of its first half times its second."""
    first, second = hidden.chunk(2, -1) if gated else (hidden, None)
    activated = _FUNCTIONS[activation](first)
    return dropout.dropout(activated if second is None else activated * second, seed, dropout_p)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str, gated: bool
) -> Tensor:
    """``dropout(activation(x W^T + bias))``; differentiable."""
    return activate(F.linear(x, weight, bias), seed, dropout_p, activation, gated)


def of_hidden(hidden: Tensor, tensors: Tensors, options: Options) -> Tensor:
    """The output of ffn from the pre-activation; differentiable."""
    _, _, _, weight2, bias2, residual, seed, out_seed = tensors
    activated = activate(hidden, seed, options.dropout_p, options.activation, options.gated)
    out = dropout.dropout(F.linear(activated, weight2, bias2), out_seed, options.out_dropout_p)
    return out if residual is None else residual + out


def ffn(tensors: Tensors, options: Options) -> Tensor:
    """The output; differentiable."""
    return of_hidden(F.linear(tensors.x, tensors.weight1, tensors.bias1), tensors, options)
