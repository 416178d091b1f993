"""The public function: arguments, checks, documentation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..common import backend
from .op import ADD_NORM


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
    options = (norm, eps, dropout_p, training, return_sum, zero_centered_weight, residual_in_fp32, recompute)
    out, total = ADD_NORM((x, residual, weight, bias, x_bias), options)[:2]
    if not return_sum:
        return out
    if residual is None and x_bias is None and not (training and dropout_p > 0.0):
        wide = x.dtype != torch.float64 and (residual_in_fp32 or backend.autocast_enabled(x))
        return out, x.float() if wide else x
    return out, total
