"""embed_norm's wiring: one implementation behind the autograd function (eager mode) and the operator (compiled)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import backend, operator
from . import eager
from .eager import Options, Tables

DIFFERENTIABLE = 5
_TENSORS = len(Tables._fields)
_INPUTS = _TENSORS + len(Options._fields)


def forward(tables: Tables, options: Options, store_statistics: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, and on request means (None for "rms" on the kernels) and reciprocal deviations, on whichever backend
    serves the word table."""
    if backend.use_triton(tables.word):
        from .forward import embed_norm_forward

        if options.check_ids:
            eager.require_ids_in_range(tables)
        return embed_norm_forward(tables, options, store_statistics)
    if options.check_ids and not tables.ids.is_cpu:
        eager.require_ids_in_range(tables)
    out = eager.embed_norm(tables, options)
    return (out, *(eager.statistics(tables, options) if store_statistics else (None, None)))


def backward(
    dout: Tensor, mean: Any, rstd: Tensor, tables: Tables, options: Options, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the five tables, each only if `needs` says so, on whichever backend serves the word table."""
    if backend.use_triton(tables.word):
        from ..common.column_sums import ColumnSums
        from .backward import embed_norm_backward

        sums = ColumnSums()
        grads = embed_norm_backward(dout, mean, rstd, tables, options, needs, sums)  # type: ignore[arg-type]
        sums.launch()
        return grads
    return eager.embed_norm_backward(dout, mean, rstd, tables, options, needs)


class EmbedNorm(torch.autograd.Function):
    """The kernels in eager mode, with gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        tables, options = Tables(*inputs[:_TENSORS]), Options(*inputs[_TENSORS:])
        out, mean, rstd = forward(tables, options, True)
        ctx.save_for_backward(mean, rstd, *tables)
        ctx.options = options
        return out

    @staticmethod
    @operator.first_derivative
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mean, rstd, *tables = ctx.saved_tensors
        needs = ctx.needs_input_grad[:DIFFERENTIABLE]
        grads = backward(dout, mean, rstd, Tables(*tables), ctx.options, needs)
        return (*grads, *[None] * (_INPUTS - DIFFERENTIABLE))


def _operator_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tables, options, save = Tables(*arguments[:_TENSORS]), Options(*arguments[_TENSORS:-1]), arguments[-1]
    out, mean, rstd = forward(tables, options, save)
    # An operator returns tensors only, each with memory of its own.
    nothing = [out.new_empty(0, dtype=_statistics_dtype(tables.word)) for _ in range(2)]
    return out.contiguous(), nothing[0] if mean is None else mean, nothing[1] if rstd is None else rstd


def _statistics_dtype(word: Tensor) -> torch.dtype:
    return torch.promote_types(word.dtype, torch.float32)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tables, options, save = Tables(*arguments[:_TENSORS]), Options(*arguments[_TENSORS:-1]), arguments[-1]
    word, dtype = tables.word, _statistics_dtype(tables.word)
    tokens = tables.ids.numel() if save else 0
    return (
        word.new_empty((*tables.ids.shape, word.shape[1]), dtype=dtype if options.wide else word.dtype),
        word.new_empty(0 if options.rms else tokens, dtype=dtype),
        word.new_empty(tokens, dtype=dtype),
    )


def _operator_backward(dout: Tensor, mean: Tensor, rstd: Tensor, *rest: Any) -> list[Tensor]:
    tables, options, needs = Tables(*rest[:_TENSORS]), Options(*rest[_TENSORS:-1]), rest[-1]
    grads = backward(dout, mean, rstd, tables, options, needs)
    return [rstd.new_empty(0, dtype=tables.word.dtype) if grad is None else grad.contiguous() for grad in grads]


def _fake_backward(dout: Tensor, mean: Tensor, rstd: Tensor, *rest: Any) -> list[Tensor]:
    tables, needs = rest[:DIFFERENTIABLE], rest[-1]
    return [
        tables[0].new_empty(t.shape if want and t is not None else 0) for t, want in zip(tables, needs, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])
    ctx.options = Options(*inputs[_TENSORS:-1])


def _gradients(ctx: Any, dout: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    mean, rstd, *tables = ctx.saved_tensors
    needs = [bool(want) for want in ctx.needs_input_grad[:DIFFERENTIABLE]]
    grads = embed_norm_backward_operator(dout, mean, rstd, *tables, *ctx.options, needs)
    needed = (grad if want else None for grad, want in zip(grads, needs, strict=True))
    return (*needed, *[None] * (_INPUTS - DIFFERENTIABLE + 1))


_ARGUMENTS = (
    "Tensor word, Tensor? position, Tensor? type, Tensor? norm_weight, Tensor? norm_bias, Tensor ids, "
    "Tensor? position_ids, Tensor? type_ids, Tensor? seed, float dropout_p, float eps, bool rms, int padding_idx, "
    "bool wide, bool check_ids"
)
embed_norm_backward_operator = operator.register(
    f"embed_norm_backward(Tensor dout, Tensor mean, Tensor rstd, {_ARGUMENTS}, bool[] needs) -> Tensor[]",
    _operator_backward,
    _fake_backward,
)
embed_norm_operator = operator.register(
    f"embed_norm({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor)",
    _operator_forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
    cast=0,  # the public function asks for float32 where autocast has it; tables are read as they are
)
