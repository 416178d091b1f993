"""embed_norm as an operation: what its call path, autograd function and torch.library operator are made from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import checks, plan
from ..common.operator import Operation, Prepare
from . import eager
from .arguments import Options, Tables

NORMS = ("layer", "rms")


def _signature(
    word: Tensor, position: Tensor | None, types: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    ids: Tensor, position_ids: Tensor | None, type_ids: Tensor | None,
) -> Hashable:  # fmt: skip
    of, shape = plan.of_parameter, ids.shape
    return (
        of(word), of(position), of(types), of(norm_weight), of(norm_bias), _of_ids(ids, shape), ids.numel() >> 31,
        None if position_ids is None else _of_ids(position_ids, shape),
        None if type_ids is None else _of_ids(type_ids, shape), position is None or position.shape[0] >= shape[-1],
    )  # fmt: skip


def _of_ids(ids: Tensor, shape: torch.Size) -> Hashable:
    return (
        ids.dtype, ids.device, ids.is_contiguous(), ids.data_ptr() & 15, 2 if ids.shape == shape else _fit(ids, shape)
    )  # fmt: skip


def _fit(ids: Tensor, shape: torch.Size) -> bool:
    """True if ids broadcast to a shape."""
    return ids.dim() <= len(shape) and all(
        n == 1 or n == m for n, m in zip(reversed(ids.shape), reversed(shape), strict=False)
    )


def _check(tensors: Any, options: Any, sizes: Any, autocast: bool) -> tuple[Prepare, Options]:
    word, position, types, norm_weight, norm_bias, ids, position_ids, type_ids = tensors
    norm, eps, dropout_p, training, padding_idx, check_ids = options
    checks.dropout_probability(dropout_p)
    checks.one_of("norm", norm, NORMS)
    checks.not_negative("eps", eps)
    checks.floating_tensor("word_weight", word)
    if word.dim() != 2 or word.shape[0] == 0 or word.shape[1] == 0:
        checks.fail_value("word_weight", "shape [vocabulary, width], neither of them 0", word)
    rows, width = word.shape
    for name, table, ids_name, value in (
        ("word_weight", word, "input_ids", ids), ("position_weight", position, "position_ids", position_ids),
        ("type_weight", types, "token_type_ids", type_ids),
    ):  # fmt: skip
        if table is not None:
            checks.same_kind(name, table, "word_weight", word)
            if table.dim() != 2 or table.shape[1] != width:
                checks.fail_value(name, f"shape [rows, {width}], the width of word_weight", table)
            least = ids.shape[-1] if table is position and value is None else 1
            if table.shape[0] < least:
                checks.fail_value(name, f"at least {least} rows", table)
        if value is None and name != "word_weight":
            continue
        checks.integer_tensor(ids_name, value)
        if value.device != word.device:
            checks.fail_value(ids_name, f"device {word.device}, that of word_weight", value)
        if ids.dim() == 0:
            checks.fail_value("input_ids", "at least one dimension", ids)
        if table is None:
            checks.fail_value(ids_name, f"None, since there is no {name}", value)
        if not _fit(value, ids.shape):
            checks.fail_value(ids_name, f"a shape that broadcasts to {list(ids.shape)}, that of input_ids", value)
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            checks.same_kind(name, value, "word_weight", word)
            if checks.differ(value.shape, word.shape[1:]):
                checks.fail_value(name, f"shape [{width}], the width of word_weight", value)
    if padding_idx is not None and (not isinstance(padding_idx, int) or not -rows <= padding_idx < rows):
        checks.fail_value("padding_idx", f"an integer from {-rows} to {rows - 1}", padding_idx)
    return (), Options(
        float(dropout_p) if training else 0.0, float(eps), norm == "rms",
        -1 if padding_idx is None else padding_idx % rows,
        autocast and word.dtype != torch.float64, bool(check_ids),
    )  # fmt: skip


def _forward(tables: Tables, options: Options, sizes: Any, needs: tuple[bool, ...]) -> Callable[..., Any]:
    from .forward import embed_norm_forward

    return embed_norm_forward(tables, options, needs)


def _backward(
    grads: Sequence[Any], saved: Sequence[Any], options: Options, sizes: Any, needs: Sequence[bool]
) -> Callable[..., Any]:
    from .backward import embed_norm_backward

    return embed_norm_backward(grads[0], Tables(*saved[:-1]), options, needs)


def _fake(tables: Tables, options: Options, sizes: Any, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    word, ids = tables.word, tables.ids
    return (
        word.new_empty((*ids.shape, word.shape[1]), dtype=torch.float32 if options.wide else word.dtype),
        word.new_empty(ids.numel() if options.rms else 2 * ids.numel(), dtype=torch.float32) if needs else None,
    )


EMBED_NORM = Operation(
    "embed_norm", Tables, Options, differentiable=5, outputs=1, results=2, signature=_signature, check=_check,
    eager=lambda tables, options: (eager.embed_norm(tables, options),), forward=_forward,
    keep=lambda tables, results, options: (*tables, results[1]), backward=_backward, fake=_fake,
    dropouts=("dropout_p",),
)  # fmt: skip
