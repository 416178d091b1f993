"""Attention in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention  # torch's own, whatever `sdpa_replacement` does
from torch.utils.checkpoint import checkpoint

from ..common import checks, dropout
from .arguments import Options, Tensors, wide_dtype

MAX_HEAD_DIM = 256
"""Of the kernels; the eager path has no such limit."""

_SCORES_AT_A_TIME = 1 << 24
"""Scores kept at a time; more are computed some queries after the other, and again for the gradients."""


def attention(tensors: Tensors, options: Options, max_len_q: int, max_len_k: int) -> tuple[Tensor, Tensor | None]:
    """Output and, on request, log-sum-exp; differentiable. torch's own kernel serves what it can on the CPU.

    Raises:
        ValueError: lengths or first rows that do not fit the tensors, on a CPU.
    """
    given = tensors.query
    tensors = _in_one_form(tensors, options, max_len_q, max_len_k)
    ragged = not tensors.seqlens_q is tensors.seqlens_k is None
    out, lse = _by_sequence(tensors, options) if ragged else _dense(tensors, options, None)
    if given.dim() == 4:
        return out, lse
    return out[0].transpose(0, 1), lse if lse is None else lse[0]


def attention_with_weights(
    tensors: Tensors, options: Options, max_len_q: int, max_len_k: int, first_row: int, row_count: int
) -> tuple[Tensor, Tensor]:
    """Output and softmax weights after dropout, ``[B, H, rows, Lk]`` or averaged ``[B, rows, Lk]``, of some queries, a
    block of them at a time; differentiable. Ragged batches get no output."""
    tensors = _in_one_form(tensors, options, max_len_q, max_len_k)
    query, value, starts = tensors.query, tensors.value, tensors.seqlens_q
    ragged = not starts is tensors.seqlens_k is None
    count = starts.shape[0] - 1 if options.packed and starts is not None else query.shape[0]
    heads = () if options.average else (query.shape[1],)
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    found = query.new_zeros((count, *heads, row_count, max_len_k), dtype=wide_dtype(query))
    for dense, group, _ in _groups(tensors, options) if ragged else [(tensors, slice(None), None)]:
        last = min(dense.query.shape[2], first_row + row_count)
        step = max(1, _SCORES_AT_A_TIME // max(1, dense.query.shape[0] * query.shape[1] * dense.key.shape[2]))
        for start in range(first_row, last, step):
            end = min(start + step, last)
            weights, _ = _weights_of_queries(dense, options, start, end, None)
            if not ragged:
                out[:, :, start:end] = (weights @ _for_each_head(value, query).to(weights.dtype)).to(query.dtype)
            weights = weights.mean(1) if options.average else weights
            found[group, ..., start - first_row : end - first_row, : weights.shape[-1]] = weights
    return out, found


def require_starts(name: str, starts: Tensor, total: int, max_name: str, longest: int) -> None:
    """Raise ValueError if first rows of sequences do not begin at 0, descend or do not end at `total`, or a sequence is
    longer than `longest`. Values on a GPU are not looked at, which would wait for it."""
    if not _readable(starts):
        return
    values = starts.tolist()
    if values[0] != 0 or values[-1] != total:
        checks.fail_value(name, f"the first entry 0 and the last {total}, the number of tokens", values)
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if lengths and min(lengths) < 0:
        checks.fail_value(name, "ascending entries", values)
    if lengths and max(lengths) > longest:
        checks.fail_value(max_name, f"at least {max(lengths)}, the longest sequence", longest)


def _readable(t: Tensor) -> bool:
    """True if values can be read without a device sync."""
    return t.is_cpu and not t.is_cuda  # a tensor that stands for a GPU's where there is none is both


def _in_one_form(tensors: Tensors, options: Options, max_len_q: int, max_len_k: int) -> Tensors:
    """A packed batch as one row of tokens, slopes with two dimensions; raises for lengths that do not fit."""
    query, key, value, *_ = tensors
    if query.dim() == 3:
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
        tensors = tensors._replace(query=query, key=key, value=value)
    if tensors.alibi_slopes is not None:
        tensors = tensors._replace(alibi_slopes=tensors.alibi_slopes.view(-1, query.shape[1]))
    of_both = ((tensors.seqlens_q, "q", query, max_len_q), (tensors.seqlens_k, "k", key, max_len_k))
    for lengths, which, t, longest in of_both:
        if lengths is None:
            continue
        if options.packed:
            require_starts(f"cu_seqlens_{which}", lengths, t.shape[2], f"max_seqlen_{which}", longest)
        elif _readable(lengths) and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= longest:
            checks.fail_value(f"seqlens_{which}", f"lengths from 0 to {longest}", lengths.tolist())
    return tensors


def _groups(tensors: Tensors, options: Options) -> Iterator[tuple[Tensors, slice, list[int] | None]]:
    """A ragged batch as dense ones, of neighbouring sequences of equal lengths: the tensors of each, which sequences it
    has, and the first row of each sequence and head for dropout."""
    nhead, total = tensors.query.shape[1:3]
    starts_q, starts_k = (
        [t.shape[2]] * t.shape[0] if lengths is None else lengths.tolist()
        for t, lengths in ((tensors.query, tensors.seqlens_q), (tensors.key, tensors.seqlens_k))
    )
    lengths_q, lengths_k = starts_q, starts_k
    if options.packed:
        lengths_q, lengths_k = ([b - a for a, b in itertools.pairwise(starts)] for starts in (starts_q, starts_k))
    pairs = itertools.groupby(zip(lengths_q, lengths_k, strict=True))
    counts = [(lengths, len(list(members))) for lengths, members in pairs]
    # Split at once: the gradient is put together at once, too, where slices would each give one of the whole size.
    pieces = []
    for t, which in ((tensors.query, 0), (tensors.key, 1), (tensors.value, 1)):
        if options.packed:
            pieces.append(t[0].split([lengths[which] * count for lengths, count in counts], 1))
        else:
            pieces.append(t.split([count for _, count in counts]))
    first = 0
    for ((len_q, len_k), count), *of_group in zip(counts, *pieces, strict=True):
        group = slice(first, first + count)
        query, key, value = (
            t.unflatten(1, (count, length)).transpose(0, 1) if options.packed else t[:, :, :length]
            for t, length in zip(of_group, (len_q, len_k, len_k), strict=True)
        )
        mask = _of_group(tensors.attn_mask, group)
        if mask is not None:
            mask = mask[:, :, : len_q if mask.shape[2] > 1 else 1, : len_k if mask.shape[3] > 1 else 1]
        rows = None
        if tensors.seed is not None:
            both = itertools.product(range(first, first + count), range(nhead))
            rows = [h * total + starts_q[b] if options.packed else (b * nhead + h) * total for b, h in both]
        dense = tensors._replace(
            query=query, key=key, value=value, attn_mask=mask, seqlens_q=None, seqlens_k=None,
            alibi_slopes=_of_group(tensors.alibi_slopes, group), block_map=_of_group(tensors.block_map, group),
        )  # fmt: skip
        first += count
        yield dense, group, rows


def _of_group(t: Tensor | None, group: slice) -> Tensor | None:
    return t if t is None or t.shape[0] == 1 else t[group]


def _by_sequence(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    outs, lses, packed = [], [], options.packed
    query, total = tensors.query, tensors.query.shape[2]
    for dense, _, rows in () if query.is_meta else _groups(tensors, options):
        len_q = dense.query.shape[2]
        if packed and len_q == 0:
            continue
        out, lse = _dense(dense, options, rows)
        outs.append(out.transpose(1, 2).flatten(0, 1) if packed else pad(out, (0, 0, 0, total - len_q)))
        if lse is not None:
            whole = pad(lse, (0, total - len_q), value=float("-inf"))
            lses.append(lse.transpose(0, 1).flatten(1) if packed else whole)
    if not outs:  # no query at all, or no lengths
        return _dense(Tensors(query, tensors.key, tensors.value), options, None)
    out = torch.cat(outs) if len(outs) > 1 else outs[0]
    if packed:
        return out.transpose(0, 1)[None], torch.cat(lses, 1)[None] if lses else None
    return out, torch.cat(lses) if lses else None


def _dense(tensors: Tensors, options: Options, first_rows: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
    if not options.return_lse and (served := _served_by_torch(tensors, options)) is not None:
        return served, None
    batch, nhead, len_q, _ = tensors.query.shape
    step = max(1, _SCORES_AT_A_TIME // max(1, batch * nhead * tensors.key.shape[2]))
    if len_q <= step or tensors.query.is_meta:
        return _some_queries(tensors, options, 0, len_q, first_rows)
    parts = []
    for start in range(0, len_q, step):
        arguments = (tensors, options, start, min(start + step, len_q), first_rows)
        parts.append(checkpoint(_some_queries, *arguments, use_reentrant=False, preserve_rng_state=False))
    out = torch.cat([part[0] for part in parts], 2)
    return out, torch.cat([part[1] for part in parts], 2) if options.return_lse else None


def _served_by_torch(tensors: Tensors, options: Options) -> Tensor | None:
    """The output of torch's own attention where it does what is asked, which it does fast on the CPU."""
    query, key, value, attn_mask, relative_bias, alibi_slopes, *_ = tensors
    causal = options.right == 0
    if (
        not _readable(query) or not relative_bias is alibi_slopes is tensors.block_map is tensors.seed is None
        or options.left >= 0 or options.right > 0 or options.softcap > 0.0
        or (causal and (attn_mask is not None or (options.bottom_right and query.shape[2] != key.shape[2])))
    ):  # fmt: skip
        return None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        if attn_mask.dtype != query.dtype or attn_mask.requires_grad:
            return None
        if torch.is_grad_enabled() and attn_mask.shape[-1]:
            # torch's backward pass on the CPU recomputes the softmax from the log-sum-exp, which has lost all else in a
            # row of large numbers only (and not -inf): its gradients are wrong by any factor.
            largest = attn_mask.detach().amax(-1)
            if _any((largest.abs() > 1e4) & largest.isfinite(), unknown=False):
                return None
    grouped = bool(query.shape[1] != key.shape[1])  # a traced model's sizes are tensors
    return scaled_dot_product_attention(  # it answers rows with every key masked with 0, as we do
        query, key, value, attn_mask, 0.0, causal, scale=options.softmax_scale, enable_gqa=grouped
    )


def _any(t: Tensor, unknown: bool = True) -> bool:
    """True if any element is; `unknown` where nothing may depend on values, or a look would wait for a GPU."""
    if not t.is_cpu or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return unknown
    try:
        return bool(t.any())
    except RuntimeError:  # under torch.func.vmap
        return unknown


def _some_queries(
    tensors: Tensors, options: Options, start: int, end: int, first_rows: Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp of the queries ``[start, end)``."""
    query, value = tensors.query, tensors.value
    weights, lse = _weights_of_queries(tensors, options, start, end, first_rows)
    return (weights @ _for_each_head(value, query).to(weights.dtype)).to(query.dtype), lse


def _for_each_head(t: Tensor, query: Tensor) -> Tensor:
    """Keys or values of each query head."""
    group = query.shape[1] // t.shape[1]
    return t.repeat_interleave(group, 1) if group > 1 else t


def _weights_of_queries(
    tensors: Tensors, options: Options, start: int, end: int, first_rows: Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax weights after dropout and, on request, log-sum-exp of the queries ``[start, end)``."""
    query, wide = tensors.query, wide_dtype(tensors.query)
    key = _for_each_head(tensors.key, query).to(wide)
    scores, seeing = scores_of(query[:, :, start:end].to(wide), key, tensors, options, start)
    weights = scores.softmax(-1) if seeing is None else scores.softmax(-1) * seeing
    if tensors.seed is not None:
        if first_rows is None and end - start < query.shape[2]:
            first_rows = [part * query.shape[2] for part in range(query.shape[0] * query.shape[1])]
        if first_rows is not None:
            first_rows = [row + start for row in first_rows]
        weights = dropout.dropout(weights, tensors.seed, options.dropout_p, first_rows)
    if not options.return_lse:
        return weights, None
    lse = scores.logsumexp(-1)
    return weights, lse if seeing is None else lse.masked_fill(~seeing[..., 0], float("-inf"))


def scores_of(
    query: Tensor, key: Tensor, tensors: Tensors, options: Options, start: int
) -> tuple[Tensor, Tensor | None]:
    """Masked scores ``[B, H, rows, Lk]`` of the queries from `start` on, and which of them see anything, ``[..., 1]``
    (None: all do).

    The scores of a row that sees nothing are finite, not -inf, so that no NaN arises from it forward or backward.
    """
    scores = (query @ key.transpose(-1, -2)).mul_(options.softmax_scale)
    if options.softcap > 0.0:
        scores = options.softcap * (scores / options.softcap).tanh()
    rows, len_k = query.shape[2], key.shape[2]
    offset = start + (len_k - tensors.query.shape[2] if options.bottom_right else 0)
    left, right, relative, mask = options.left, options.right, tensors.relative_bias, tensors.attn_mask
    distance: Any = None
    if left >= 0 or right >= 0 or not relative is tensors.alibi_slopes is None:
        positions = torch.arange(max(rows, len_k), device=query.device)
        distance = positions[:len_k] - positions[:rows, None] - offset
    if tensors.alibi_slopes is not None:
        scores = scores - tensors.alibi_slopes.to(scores.dtype)[:, :, None, None] * distance.abs()
    if relative is not None:
        reach = relative.shape[1] // 2
        entry = distance.clamp(-reach, reach) + reach
        scores = scores + relative.to(scores.dtype).index_select(1, entry.flatten()).unflatten(1, entry.shape)
    allowed: list[Tensor] = []
    if left >= 0:
        allowed.append(distance >= -left)
    if right >= 0:
        allowed.append(distance <= right)
    if mask is not None:
        mask = mask[:, :, start : start + rows] if mask.shape[2] > 1 else mask
        if mask.dtype == torch.bool:
            allowed.append(mask)
        else:
            scores = scores + mask.to(scores.dtype)
    if tensors.block_map is not None and tensors.tiles is not None:
        allowed.append(elements_seen(tensors.block_map, tensors.tiles, start, rows, len_k))
    if allowed:
        scores = scores.masked_fill(~functools.reduce(torch.logical_and, allowed), float("-inf"))
    first_is_seen = left < 0 and (right < 0 or offset + right >= 0)
    if len_k == 0:
        return scores, torch.zeros((*scores.shape[:-1], 1), dtype=torch.bool, device=scores.device)
    if mask is relative is tensors.block_map is None and first_is_seen:  # by every query
        return scores, None
    blind = scores.detach().amax(-1, keepdim=True) == float("-inf")
    return (scores.masked_fill(blind, 0.0), ~blind) if _any(blind) else (scores, None)


def elements_seen(block_map: Tensor, tiles: Tensor, start: int, rows: int, len_k: int) -> Tensor:
    """The rows from `start` on of a block mask, element by element: bool ``[1 or B, 1 or H, rows, Lk]``."""
    size = tiles.shape[1]
    first = start // size
    kinds = block_map[:, :, first : (start + rows - 1) // size + 1]
    known = torch.zeros((2, size, size), dtype=torch.bool, device=tiles.device)
    known[1] = True
    whole = torch.cat([known, tiles])[kinds.long()]  # [b, h, blocks of queries, blocks of keys, size, size]
    whole = whole.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return whole[:, :, start - first * size :][:, :, :rows, :len_k]
