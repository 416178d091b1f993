"""embed_norm in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import backend, dropout


class Tables(NamedTuple):
    """The tensors of a call; the first five have gradients."""

    word: Tensor
    position: Tensor | None
    type: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    ids: Tensor
    position_ids: Tensor | None
    type_ids: Tensor | None
    seed: Tensor | None


class Options(NamedTuple):
    """The numbers of a call."""

    dropout_p: float
    eps: float
    rms: bool
    padding_idx: int
    """-1 for none."""
    wide: bool
    """The result is float32 whatever the tables are, as autocast has it."""
    check_ids: bool


def lookups(tables: Tables) -> list[tuple[str, Tensor, Tensor]]:
    """Name, ids and table of each lookup that takes ids from the caller."""
    found = [("input_ids", tables.ids, tables.word)]
    if tables.position_ids is not None and tables.position is not None:
        found.append(("position_ids", tables.position_ids, tables.position))
    if tables.type_ids is not None and tables.type is not None:
        found.append(("token_type_ids", tables.type_ids, tables.type))
    return found


def require_ids_in_range(tables: Tables) -> None:
    """Raise IndexError if an id has no row; waits for a GPU."""
    for name, ids, table in lookups(tables):
        outside = ids[(ids < 0) | (ids >= table.shape[0])]
        if outside.numel():
            raise IndexError(f"{name}: expected ids from 0 to {table.shape[0] - 1}, got {int(outside[0])}")


def _rows_in_range(tables: Tables) -> Tensor:
    """Which tokens have all their rows, ``[..., L, 1]``."""
    ok = torch.ones_like(tables.ids, dtype=torch.bool)
    for _, ids, table in lookups(tables):
        ok = ok & (ids >= 0) & (ids < table.shape[0])
    return ok[..., None]


def _lookup(table: Tensor, ids: Tensor, padding_idx: int = -1) -> Tensor:
    # Elsewhere than on a CPU an id out of range would stop the device; its row becomes NaN later.
    return torch.embedding(table, ids if ids.is_cpu else ids.clamp(0, table.shape[0] - 1), padding_idx)


def embedding_sum(tables: Tables, padding_idx: int) -> Tensor:
    """The sum of the embeddings, ``[..., L, width]``; differentiable."""
    word, position, type_, _, _, ids, position_ids, type_ids, _ = tables
    try:
        return _sum(word, position, type_, ids, position_ids, type_ids, padding_idx)
    except IndexError:
        require_ids_in_range(tables)
        raise


def _sum(
    word: Tensor, position: Tensor | None, type_: Tensor | None, ids: Tensor, position_ids: Tensor | None,
    type_ids: Tensor | None, padding_idx: int,
) -> Tensor:  # fmt: skip
    total = _lookup(word, ids, padding_idx)
    # In place, since no gradient needs the partial sums.
    if type_ is not None:
        total += type_[0] if type_ids is None else _lookup(type_, type_ids)
    if position is not None:
        total += position[: ids.shape[-1]] if position_ids is None else _lookup(position, position_ids)
    return total


def plain(
    word: Tensor, position: Tensor | None, type_: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    ids: Tensor, position_ids: Tensor | None, type_ids: Tensor | None, eps: float,
) -> Tensor | None:  # fmt: skip
    """LayerNorm of the sum on a CPU, checked with the least of the host's time; None for other calls and for bad ones,
    which the caller has to look at more closely. torch itself checks ids and the shapes of weight and bias."""
    try:
        if not backend.plain_cpu(word) or not ids.is_cpu or ids.dim() == 0 or not eps > 0.0:
            return None
        dtype, (rows, width) = word.dtype, word.shape
        if (
            rows == 0
            or width == 0
            or not (_fits(position, position_ids, width, dtype) and _fits(type_, type_ids, width, dtype))
        ):
            return None
        if position is not None and position_ids is None and position.shape[0] < ids.shape[-1]:
            return None
        if (weight is not None and weight.dtype is not dtype) or (bias is not None and bias.dtype is not dtype):
            return None
        return torch.layer_norm(
            _sum(word, position, type_, ids, position_ids, type_ids, -1), (width,), weight, bias, eps
        )
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return None


def _fits(table: Tensor | None, ids: Tensor | None, width: int, dtype: torch.dtype) -> bool:
    if table is None:
        return ids is None
    rows, columns = table.shape
    return table.is_cpu and table.dtype is dtype and columns == width and (ids is None or (ids.is_cpu and rows > 0))


def _normalise(z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    if eps > 0.0 and not rms:
        return torch.layer_norm(z, z.shape[-1:], weight, bias, eps)
    if eps > 0.0:
        out = torch.rms_norm(z, z.shape[-1:], weight, eps)
        return out if bias is None else out + bias
    # torch's norms divide 0 by 0 where a row has no variance; here such a row is 0 before weight and bias.
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    centred = wide if rms else wide - wide.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    out = (centred * torch.where(variance == 0.0, torch.inf, variance).rsqrt()).to(z.dtype)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def embed_norm(tables: Tables, options: Options) -> Tensor:
    """The output ``[..., L, width]``; differentiable."""
    z = embedding_sum(tables, options.padding_idx)
    weight, bias = tables.norm_weight, tables.norm_bias
    if options.wide:
        z, weight, bias = (None if t is None else t.float() for t in (z, weight, bias))  # type: ignore[assignment]
    out = _normalise(z, weight, bias, options.eps, options.rms)
    if tables.seed is not None:
        out = dropout.dropout(out, tables.seed, options.dropout_p)
    return out if tables.ids.is_cpu else torch.where(_rows_in_range(tables), out, torch.nan)


def statistics(tables: Tables, options: Options) -> tuple[Tensor, Tensor]:
    """Mean (nothing for "rms") and reciprocal standard deviation of each token, float32 or wider, ``[tokens]``."""
    z = embedding_sum(tables, options.padding_idx).reshape(-1, tables.word.shape[1])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if options.rms:
        variance, mean = (z * z).mean(-1), z.new_empty(0)
    else:
        variance, mean = torch.var_mean(z, -1, correction=0)
    variance = variance + options.eps
    return mean, torch.where(variance == 0.0, torch.inf, variance).rsqrt()


def embed_norm_backward(
    dout: Tensor, mean: Tensor, rstd: Tensor, tables: Tables, options: Options, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the five tables as formulas. With xhat the normalised row and g = dropout(dout) * weight,
    dz = rstd * (g - mean(g) - xhat * mean(g * xhat)) (Ba et al., "Layer Normalization", 2016); RMSNorm has no mean(g).
    A table's row takes the sum of dz over the tokens that read it."""
    width, wide = tables.word.shape[1], rstd.dtype
    z = embedding_sum(tables, options.padding_idx).reshape(-1, width).to(wide)
    do = dropout.dropout(dout, tables.seed, options.dropout_p).reshape(-1, width).to(wide)
    if not tables.ids.is_cpu:
        do = do.masked_fill(~_rows_in_range(tables).reshape(-1, 1), 0.0)
    xhat = (z if options.rms else z - mean[:, None]) * rstd[:, None]
    g = do if tables.norm_weight is None else do * tables.norm_weight.to(wide)
    dz = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if not options.rms:
        dz = dz - g.mean(-1, keepdim=True)
    dz = dz * rstd[:, None]

    def rows_of(table: Tensor, ids: Tensor, padding_idx: int = -1) -> Tensor:
        ids = ids.expand(tables.ids.shape).reshape(-1)
        ids = ids if ids.is_cpu else ids.clamp(0, table.shape[0] - 1)
        return torch.ops.aten.embedding_dense_backward(dz, ids, table.shape[0], padding_idx, False)

    grads: list[Tensor | None] = [None] * 5
    if needs[0]:
        grads[0] = rows_of(tables.word, tables.ids, options.padding_idx)
    if needs[1] and tables.position is not None:
        if tables.position_ids is not None:
            grads[1] = rows_of(tables.position, tables.position_ids)
        else:
            length = tables.ids.shape[-1]
            dposition = dz.new_zeros(tables.position.shape)
            grads[1] = dposition
            dposition[:length] = dz.view(tables.ids.shape.numel() // max(length, 1), length, width).sum(0)
    if needs[2] and tables.type is not None:
        none = tables.type_ids is None
        grads[2] = rows_of(tables.type, torch.zeros_like(tables.ids) if none else tables.type_ids)  # type: ignore[arg-type]
    if needs[3]:
        grads[3] = (do * xhat).sum(0)
    if needs[4]:
        grads[4] = do.sum(0)
    return [None if grad is None else grad.to(tables.word.dtype) for grad in grads]
