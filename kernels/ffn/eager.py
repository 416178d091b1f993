"""The feed-forward block in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import dropout

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS applied to `x`."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """`grad` times the activation's derivative at `x`."""
    if activation == "relu":
        return grad * (x > 0)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def ffn(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, seed: Tensor | None,
    dropout_p: float, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the pre-activation and the dropped-out activation; differentiable."""
    hidden = F.linear(x, weight1, bias1)
    activated = activate(hidden, activation)
    if seed is not None:
        activated = dropout.dropout(activated, seed, dropout_p)
    return F.linear(activated, weight2, bias2), hidden, activated


def hidden_gradient(
    dout: Tensor, weight2: Tensor, hidden: Tensor, seed: Tensor | None, dropout_p: float, activation: str
) -> Tensor:
    """The gradient of the pre-activation: ``dropout(dout @ weight2) * activation'(hidden)``."""
    return activation_gradient(dropout.dropout(dout @ weight2, seed, dropout_p), hidden, activation)
