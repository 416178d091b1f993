"""The public function: arguments, checks, documentation."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common import backend, checks, dropout
from . import eager, op
from .arguments import Options, sum_is_input

NORMS = ("layer", "rms")
_HALF = frozenset({torch.float16, torch.bfloat16})


@overload
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None = ..., *, norm: str = ...,
    eps: float = ...,
    dropout_p: float = ..., training: bool = ..., x_bias: Tensor | None = ..., return_sum: Literal[False] = ...,
    zero_centered_weight: bool = ..., residual_in_fp32: bool = ..., recompute: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None = ..., *, norm: str = ...,
    eps: float = ...,
    dropout_p: float = ..., training: bool = ..., x_bias: Tensor | None = ..., return_sum: Literal[True],
    zero_centered_weight: bool = ..., residual_in_fp32: bool = ..., recompute: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None = ..., *, norm: str = ...,
    eps: float = ...,
    dropout_p: float = ..., training: bool = ..., x_bias: Tensor | None = ..., return_sum: bool,
    zero_centered_weight: bool = ..., residual_in_fp32: bool = ..., recompute: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
    x_bias: Tensor | None = None,
    return_sum: bool = False,
    zero_centered_weight: bool = False,
    residual_in_fp32: bool = False,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``norm(residual + dropout(x + x_bias))`` in one pass over memory; LayerNorm or RMSNorm.

    With the defaults the same as ``F.layer_norm(residual + F.dropout(x, dropout_p, training), x.shape[-1:], weight,
    bias, eps)`` (Ba et al., "Layer Normalization", 2016); ``norm="rms"`` is ``F.rms_norm`` (Zhang and Sennrich, "Root
    Mean Square Layer Normalization", 2019) plus `bias`. Statistics are float32 whatever the input. The gradients of
    weight, bias and x_bias are summed in a fixed order, so two runs give the same bits. docs/add_norm.md has more.

    Args:
        x: ``[..., width]``, float32, float16, bfloat16 or float64, any strides; width 1 to 65,536 on the kernels.
        residual: added to the dropped-out `x`, of its shape and device, and of its dtype, or float32 beside a
            half-precision `x`: then the sum is float32 too. None for a plain norm.
        weight: ``[width]``, of the dtype of `x`, or float32 beside a half-precision `x`; None for 1.
        bias: ``[width]``, likewise, or None for 0; either norm takes one.
        norm: ``"layer"`` or ``"rms"``.
        eps: added to the variance, at least 0. With 0 a row without variance gives 0, and finite gradients.
        dropout_p: probability in [0, 1] with which an element of ``x + x_bias`` is dropped.
        training: dropout applies only if True.
        x_bias: ``[width]``, dtype as for `weight`: the bias of the product that gave `x`, added before dropout.
        return_sum: also return ``residual + dropout(x + x_bias)``, which a pre-norm layer carries on; `x` itself where
            nothing is added to it or dropped from it.
        zero_centered_weight: the weight counts as ``1 + weight``, as in Gemma and flash-attn's ``layer_norm_fn``.
        residual_in_fp32: the sum is computed, returned and saved in float32 whatever the residual, for a float32
            residual stream; the output keeps the dtype of `x`. No difference for float32 and float64.
        recompute: for the backward pass save `x` and `residual`, which often live anyway, instead of their sum, and
            form the sum again there: the same bits, and up to 4 bytes an element saved.

    Returns:
        The normalised tensor, of the shape and dtype of `x`, and with `return_sum` the sum; both differentiable,
        once on the kernels. Each gradient has its input's dtype. Under autocast both are float32, as torch's
        layer_norm is.

    Raises:
        TypeError: an argument that is no floating tensor, or of a dtype that does not go with that of `x`; a
            `dropout_p` that is no number.
        ValueError: an unknown norm, shapes or devices that do not fit, `dropout_p` outside [0, 1], a negative eps.

    Example:
        >>> import torch, fusenc
        >>> x, residual = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
        >>> fusenc.kernels.add_norm(x, residual, torch.ones(16), torch.zeros(16)).shape
        torch.Size([2, 4, 16])
    """
    compiling = torch.compiler.is_compiling()
    if dropout_p == 0.0 and x_bias is None and norm == "layer" and not (
        compiling or recompute or residual_in_fp32 or zero_centered_weight
    ):  # fmt: skip
        plain = eager.plain(x, residual, weight, bias, eps)
        if plain is not None:
            return plain if return_sum else plain[0]
    try:
        if backend.autocast_enabled(x):
            x, residual, weight, bias, x_bias = (_as_float32(t) for t in (x, residual, weight, bias, x_bias))  # type: ignore[assignment]
        shape, dtype, device = x.shape, x.dtype, x.device
        width = shape[-1:]
        half = dtype in _HALF
        wrong = (
            (residual is not None
             and ((checks.differ(residual.shape, shape) if compiling else residual.shape != shape)
                  or (residual.dtype is not dtype and not (half and residual.dtype is torch.float32))
                  or residual.device != device))
            or (weight is not None
                and (weight.shape != width or weight.device != device
                     or (weight.dtype is not dtype and not (half and weight.dtype is torch.float32))))
            or (bias is not None
                and (bias.shape != width or bias.device != device
                     or (bias.dtype is not dtype and not (half and bias.dtype is torch.float32))))
            or (x_bias is not None
                and (x_bias.shape != width or x_bias.device != device
                     or (x_bias.dtype is not dtype and not (half and x_bias.dtype is torch.float32))))
            or width[0] == 0 or dtype not in checks.DTYPES or norm not in NORMS
            or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0
            or not isinstance(eps, (int, float)) or not eps >= 0.0
        )  # fmt: skip
    except (AttributeError, TypeError, IndexError):
        _explain(x, residual, weight, bias, x_bias, norm, eps, dropout_p)
    if wrong:
        _explain(x, residual, weight, bias, x_bias, norm, eps, dropout_p)
    seed = dropout.new_seed(x) if dropout_p > 0.0 and training else None

    kernels = backend.use_triton(x)
    float32_sum = half and (residual_in_fp32 or (residual is not None and residual.dtype is torch.float32))
    options = Options(dropout_p, eps, norm == "rms", zero_centered_weight, float32_sum)
    tensors = (x, residual, weight, bias, x_bias)
    total: Tensor | None
    if compiling:
        save = _needs_gradients(tensors)
        out, total, _, _ = op.add_norm_operator(*tensors, seed, *options, return_sum, save, recompute)
    elif not kernels:
        if recompute and _needs_gradients(tensors):
            out, total = checkpoint(
                eager.add_norm, *tensors, seed, options, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out, total = eager.add_norm(*tensors, seed, options)
        return (out, total) if return_sum else out
    elif _needs_gradients(tensors):
        out, total = op.AddNorm.apply(*tensors, seed, options, return_sum, recompute)
    else:
        store_sum = return_sum and not sum_is_input(residual, x_bias, seed)
        out, total, _, _ = op.forward(*tensors, seed, options, store_sum, False)
    if not return_sum:
        return out
    if sum_is_input(residual, x_bias, seed):
        return out, x.float() if float32_sum else x
    assert total is not None
    return out, total


def _needs_gradients(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_float32(t: Tensor | None) -> Tensor | None:
    return t.float() if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t


def _explain(
    x: Any, residual: Any, weight: Any, bias: Any, x_bias: Any, norm: Any, eps: Any, dropout_p: Any
) -> NoReturn:
    checks.dropout_probability(dropout_p)
    if not isinstance(norm, str) or norm not in NORMS:
        checks.fail_value("norm", f"one of {', '.join(NORMS)}", norm)
    if not isinstance(eps, (int, float)) or not eps >= 0.0:
        checks.fail_value("eps", "a number that is not negative", eps)
    checks.floating_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        checks.fail_value("x", "a last dimension of at least 1", x)
    if residual is not None:
        _check_kind("residual", residual, x)
        if residual.shape != x.shape:
            checks.fail_value("residual", f"shape {list(x.shape)}, that of x", residual)
    for name, value in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if value is not None:
            _check_kind(name, value, x)
            if value.shape != x.shape[-1:]:
                checks.fail_value(name, f"shape [{x.shape[-1]}], the last dimension of x", value)
    checks.fail_type("x", "a floating tensor", x)


def _check_kind(name: str, value: Any, x: Tensor) -> None:
    checks.floating_tensor(name, value)
    if x.dtype not in _HALF or value.dtype != torch.float32:
        checks.same_kind(name, value, "x", x)
    if value.device != x.device:
        checks.fail_value(name, f"device {x.device}, that of x", value)
