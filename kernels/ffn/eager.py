"""The feed-forward block in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import dropout

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "relu2")
_QUICK = 1.702


def as_matrix(x: Tensor) -> Tensor:
    """`x` as ``[rows, width]``; a view where its memory order allows. Unlike ``reshape(-1, width)`` for width 0 too."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS applied to `x`."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "relu":
        return torch.relu(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(_QUICK * x)
    return torch.relu(x).square()


def activate_in_place(x: Tensor, activation: str) -> Tensor:
    """The same in the memory of `x`, for a pre-activation that nobody needs again."""
    if activation == "gelu":
        return torch._C._nn.gelu_(x)  # type: ignore[attr-defined]
    if activation == "relu":
        return torch.relu_(x)
    if activation == "silu":
        return F.silu(x, inplace=True)
    if activation == "gelu_tanh":
        return torch._C._nn.gelu_(x, approximate="tanh")  # type: ignore[attr-defined]
    if activation == "quick_gelu":
        return x.mul_(torch.sigmoid_(_QUICK * x))
    return torch.relu_(x).square_()


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """`grad` times the activation's derivative at `x`."""
    if activation == "relu":
        return grad * (x > 0)
    if activation == "relu2":
        return grad * (2.0 * torch.relu(x))
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if activation == "quick_gelu":
        cdf = torch.sigmoid(_QUICK * x)
        return grad * (cdf * (1.0 + _QUICK * x * (1.0 - cdf)))
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """The activation of a pre-activation; gated, of its first half times its second."""
    if not gated:
        return activate(hidden, activation)
    first, second = hidden.chunk(2, -1)
    return activate(first, activation) * second


def _gate_in_place(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return activate_in_place(hidden, activation)
    first, second = hidden.chunk(2, -1)
    return activate_in_place(first, activation) * second  # with memory of its own, as on every other path


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float, activation: str, gated: bool
) -> Tensor:
    """``dropout(activation(x W^T + bias))``; differentiable."""
    hidden = F.linear(x, weight, bias)
    activated = gate(hidden, activation, gated) if hidden.requires_grad else _gate_in_place(hidden, activation, gated)
    return activated if seed is None else dropout.dropout(activated, seed, dropout_p)


def output(
    activated: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """``residual + dropout(activated W^T + bias)``; differentiable."""
    out = F.linear(activated, weight, bias)
    if seed is not None:
        out = dropout.dropout(out, seed, dropout_p)
    if residual is None:
        return out
    return out.add_(residual) if out.dtype == residual.dtype else residual + out


def ffn(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, residual: Tensor | None,
    seed: Tensor | None, out_seed: Tensor | None, dropout_p: float, out_dropout_p: float, activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    """The output; differentiable."""
    activated = linear_act(x, weight1, bias1, seed, dropout_p, activation, gated)
    return output(activated, weight2, bias2, residual, out_seed, out_dropout_p)


def hidden_gradient(
    grad: Tensor, hidden: Tensor, seed: Tensor | None, dropout_p: float, activation: str, gated: bool
) -> Tensor:
    """The gradient of the pre-activation from that of the dropped-out activation."""
    grad = dropout.dropout(grad, seed, dropout_p)
    if not gated:
        return activation_gradient(grad, hidden, activation)
    first, second = hidden.chunk(2, -1)
    return torch.cat((activation_gradient(grad * second, first, activation), grad * activate(first, activation)), -1)


def ffn_backward(
    dout: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, hidden: Tensor | None,
    activated: Tensor | None, seed: Tensor | None, out_seed: Tensor | None, dropout_p: float, out_dropout_p: float,
    activation: str, gated: bool, needs: list[bool], accumulate: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients as formulas: dx, dweight1, dbias1, dweight2, dbias2, each only if `needs` says so."""
    flat_x = as_matrix(x)
    flat_do = dropout.dropout(as_matrix(dout), out_seed, out_dropout_p).to(x.dtype)
    needs_activated = needs[3] and activated is None
    if hidden is None and (any(needs[:3]) or needs_activated):
        hidden = F.linear(flat_x, weight1, bias1)
    if needs_activated:
        assert hidden is not None
        activated = dropout.dropout(gate(hidden, activation, gated), seed, dropout_p)
    dx = dweight1 = dbias1 = None
    if any(needs[:3]):
        assert hidden is not None
        dhidden = hidden_gradient(flat_do @ weight2, hidden, seed, dropout_p, activation, gated)
        dx, dweight1, dbias1 = linear_backward(dhidden, x, weight1, needs, accumulate)
    dweight2 = flat_do.t() @ activated if needs[3] and activated is not None else None
    return dx, dweight1, dbias1, dweight2, flat_do.sum(0) if needs[4] else None


def linear_backward(
    dhidden: Tensor, x: Tensor, weight: Tensor, needs: list[bool], accumulate: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (added to `accumulate`), dweight and dbias of ``x W^T + bias``."""
    dx = dweight = None
    if needs[0]:
        dx = dhidden @ weight
        dx = (dx if accumulate is None else dx + accumulate.reshape(dx.shape)).view(x.shape)
    if needs[1]:
        dweight = dhidden.t() @ as_matrix(x)
    return dx, dweight, dhidden.sum(0) if needs[2] else None
