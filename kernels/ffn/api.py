"""The public functions: arguments, checks, documentation."""

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
    gated: bool = False,
    dropout_p: float = 0.0,
    out_dropout_p: float = 0.0,
    residual: Tensor | None = None,
    training: bool = True,
    recompute: bool | str = False,
    fused: bool | None = None,
) -> Tensor:
    """The Transformer's feed-forward block: ``residual + dropout(linear2(dropout(activation(linear1(x)))))``.

    Bias, activation, gating and dropout happen in the first matrix product's epilogue, output dropout and residual
    in the second's, and in the backward pass the activation's derivative in that of the product that needs it, so
    none of them makes a trip of its own through memory (Vaswani et al., "Attention is all you need", section 3.3).
    Where that would slow a product down more than it saves, PyTorch computes the product and one pointwise
    kernel the rest (docs/ffn.md).

    Args:
        x: ``[..., d_model]``, float32, float16, bfloat16 or float64, any strides.
        weight1: ``[d_hidden, d_model]`` as in `nn.Linear`, gated ``[2 * d_hidden, d_model]``; dtype, device of `x`.
        bias1: ``[d_hidden]``, gated ``[2 * d_hidden]``, or None.
        weight2: ``[d_out, d_hidden]``.
        bias2: ``[d_out]`` or None.
        activation: ``"gelu"`` (exact, by erf), ``"gelu_tanh"`` (``F.gelu(approximate="tanh")``), ``"quick_gelu"``
            (``x * sigmoid(1.702 * x)``), ``"relu"``, ``"silu"`` or ``"relu2"`` (squared ReLU: So et al.,
            "Primer", 2021).
        gated: the hidden layer is ``activation(gate) * up``, where gate is the first half of ``linear1(x)`` and up
            the second: GEGLU, SwiGLU, ReGLU (Shazeer, "GLU variants improve Transformer", 2020).
        dropout_p: probability in [0, 1] with which a hidden activation is dropped.
        out_dropout_p: likewise for an element of ``linear2``.
        residual: ``[..., d_out]``, dtype of `x` or float32, added at the end, or None.
        training: dropout applies only if True.
        recompute: what the backward pass computes again instead of keeping. In elements per token kept besides `x`:
            False: pre-activation and activation, ``2 * d_hidden`` (gated ``3 * d_hidden``); ``"activation"``: the
            pre-activation, ``d_hidden`` (gated ``2 * d_hidden``), at the price of one more store; True: nothing, at
            the price of the first product.
        fused: True or False forces the products with or without an epilogue; None chooses.

    Returns:
        ``[..., d_out]`` in the dtype of the residual, else of `x` (under autocast, in its dtype); differentiable, once
        on the kernels and with `recompute`.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `x`; a probability that is no
            number.
        ValueError: shapes or devices that do not fit, an odd first dimension of a gated `weight1`, an unknown
            activation, `recompute` or `fused`, a probability outside [0, 1].

    Example:
        >>> import torch, fusenc
        >>> x, w1, w2 = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> fusenc.kernels.ffn(x, w1, torch.zeros(32), w2, torch.zeros(8), residual=x).shape
        torch.Size([2, 5, 8])
        >>> fusenc.kernels.ffn(x, w1, None, w2[:, :16], None, activation="silu", gated=True).shape
        torch.Size([2, 5, 8])
    """
    try:
        if backend.autocast_enabled(x):
            x, weight1, bias1, weight2, bias2 = operator.autocast_inputs(
                x.device.type, x, weight1, bias1, weight2, bias2
            )
        width, d_model = weight1.shape
        d_out, hidden = weight2.shape
        dtype, device = x.dtype, x.device
        wrong = (
            x.shape[-1] != d_model or width != (2 * hidden if gated else hidden)
            or weight1.dtype is not dtype or weight2.dtype is not dtype
            or weight1.device != device or weight2.device != device
            or (bias1 is not None and (bias1.shape != (width,) or bias1.dtype is not dtype or bias1.device != device))
            or (bias2 is not None and (bias2.shape != (d_out,) or bias2.dtype is not dtype or bias2.device != device))
            or (residual is not None and (
                (checks.differ(residual.shape, torch.Size((*x.shape[:-1], d_out))) if torch.compiler.is_compiling()
                 else residual.shape != (*x.shape[:-1], d_out)) or residual.device != device
                or not (residual.dtype is dtype or (residual.dtype is torch.float32 and dtype in _NARROW))))
            or dtype not in checks.DTYPES or activation not in eager.ACTIVATIONS
            or recompute not in op.RECOMPUTE or fused not in _FUSED
            or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0
            or not isinstance(out_dropout_p, (int, float)) or not 0.0 <= out_dropout_p <= 1.0
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError, IndexError):
        wrong = True
    if wrong:
        _explain(
            x, weight1, bias1, weight2, bias2, residual, activation, gated, dropout_p, out_dropout_p, recompute, fused
        )  # fmt: skip
    seed = out_seed = None
    if training and (dropout_p or out_dropout_p):
        seed, out_seed = _seeds(x, dropout_p, out_dropout_p)
    args = (
        x, weight1, bias1, weight2, bias2, residual, seed, out_seed, dropout_p, out_dropout_p, activation, gated,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        needs = _needs_gradients(*args[:6])
        return op.ffn_operator(*args, fused, *op.to_save(recompute, needs))[0]
    triton = backend.use_triton(x)
    if not (triton or recompute):
        return eager.ffn(*args)
    needs = _needs_gradients(*args[:6])
    if any(needs):
        return op.FeedForward.apply(*args, fused, recompute)
    return op.forward(*args, fused, False, False)[0] if triton else eager.ffn(*args)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    gated: bool = False,
    dropout_p: float = 0.0,
    training: bool = True,
    recompute: bool = False,
    fused: bool | None = None,
) -> Tensor:
    """A linear layer with its activation, ``dropout(activation(linear(x)))``: the first half of `ffn`.

    Args:
        x: ``[..., d_in]``, float32, float16, bfloat16 or float64, any strides.
        weight: ``[d_out, d_in]``, dtype and device of `x`; gated ``[2 * d_out, d_in]``, the gate's rows first.
        bias: ``[d_out]``, gated ``[2 * d_out]``, or None.
        activation: as in `ffn`.
        gated: as in `ffn`.
        dropout_p: probability in [0, 1] with which an element of the result is dropped.
        training: dropout applies only if True.
        recompute: True computes the pre-activation again in the backward pass instead of keeping it, ``d_out`` elements
            per token (gated ``2 * d_out``).
        fused: as in `ffn`.

    Returns:
        ``[..., d_out]`` in the dtype of `x` (under autocast, in its dtype); differentiable, once on the kernels and
        with `recompute`.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `x`; a probability that is no
            number.
        ValueError: shapes or devices that do not fit, an odd first dimension of a gated `weight`, an unknown
            activation, `recompute` or `fused`, `dropout_p` outside [0, 1].

    Example:
        >>> import torch, fusenc
        >>> fusenc.kernels.linear_act(torch.randn(2, 5, 8), torch.randn(32, 8), None, "silu", gated=True).shape
        torch.Size([2, 5, 16])
    """
    try:
        if backend.autocast_enabled(x):
            x, weight, bias = operator.autocast_inputs(x.device.type, x, weight, bias)
        width, d_in = weight.shape
        dtype, device = x.dtype, x.device
        wrong = (
            x.shape[-1] != d_in or (gated and width % 2 != 0) or weight.dtype is not dtype or weight.device != device
            or (bias is not None and (bias.shape != (width,) or bias.dtype is not dtype or bias.device != device))
            or dtype not in checks.DTYPES or activation not in eager.ACTIVATIONS or recompute not in (False, True)
            or fused not in _FUSED or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError, IndexError):
        wrong = True
    if wrong:
        _explain_options(activation, dropout_p, fused)
        if recompute not in (False, True):
            checks.fail_value("recompute", "False or True", recompute)
        _explain_linear(x, (("weight", weight, "bias", bias),), gated)
    seed = dropout.new_seed(x) if training and dropout_p > 0.0 else None
    args = (x, weight, bias, seed, dropout_p, activation, gated)
    if torch.compiler.is_compiling():
        needs = any(_needs_gradients(x, weight, bias))
        return op.linear_act_operator(*args, fused, needs and not recompute)[0]
    triton = backend.use_triton(x)
    if not (triton or recompute):
        return eager.linear_act(*args)
    if any(_needs_gradients(x, weight, bias)):
        return op.LinearAct.apply(*args, fused, recompute)
    return op.linear_act_forward(*args, fused, False)[0] if triton else eager.linear_act(*args)


_NARROW = (torch.float16, torch.bfloat16)
_FUSED = (None, True, False)


def _seeds(x: Tensor, dropout_p: float, out_dropout_p: float) -> tuple[Tensor | None, Tensor | None]:
    """The keys of both dropouts, in one draw."""
    if dropout_p > 0.0 and out_dropout_p > 0.0:
        first, second = dropout.new_seed(x, 2).split(1)
        return first, second
    seed = dropout.new_seed(x)
    return (seed, None) if dropout_p > 0.0 else (None, seed)


def _needs_gradients(*tensors: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def _explain(
    x: Any, weight1: Any, bias1: Any, weight2: Any, bias2: Any, residual: Any, activation: Any, gated: Any,
    dropout_p: Any, out_dropout_p: Any, recompute: Any, fused: Any,
) -> NoReturn:  # fmt: skip
    _explain_options(activation, dropout_p, fused)
    checks.dropout_probability(out_dropout_p, "out_dropout_p")
    if recompute not in op.RECOMPUTE:
        checks.fail_value("recompute", "False, 'activation' or True", recompute)
    if residual is not None:
        checks.floating_tensor("residual", residual)
        checks.floating_tensor("x", x)
        if residual.device != x.device:
            checks.fail_value("residual", f"device {x.device}, that of x", residual)
        if residual.dtype != x.dtype and not (residual.dtype == torch.float32 and x.dtype in _NARROW):
            checks.fail_type("residual", f"dtype {x.dtype}, that of x, or torch.float32", residual)
        if isinstance(weight2, Tensor) and weight2.dim() == 2 and x.dim():
            shape = [*x.shape[:-1], weight2.shape[0]]
            if list(residual.shape) != shape:
                checks.fail_value("residual", f"shape {shape}, that of the result", residual)
    _explain_linear(x, (("weight1", weight1, "bias1", bias1), ("weight2", weight2, "bias2", bias2)), gated)


def _explain_options(activation: Any, dropout_p: Any, fused: Any) -> None:
    if activation not in eager.ACTIVATIONS:
        checks.fail_value("activation", f"one of {', '.join(eager.ACTIVATIONS)}", activation)
    checks.dropout_probability(dropout_p)
    if fused not in _FUSED:
        checks.fail_value("fused", "None, True or False", fused)


def _explain_linear(x: Any, layers: tuple[tuple[str, Any, str, Any], ...], gated: Any) -> NoReturn:
    checks.floating_tensor("x", x)
    if x.dim() == 0:
        checks.fail_value("x", "at least one dimension", x)
    width = x.shape[-1]
    for i, (name, weight, _, _) in enumerate(layers):
        checks.same_kind(name, weight, "x", x)
        if weight.dim() != 2:
            checks.fail_value(name, "two dimensions", weight)
        if weight.shape[1] != width:
            goes_with = layers[i - 1][0] if i else "x"
            checks.fail_value(name, f"shape [rows, {width}], to go with {goes_with}", weight)
        width = weight.shape[0]
        if gated and i == 0:
            if width % 2:
                checks.fail_value(name, "an even number of rows, half of them the gate's", weight)
            width //= 2
    for name, weight, bias_name, bias in layers:
        if bias is not None:
            checks.same_kind(bias_name, bias, "x", x)
            if bias.shape != weight.shape[:1]:
                checks.fail_value(bias_name, f"shape [{weight.shape[0]}], to go with {name}", bias)
    checks.fail_type("x", "a floating tensor", x)
