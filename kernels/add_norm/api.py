"""The public function: arguments, checks, documentation."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from ..common import backend, checks, dropout
from . import eager, op


@overload
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None = ..., *, eps: float = ...,
    dropout_p: float = ..., training: bool = ..., return_sum: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None = ..., *, eps: float = ...,
    dropout_p: float = ..., training: bool = ..., return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None = ..., *, eps: float = ...,
    dropout_p: float = ..., training: bool = ..., return_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``LayerNorm(residual + dropout(x))`` in one pass over memory.

    The same as ``F.layer_norm(residual + F.dropout(x, dropout_p, training), x.shape[-1:], weight, bias, eps)``
    (Ba et al., "Layer Normalization", 2016); statistics are float32 whatever the input. The gradients of
    weight and bias are summed in a fixed order, so two runs give the same bits.

    Args:
        x: ``[..., width]``, float32, float16, bfloat16 or float64, any strides; width 1 to 16,384 on the kernels.
        residual: added to the dropped-out `x`, of its shape, dtype and device; None for a plain norm.
        weight: ``[width]``, dtype of `x`, or None for 1.
        bias: ``[width]``, likewise, or None for 0.
        eps: added to the variance, at least 0.
        dropout_p: probability in [0, 1] with which an element of `x` is dropped.
        training: dropout applies only if True.
        return_sum: also return ``residual + dropout(x)``, which a pre-norm layer carries on.

    Returns:
        The normalised tensor, of the shape and dtype of `x`, and with `return_sum` the sum; both differentiable,
        once on the kernels. Under autocast both are float32, as torch's layer_norm is.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `x`.
        ValueError: shapes or devices that do not fit, `dropout_p` outside [0, 1], a negative eps.

    Example:
        >>> import torch, fusenc
        >>> x, residual = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
        >>> fusenc.kernels.add_norm(x, residual, torch.ones(16), torch.zeros(16)).shape
        torch.Size([2, 4, 16])
    """
    compiling = torch.compiler.is_compiling()
    try:
        if backend.autocast_enabled(x):
            x, residual, weight, bias = (_as_float32(t) for t in (x, residual, weight, bias))  # type: ignore[assignment]
        shape, dtype, device = x.shape, x.dtype, x.device
        width = shape[-1:]
        wrong = (
            (residual is not None
             and ((checks.differ(residual.shape, shape) if compiling else residual.shape != shape)
                  or residual.dtype is not dtype or residual.device != device))
            or (weight is not None
                and (weight.shape != width or weight.dtype is not dtype or weight.device != device))
            or (bias is not None and (bias.shape != width or bias.dtype is not dtype or bias.device != device))
            or width[0] == 0 or dtype not in checks.DTYPES
            or not 0.0 <= dropout_p <= 1.0 or not eps >= 0.0
        )  # fmt: skip
    except (AttributeError, TypeError, IndexError):
        _explain(x, residual, weight, bias, eps, dropout_p)
    if wrong:
        _explain(x, residual, weight, bias, eps, dropout_p)
    seed = dropout.new_seed(x) if training and dropout_p > 0.0 else None

    if compiling:
        save = return_sum or _needs_gradients(x, residual, weight, bias)
        out, total, _, _ = op.add_norm_operator(x, residual, weight, bias, seed, dropout_p, eps, save)
        return (out, total) if return_sum else out
    if not backend.use_triton(x):
        out, total = eager.add_norm(x, residual, weight, bias, seed, dropout_p, eps)
        return (out, total) if return_sum else out
    if _needs_gradients(x, residual, weight, bias):
        out, total = op.AddNorm.apply(x, residual, weight, bias, seed, dropout_p, eps)
    else:
        store_sum = return_sum and (residual is not None or seed is not None)
        out, total, _, _ = op.forward(x, residual, weight, bias, seed, dropout_p, eps, store_sum, False)
    return (out, x if total is None else total) if return_sum else out


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_float32(t: Tensor | None) -> Tensor | None:
    return t.float() if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t


def _explain(x: Any, residual: Any, weight: Any, bias: Any, eps: Any, dropout_p: Any) -> NoReturn:
    checks.dropout_probability(dropout_p)
    if not isinstance(eps, (int, float)) or not eps >= 0.0:
        checks.fail_value("eps", "a number that is not negative", eps)
    checks.floating_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        checks.fail_value("x", "a last dimension of at least 1", x)
    if residual is not None:
        checks.same_kind("residual", residual, "x", x)
        if residual.shape != x.shape:
            checks.fail_value("residual", f"shape {list(x.shape)}, that of x", residual)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.same_kind(name, value, "x", x)
            if value.shape != x.shape[-1:]:
                checks.fail_value(name, f"shape [{x.shape[-1]}], the last dimension of x", value)
    checks.fail_type("x", "a floating tensor", x)
