"""rotary as an operation: what its call path, autograd function and torch.library operator are made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from ..common import checks
from ..common.operator import Operation, Prepare
from . import eager
from .eager import Options, Tensors


def _signature(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, ids: Tensor | None) -> Hashable:
    shape = query.shape
    tokens = shape[0 if len(shape) == 3 else 2]
    return (
        _of_heads(query), None if key is None else (_of_heads(key), key.shape[::2] == shape[::2]),
        of_tables(cos, sin, shape[0], tokens),
        None if ids is None else (_of_rows(ids, shape[0], 1), ids.shape[-1] == tokens),
    )  # fmt: skip


def of_tables(cos: Tensor, sin: Tensor, batch: int, tokens: int) -> Hashable:
    """Signature of cosines and sines for so many sequences of so many tokens."""
    rows = cos.shape[0]
    return (
        _of_rows(cos, batch, 2), _of_rows(sin, batch, 2), math.gcd(16, *cos.stride()[:-2], *sin.stride()[:-2]),
        cos.shape[-1], cos.shape[1] == tokens, rows >= tokens, rows > 0, cos.shape == sin.shape,
        cos.requires_grad or sin.requires_grad,
    )  # fmt: skip


def _of_heads(x: Tensor) -> Hashable:
    # Strides change with L; where the columns are inmost it only matters what divides them.
    shape, (*strides, column) = x.shape, x.stride()
    inmost = column == 1 and min(strides) >= shape[-1]
    return (
        len(shape), shape[1], shape[-1], x.dtype, x.device, x.data_ptr() & 15, math.gcd(16, *strides),
        max(x.numel(), *strides) >> 31, inmost or (shape, x.stride()),
    )  # fmt: skip


def _of_rows(t: Tensor, batch: int, fixed: int) -> Hashable:
    return t.dim(), t.stride()[-fixed:], t.dtype, t.device, t.data_ptr() & 15, t.shape[0] == 1, t.shape[0] == batch


def _check(tensors: Any, options: Any, sizes: Any, autocast: bool) -> tuple[Prepare, Options]:
    query, key, cos, sin, ids = tensors
    checks.floating_tensor("query", query)
    if query.dim() not in (3, 4):
        checks.fail_value("query", "shape [B, H, L, D] or packed [T, H, D]", query)
    packed, batch, head_size = query.dim() == 3, query.shape[0], query.shape[-1]
    tokens = query.shape[0 if packed else 2]
    if key is not None:
        checks.same_kind("key", key, "query", query)
        fits = key.dim() == query.dim() and key.shape[-1] == head_size
        if not fits or checks.differ(key.shape[::2], query.shape[::2]):
            checks.fail_value("key", f"shape {list(query.shape)}, that of query, with any number of heads", key)
    checks.floating_tensor("cos", cos)
    if cos.device != query.device:
        checks.fail_value("cos", f"device {query.device}, that of query", cos)
    checks.same_kind("sin", sin, "cos", cos)
    for name, value in (("cos", cos), ("sin", sin)):
        if value.requires_grad:
            checks.fail_value(name, "a tensor that requires no gradient, since it would get none", value)
    least = tokens if ids is None else 1
    if cos.dim() == 2:
        fits = 0 < 2 * cos.shape[1] <= head_size and cos.shape[0] >= least
    else:
        fits = cos.dim() == 3 and not packed and cos.shape[0] in (1, batch) and cos.shape[1] == tokens
        fits = fits and 0 < cos.shape[2] <= head_size and cos.shape[2] % 2 == 0
    if not fits:
        forms = f"[{least} or more, R / 2]" + ("" if packed else f", [1, {tokens}, R] or [{batch}, {tokens}, R]")
        checks.fail_value("cos", f"shape {forms} with R from 2 to {head_size}", cos)
    if checks.differ(sin.shape, cos.shape):
        checks.fail_value("sin", f"shape {list(cos.shape)}, that of cos", sin)
    if ids is not None:
        checks.integer_tensor("position_ids", ids)
        if cos.dim() == 3:
            checks.fail_value("position_ids", "None, since cos has a row for each token", ids)
        fits = ids.device == query.device and ids.dim() in ((1,) if packed else (1, 2)) and ids.shape[-1] == tokens
        if not fits or (ids.dim() == 2 and ids.shape[0] not in (1, batch)):
            shapes = f"[{tokens}]" if packed else f"[{tokens}], [1, {tokens}] or [{batch}, {tokens}]"
            checks.fail_value("position_ids", f"shape {shapes} on {query.device}", ids)
    return (), Options(bool(options[0]), options[1])


def _forward(tensors: Tensors, options: Options, sizes: Any, needs: Any) -> Callable[..., Any]:
    from .forward import rotate

    return rotate(tensors, options)


def _backward(grads: Any, saved: Any, options: Options, sizes: Any, needs: Any) -> Callable[..., Any]:
    # The operation itself rotates gradients back, so that they can be differentiated in turn.
    back = options._replace(inverse=not options.inverse)

    def run(grads: Sequence[Any], saved: Sequence[Any]) -> Sequence[Any]:
        dquery, dkey = grads
        if dquery is None:
            return None, ROTARY((dkey, None, *saved), back)[0]
        return ROTARY((dquery, dkey, *saved), back)

    return run


ROTARY = Operation(
    "rotary", Tensors, Options, differentiable=2, outputs=2, results=2, signature=_signature, check=_check,
    eager=eager.rotary, forward=_forward, keep=lambda tensors, results, options: tensors[2:], backward=_backward,
    fake=lambda tensors, options, sizes, needs: tuple([t if t is None else t.new_empty(t.shape) for t in tensors[:2]]),
    grad_signature=lambda grads, saved: None, backward_is_differentiable=True,
)  # fmt: skip
