"""add_norm's wiring: one implementation behind the autograd function (eager mode) and the operator (compiled)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float, store_sum: bool = True, store_statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Output, sum, means and reciprocal deviations, on whichever backend serves `x`; the last three on request."""
    if backend.use_triton(x):
        from .triton_forward import add_norm_forward

        return add_norm_forward(x, residual, weight, bias, seed, dropout_p, eps, store_sum, store_statistics)
    out, total = eager.add_norm(x, residual, weight, bias, seed, dropout_p, eps)
    return (out, total, *(eager.statistics(total, eps) if store_statistics else (None, None)))


def backward(
    dout: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    seed: Tensor | None, dropout_p: float, needs_dweight: bool, needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dresidual, and as far as they are needed dweight and dbias, on whichever backend serves `total`."""
    args = (dout, dsum, total, weight, mean, rstd, seed, dropout_p, needs_dweight, needs_dbias)
    if backend.use_triton(total):
        from .triton_backward import add_norm_backward

        return add_norm_backward(*args)
    return eager.add_norm_backward(*args)


class AddNorm(torch.autograd.Function):
    """The kernels in eager mode, with gradients. Without residual and dropout the sum is x itself and is not stored."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        seed: Tensor | None, dropout_p: float, eps: float,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        changed = residual is not None or seed is not None
        out, total, mean, rstd = forward(x, residual, weight, bias, seed, dropout_p, eps, changed, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if total is None else total, weight, mean, rstd, seed)
        ctx.dropout_p, ctx.has_residual = dropout_p, residual is not None
        return out, total

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight, mean, rstd, seed = ctx.saved_tensors
        dout = torch.zeros_like(total) if dout is None else dout
        needs = ctx.needs_input_grad[2:4]
        dx, dz, dweight, dbias = backward(dout, dsum, total, weight, mean, rstd, seed, ctx.dropout_p, *needs)
        return dx, dz if ctx.has_residual else None, dweight, dbias, None, None, None


def _operator_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    out, total, mean, rstd = forward(x, residual, weight, bias, seed, dropout_p, eps, save, save)
    if not save:  # an operator returns tensors only
        return out.contiguous(), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    assert total is not None and mean is not None and rstd is not None
    # An operator's outputs may not alias its inputs.
    return out.contiguous(), total.clone() if total is x else total.contiguous(), mean, rstd


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if not rest[-1]:
        return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    statistics = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _operator_backward(*args: Any) -> tuple[Tensor, ...]:
    dx, dz, dweight, dbias = backward(*args)
    nothing = dz.new_empty(0)  # an operator returns tensors only, each with memory of its own
    return (
        nothing if args[6] is None else dx, dz,
        dz.new_empty(0) if dweight is None else dweight, dz.new_empty(0) if dbias is None else dbias,
    )  # fmt: skip


def _fake_backward(
    dout: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    seed: Tensor | None, dropout_p: float, needs_dweight: bool, needs_dbias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    width = total.shape[-1]
    return (
        total.new_empty(0 if seed is None else total.shape),
        total.new_empty(total.shape),
        total.new_empty(width if needs_dweight else 0),
        total.new_empty(width if needs_dbias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, residual, weight, _bias, seed, ctx.dropout_p, _eps, _save_flag = inputs
    ctx.save_for_backward(output[1], weight, output[2], output[3], seed)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dsum: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    total, weight, mean, rstd, seed = ctx.saved_tensors
    dout = torch.zeros_like(total) if dout is None else dout
    needs_dweight, needs_dbias = needs = ctx.needs_input_grad[2:4]
    args = (dout, dsum, total, weight, mean, rstd, seed, ctx.dropout_p, *needs)
    dx, dz, dweight, dbias = add_norm_backward_operator(*args)
    return (
        dz if seed is None else dx, dz if ctx.has_residual else None,
        dweight if needs_dweight else None, dbias if needs_dbias else None, None, None, None, None,
    )  # fmt: skip


add_norm_backward_operator = operator.register(
    "add_norm_backward(Tensor dout, Tensor? dsum, Tensor total, Tensor? weight, Tensor mean, Tensor rstd, "
    "Tensor? seed, float dropout_p, bool needs_dweight, bool needs_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)
add_norm_operator = operator.register(
    "add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float dropout_p, float eps, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
)
