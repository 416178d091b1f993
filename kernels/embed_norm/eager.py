"""embed_norm in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..add_norm import eager as add_norm
from ..add_norm.arguments import Options as NormOptions
from ..add_norm.arguments import Tensors as NormTensors
from ..common import dropout
from .arguments import Options, Tables


def embed_norm(tables: Tables, options: Options) -> Tensor:
    """The output ``[..., L, width]``; differentiable."""
    ids = tables.ids
    if options.check_ids and not ids.is_cpu:
        require_ids_in_range(tables)
    try:
        z = _sum(tables, options.padding_idx)
    except IndexError:  # from torch, on a CPU
        require_ids_in_range(tables)
        raise
    weight, bias = tables.norm_weight, tables.norm_bias
    if options.wide:
        z, weight, bias = (None if t is None else t.float() for t in (z, weight, bias))  # type: ignore[assignment]
    out = add_norm.add_norm(
        NormTensors(z, None, weight, bias, None), NormOptions(eps=options.eps, rms=options.rms, dtype=z.dtype)
    )[0]
    out = dropout.dropout(out, tables.seed, options.dropout_p)
    return out if ids.is_cpu else torch.where(_rows_in_range(tables), out, torch.nan)


def require_ids_in_range(tables: Tables) -> None:
    """Raise IndexError if an id has no row; waits for a GPU."""
    for name, ids, table in _lookups(tables):
        outside = ids[(ids < 0) | (ids >= table.shape[0])]
        if outside.numel():
            raise IndexError(f"{name}: expected ids from 0 to {table.shape[0] - 1}, got {int(outside[0])}")


def _lookups(tables: Tables) -> list[tuple[str, Tensor, Tensor]]:
    """Name, ids and table of each lookup that takes ids from the caller."""
    names = ("input_ids", "position_ids", "token_type_ids")
    return [
        (n, i, t) for n, i, t in zip(names, tables[5:8], tables[:3], strict=True) if i is not None and t is not None
    ]


def _rows_in_range(tables: Tables) -> Tensor:
    """Which tokens have all their rows, ``[..., L, 1]``."""
    ok = torch.ones_like(tables.ids, dtype=torch.bool)
    for _, ids, table in _lookups(tables):
        ok = ok & (ids >= 0) & (ids < table.shape[0])
    return ok[..., None]


def _lookup(table: Tensor, ids: Tensor, padding_idx: int = -1) -> Tensor:
    # Elsewhere than on a CPU an id out of range would stop the device; its row becomes NaN later.
    return torch.embedding(table, ids if ids.is_cpu else ids.clamp(0, table.shape[0] - 1), padding_idx)


def _sum(tables: Tables, padding_idx: int) -> Tensor:
    """The sum of the embeddings, ``[..., L, width]``."""
    word, position, types, _, _, ids, position_ids, type_ids, _ = tables
    total = _lookup(word, ids, padding_idx)
    # In place, since no gradient needs the partial sums.
    if types is not None:
        total += types[0] if type_ids is None else _lookup(types, type_ids)
    if position is not None:
        total += position[: ids.shape[-1]] if position_ids is None else _lookup(position, position_ids)
    return total
