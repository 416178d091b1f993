"""add_norm's wiring: one implementation behind the autograd function (eager mode) and the operator (compiled)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager
from .arguments import Gradients, Options, Wanted, sum_dtype, sum_is_input


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, options: Options, store_sum: bool, store_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Output, sum, means and reciprocal deviations, on whichever backend serves `x`; the last three on request."""
    if backend.use_triton(x):
        from .forward import add_norm_forward

        return add_norm_forward(x, residual, weight, bias, x_bias, seed, options, store_sum, store_statistics)
    out, total = eager.add_norm(x, residual, weight, bias, x_bias, seed, options)
    return (out, total if store_sum else None, *(eager.statistics(total, options) if store_statistics else (None,) * 2))


def backward(
    dout: Tensor, dsum: Tensor | None, x: Tensor, residual: Tensor | None, x_bias: Tensor | None,
    weight: Tensor | None, mean: Tensor | None, rstd: Tensor, seed: Tensor | None, options: Options, recompute: bool,
    wanted: Wanted,
) -> Gradients:  # fmt: skip
    """The wanted gradients, on whichever backend serves `dout`."""
    args = (dout, dsum, x, residual, x_bias, weight, mean, rstd, seed, options, recompute, wanted)
    if backend.use_triton(dout):
        from ..common.column_sums import ColumnSums
        from .backward import add_norm_backward

        sums = ColumnSums()
        grads = add_norm_backward(*args, sums)
        sums.launch()
        return grads
    return eager.add_norm_backward(*args)


def _wanted(needs: tuple[bool, ...], dtypes: tuple[torch.dtype | None, ...]) -> Wanted:
    return Wanted(*(dtype if need else None for need, dtype in zip(needs, dtypes, strict=True)))


class AddNorm(torch.autograd.Function):
    """The kernels in eager mode, with gradients. A sum that is x itself is not stored."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        x_bias: Tensor | None, seed: Tensor | None, options: Options, return_sum: bool, recompute: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        recompute = recompute and not sum_is_input(residual, x_bias, seed)
        store_sum = (return_sum or not recompute) and not sum_is_input(residual, x_bias, seed)
        out, total, mean, rstd = forward(x, residual, weight, bias, x_bias, seed, options, store_sum, True)
        ctx.set_materialize_grads(False)
        if recompute:
            ctx.save_for_backward(x, residual, x_bias, weight, mean, rstd, seed)
        else:
            ctx.save_for_backward(x if total is None else total, None, None, weight, mean, rstd, seed)
        ctx.options, ctx.recompute, ctx.dtype = options, recompute, x.dtype
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias, x_bias))
        return out, total

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        dout = torch.zeros_like(saved[0], dtype=ctx.dtype) if dout is None else dout
        wanted = _wanted(ctx.needs_input_grad[:5], ctx.dtypes)
        return (*backward(dout, dsum, *saved, ctx.options, ctx.recompute, wanted), None, None, None, None)  # type: ignore[call-arg]


def _operator_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, eps: float, rms: bool, zero_centered: bool, float32_sum: bool,
    store_sum: bool, save: bool, recompute: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(dropout_p, eps, rms, zero_centered, float32_sum)
    store_sum = _stores_sum(residual, x_bias, seed, store_sum, save, recompute)
    out, *rest = forward(x, residual, weight, bias, x_bias, seed, options, store_sum, save)
    # An operator returns tensors only, each with memory of its own.
    return out.contiguous(), *(x.new_empty(0) if t is None else t.contiguous() for t in rest)


def _stores_sum(
    residual: Tensor | None, x_bias: Tensor | None, seed: Tensor | None, store_sum: bool, save: bool, recompute: bool
) -> bool:
    return (store_sum or (save and not recompute)) and not sum_is_input(residual, x_bias, seed)


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, eps: float, rms: bool, zero_centered: bool, float32_sum: bool,
    store_sum: bool, save: bool, recompute: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(dropout_p, eps, rms, zero_centered, float32_sum)
    wide = eager.wide_dtype(x)
    rows = math.prod(x.shape[:-1])
    stores = _stores_sum(residual, x_bias, seed, store_sum, save, recompute)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=sum_dtype(x, options)) if stores else x.new_empty(0),
        x.new_empty(rows, dtype=wide) if save and not rms else x.new_empty(0),
        x.new_empty(rows, dtype=wide) if save else x.new_empty(0),
    )


def _operator_backward(*args: Any) -> tuple[Tensor, ...]:
    tensors, options, recompute, wanted = args[:9], Options(*args[9:14]), args[14], Wanted(*args[15:])
    dx, dz, *sums = backward(*tensors, options, recompute, wanted)  # type: ignore[call-arg]
    if _one_gradient(tensors[8], wanted):
        dx = None
    return tuple(args[0].new_empty(0) if grad is None else grad.contiguous() for grad in (dx, dz, *sums))


def _one_gradient(seed: Tensor | None, wanted: Wanted) -> bool:
    """Whether the gradient of x is that of the residual, which an operator then returns once."""
    return seed is None and wanted.x is wanted.residual


def _fake_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted = Wanted(*rest[14:])
    shapes = (dout.shape, dout.shape, *[dout.shape[-1:]] * 3)
    unused = (_one_gradient(rest[7], wanted), False, False, False, False)
    return tuple(
        dout.new_empty(0) if dtype is None or skip else dout.new_empty(shape, dtype=dtype)
        for shape, dtype, skip in zip(shapes, wanted, unused, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, x_bias, seed, *numbers = inputs
    ctx.options, (store_sum, save, recompute) = tuple(numbers[:5]), numbers[5:]
    ctx.recompute = recompute and not sum_is_input(residual, x_bias, seed)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias, x_bias))
    mean, rstd = None if ctx.options[2] else output[2], output[3]
    ctx.has_sum = _stores_sum(residual, x_bias, seed, store_sum, save, recompute)
    if ctx.recompute:
        ctx.save_for_backward(x, residual, x_bias, weight, mean, rstd, seed)
    else:
        total = output[1] if ctx.has_sum else x
        ctx.save_for_backward(total, None, None, weight, mean, rstd, seed)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dsum: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dout = torch.zeros_like(saved[0], dtype=ctx.dtypes[0]) if dout is None else dout
    wanted = _wanted(ctx.needs_input_grad[:5], ctx.dtypes)
    dsum = dsum if ctx.has_sum else None
    grads = add_norm_backward_operator(dout, dsum, *saved, *ctx.options, ctx.recompute, *wanted)
    if _one_gradient(saved[6], wanted):
        grads = (grads[1], *grads[1:])
    needed = (None if dtype is None else grad for grad, dtype in zip(grads, wanted, strict=True))
    return (*needed, *[None] * 9)


_NUMBERS = "float dropout_p, float eps, bool rms, bool zero_centered, bool float32_sum"

add_norm_backward_operator = operator.register(
    "add_norm_backward(Tensor dout, Tensor? dsum, Tensor x, Tensor? residual, Tensor? x_bias, Tensor? weight, "
    f"Tensor? mean, Tensor rstd, Tensor? seed, {_NUMBERS}, bool recompute, ScalarType? dx, ScalarType? dresidual, "
    "ScalarType? dweight, ScalarType? dbias, ScalarType? dx_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _fake_backward,
)
add_norm_operator = operator.register(
    "add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? x_bias, Tensor? seed, "
    f"{_NUMBERS}, bool store_sum, bool save, bool recompute) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
    cast=0,  # add_norm itself has made its inputs float32
)
