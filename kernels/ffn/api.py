"""The public function: arguments, checks, documentation."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..common import backend, checks, dropout, operator
from . import eager, op


def ffn(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """The Transformer's feed-forward block, ``linear2(dropout(activation(linear1(x))))``.

    Bias, activation and dropout happen in the first matrix product's epilogue, and in the backward pass
    the activation's derivative in that of the product that needs it, so none of them makes a trip of its own
    through memory (Vaswani et al., "Attention is all you need", section 3.3).

    Args:
        x: ``[..., d_model]``, float32, float16, bfloat16 or float64, any strides.
        weight1: ``[d_hidden, d_model]`` as in `nn.Linear`, dtype and device of `x`.
        bias1: ``[d_hidden]`` or None.
        weight2: ``[d_out, d_hidden]``.
        bias2: ``[d_out]`` or None.
        activation: ``"gelu"`` (exact, by erf), ``"gelu_tanh"`` (``F.gelu(approximate="tanh")``) or ``"relu"``.
        dropout_p: probability in [0, 1] with which a hidden activation is dropped.
        training: dropout applies only if True.

    Returns:
        ``[..., d_out]`` in the dtype of `x` (under autocast, in its dtype); differentiable, once on the kernels.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `x`.
        ValueError: shapes or devices that do not fit, an unknown activation, `dropout_p` outside [0, 1].

    Example:
        >>> import torch, fusenc
        >>> x, w1, w2 = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> fusenc.kernels.ffn(x, w1, torch.zeros(32), w2, torch.zeros(8)).shape
        torch.Size([2, 5, 8])
    """
    try:
        if backend.autocast_enabled(x):
            x, weight1, bias1, weight2, bias2 = operator.autocast_inputs(
                x.device.type, x, weight1, bias1, weight2, bias2
            )
        hidden, d_model = weight1.shape
        d_out, hidden2 = weight2.shape
        dtype, device = x.dtype, x.device
        wrong = (
            x.shape[-1] != d_model or hidden2 != hidden
            or weight1.dtype != dtype or weight2.dtype != dtype or weight1.device != device or weight2.device != device
            or (bias1 is not None and (bias1.shape != (hidden,) or bias1.dtype != dtype or bias1.device != device))
            or (bias2 is not None and (bias2.shape != (d_out,) or bias2.dtype != dtype or bias2.device != device))
            or dtype not in checks.DTYPES or not 0.0 <= dropout_p <= 1.0 or activation not in eager.ACTIVATIONS
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError, IndexError):
        _explain(x, weight1, bias1, weight2, bias2, activation, dropout_p)
    if wrong:
        _explain(x, weight1, bias1, weight2, bias2, activation, dropout_p)
    seed = dropout.new_seed(x) if training and dropout_p > 0.0 else None
    args = (x, weight1, bias1, weight2, bias2, seed, dropout_p, activation)

    if torch.compiler.is_compiling():
        return op.ffn_operator(*args, _needs_gradients(*args[:5]))[0]
    if not backend.use_triton(x):
        return eager.ffn(*args)[0]
    if _needs_gradients(*args[:5]):
        return op.FeedForward.apply(*args)
    return op.forward(*args, False)[0]


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _explain(
    x: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any, activation: Any, dropout_p: Any
) -> NoReturn:  # fmt: skip
    if activation not in eager.ACTIVATIONS:
        checks.fail_value("activation", f"one of {', '.join(eager.ACTIVATIONS)}", activation)
    checks.dropout_probability(dropout_p)
    checks.floating_tensor("x", x)
    if x.dim() == 0:
        checks.fail_value("x", "at least one dimension", x)
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        checks.same_kind(name, weight, "x", x)
        if weight.dim() != 2:
            checks.fail_value(name, "two dimensions", weight)
    if weight1.shape[1] != x.shape[-1]:
        checks.fail_value("weight1", f"shape [d_hidden, {x.shape[-1]}], to go with x", weight1)
    if weight2.shape[1] != weight1.shape[0]:
        checks.fail_value("weight2", f"shape [d_out, {weight1.shape[0]}], to go with weight1", weight2)
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        if bias is not None:
            checks.same_kind(name, bias, "x", x)
            if bias.shape != weight.shape[:1]:
                checks.fail_value(name, f"shape [{weight.shape[0]}]", bias)
    checks.fail_type("x", "a floating tensor", x)
