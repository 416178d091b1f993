"""Attention in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention  # torch's own, whatever `sdpa_replacement` does
from torch.utils.checkpoint import checkpoint

from ..common import dropout
from .arguments import Inputs, Options, output_dtype, position_offset, sequences, wide_dtype

MAX_HEAD_DIM = 256
"""Of the kernels; the eager path has no such limit."""

_SCORES_AT_A_TIME = 1 << 24
"""Scores kept at a time; more are computed some queries after the other, and again for the gradients."""


def attention(inputs: Inputs, options: Options, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """Output and, on request, log-sum-exp; differentiable. torch's own kernel serves what it can on the CPU."""
    if inputs.scales is not None:
        out, lse = attention(_from_float8(inputs), options, return_lse)
        return out.to(output_dtype(inputs.query)), lse
    if inputs.seqlens_q is None:
        return _dense(inputs, options, return_lse, None)
    if inputs.query.is_meta:
        shape = inputs.query.shape
        out = inputs.query.new_empty((*shape[:3], inputs.value.shape[3]))
        return out, inputs.query.new_empty(shape[:3], dtype=wide_dtype(inputs.query)) if return_lse else None
    return _by_sequence(inputs, options, return_lse)


def _from_float8(inputs: Inputs) -> Inputs:
    """The same numbers in float32, scales applied; of a packed batch row by row."""
    assert inputs.scales is not None
    scales = inputs.scales
    if inputs.seqlens_q is not None and inputs.seqlens_k is not None and scales.shape[0] != inputs.query.shape[0]:
        of_q, of_k = (torch.repeat_interleave(scales, n.diff(), 0) for n in (inputs.seqlens_q, inputs.seqlens_k))
        of_q, of_k = of_q.transpose(0, 1)[None, :, :, :1], of_k.transpose(0, 1)[None, :, :, 1:]
    else:
        of_q, of_k = scales[:, :, None, :1], scales[:, :, None, 1:]
    group = inputs.query.shape[1] // inputs.key.shape[1]
    return inputs._replace(
        query=inputs.query.float() * of_q, key=inputs.key.float(),
        value=inputs.value.float() * of_k[:, ::group], scales=None,
    )  # fmt: skip


def _groups(inputs: Inputs, options: Options) -> Iterator[tuple[Inputs, slice, list[int] | None]]:
    """A ragged batch as dense ones, of neighbouring sequences of equal lengths: the tensors of each, which sequences it
    has, and the first row of each sequence and head for dropout."""
    assert inputs.seqlens_q is not None and inputs.seqlens_k is not None
    lengths_q, lengths_k = ([int(n) for n in t.tolist()] for t in (inputs.seqlens_q, inputs.seqlens_k))
    starts_q, starts_k = lengths_q, lengths_k
    if options.packed:
        lengths_q, lengths_k = ([b - a for a, b in itertools.pairwise(starts)] for starts in (starts_q, starts_k))
    nhead, total = inputs.query.shape[1:3]
    counts = [
        (lengths, len(list(members))) for lengths, members in itertools.groupby(zip(lengths_q, lengths_k, strict=True))
    ]
    # Split at once: the gradient is put together at once, too, where slices would each give one of the whole size.
    pieces = []
    for t, which in ((inputs.query, 0), (inputs.key, 1), (inputs.value, 1)):
        if options.packed:
            pieces.append(t[0].split([lengths[which] * count for lengths, count in counts], 1))
        else:
            pieces.append(t.split([count for _, count in counts]))
    first = 0
    for ((len_q, len_k), count), *parts in zip(counts, *pieces, strict=True):
        group = slice(first, first + count)

        def of_group(t: Tensor, length: int, count: int = count) -> Tensor:
            return t.unflatten(1, (count, length)).transpose(0, 1) if options.packed else t[:, :, :length]

        mask = _of_group(inputs.attn_mask, group)
        if mask is not None:
            mask = mask[:, :, : len_q if mask.shape[2] > 1 else 1, : len_k if mask.shape[3] > 1 else 1]
        rows = None
        if inputs.seed is not None:
            both = itertools.product(range(first, first + count), range(nhead))
            rows = [h * total + starts_q[b] if options.packed else (b * nhead + h) * total for b, h in both]
        dense = inputs._replace(
            query=of_group(parts[0], len_q), key=of_group(parts[1], len_k), value=of_group(parts[2], len_k),
            attn_mask=mask, seqlens_q=None, seqlens_k=None,
            alibi_slopes=_of_group(inputs.alibi_slopes, group), block_map=_of_group(inputs.block_map, group),
        )  # fmt: skip
        first += count
        yield dense, group, rows


def _by_sequence(inputs: Inputs, options: Options, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    outs, lses = [], []
    total = inputs.query.shape[2]
    for dense, _, rows in _groups(inputs, options):
        len_q = dense.query.shape[2]
        if options.packed and len_q == 0:
            continue
        out, lse = _dense(dense, options, return_lse, rows)
        outs.append(out.transpose(1, 2).flatten(0, 1) if options.packed else pad(out, (0, 0, 0, total - len_q)))
        if lse is not None:
            whole = pad(lse, (0, total - len_q), value=float("-inf"))
            lses.append(lse.transpose(0, 1).flatten(1) if options.packed else whole)
    if not outs:  # no query at all
        nothing = (inputs.query.sum() + inputs.key.sum() + inputs.value.sum()) * 0
        shape = inputs.query.shape[:3]
        out = inputs.query.new_zeros((*shape, inputs.value.shape[3])) + nothing
        return out, inputs.query.new_zeros(shape, dtype=wide_dtype(inputs.query)) + nothing if return_lse else None
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    lse = None
    if return_lse:
        lse = torch.cat(lses, 1)[None] if options.packed else torch.cat(lses)
    return (out.transpose(0, 1)[None] if options.packed else out), lse


def _of_group(t: Tensor | None, group: slice) -> Tensor | None:
    return t if t is None or t.shape[0] == 1 else t[group]


def _dense(
    inputs: Inputs, options: Options, return_lse: bool, first_rows: Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    if not return_lse and (served := _served_by_torch(inputs, options)) is not None:
        return served, None
    batch, nhead, len_q, _ = inputs.query.shape
    step = max(1, _SCORES_AT_A_TIME // max(1, batch * nhead * inputs.key.shape[2]))
    if len_q <= step or inputs.query.is_meta:
        return _some_queries(inputs, options, 0, len_q, return_lse, first_rows)
    parts = []
    for start in range(0, len_q, step):
        arguments = (inputs, options, start, min(start + step, len_q), return_lse, first_rows)
        parts.append(checkpoint(_some_queries, *arguments, use_reentrant=False, preserve_rng_state=False))
    out = torch.cat([part[0] for part in parts], 2)
    return out, torch.cat([part[1] for part in parts], 2) if return_lse else None


def _served_by_torch(inputs: Inputs, options: Options) -> Tensor | None:
    """The output of torch's own attention where it does what is asked, which it does fast on the CPU."""
    query, key, value, attn_mask, relative_bias, alibi_slopes, seed, *_ = inputs
    causal = options.right == 0
    if (
        not query.is_cpu or query.is_cuda or seed is not None or relative_bias is not None or alibi_slopes is not None
        or inputs.block_map is not None or options.left >= 0 or options.right > 0 or options.softcap > 0.0
        or (causal and (attn_mask is not None or (options.bottom_right and query.shape[2] != key.shape[2])))
    ):  # fmt: skip
        return None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        if attn_mask.dtype != query.dtype or attn_mask.requires_grad:
            return None
        if torch.is_grad_enabled() and _has_rows_of_large(attn_mask):
            return None
    grouped = bool(query.shape[1] != key.shape[1])  # a traced model's sizes are tensors
    return scaled_dot_product_attention(  # it answers rows with every key masked with 0, as we do
        query, key, value, attn_mask, 0.0, causal, scale=options.softmax_scale, enable_gqa=grouped
    )


_LARGE = 1e4


def _has_rows_of_large(attn_mask: Tensor) -> bool:
    """True if a row of a floating mask holds large numbers only (and not -inf).

    torch's backward pass on the CPU recomputes the softmax from the log-sum-exp, which has lost all else in such a
    row: its gradients are wrong by any factor.
    """
    if attn_mask.shape[-1] == 0:
        return False
    largest = attn_mask.detach().amax(-1)
    return _any((largest.abs() > _LARGE) & largest.isfinite(), unknown=False)


def _any(t: Tensor, unknown: bool = True) -> bool:
    """Whether any element is True; `unknown` where nothing may depend on values, or a look would make somebody wait."""
    if not t.is_cpu or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return unknown
    try:
        return bool(t.any())
    except RuntimeError:  # under torch.func.vmap
        return unknown


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seed: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float, average: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and softmax weights after dropout, ``[B, H, Lq, Lk]`` or averaged ``[B, Lq, Lk]``; differentiable."""
    wide = wide_dtype(query)
    batch, nhead, len_q, _ = query.shape
    len_k = key.shape[2]
    # Products of three dimensions: those of four cost the host as much again, forward and backward.
    products = torch.bmm(_as(wide, query).flatten(0, 1), _as(wide, key).flatten(0, 1).transpose(1, 2))
    scores, seeing = products.mul_(scale).view(batch, nhead, len_q, len_k), None
    if attn_mask is not None or is_causal:
        added = attn_mask is not None and attn_mask.dtype != torch.bool
        allowed = torch.ones((len_q, len_k), dtype=torch.bool, device=query.device).tril() if is_causal else None
        if attn_mask is not None and added:
            scores = scores + attn_mask.to(wide)
        elif attn_mask is not None:
            allowed = attn_mask if allowed is None else allowed & attn_mask
        scores, seeing = _hide(scores, allowed, added)
    weights = _softmax(scores, seeing)
    if seed is not None:
        if torch.compiler.is_compiling():  # a mask of ours would become a constant of the graph
            weights = torch.dropout(weights, dropout_p, True)
        else:
            weights = dropout.dropout(weights, seed, dropout_p)
    out = torch.bmm(weights.flatten(0, 1), _as(wide, value).flatten(0, 1)).view(batch, nhead, len_q, value.shape[3])
    return _as(query.dtype, out), weights.mean(1) if average else weights


def _some_queries(
    inputs: Inputs, options: Options, start: int, end: int, return_lse: bool, first_rows: Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp of the queries ``[start, end)``."""
    query, key, value, *_ = inputs
    wide = wide_dtype(query)
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores, seeing = scores_of(query[:, :, start:end].to(wide), key.to(wide), inputs, options, start)
    probabilities = _softmax(scores, seeing)
    if inputs.seed is not None:
        if first_rows is None and end - start < query.shape[2]:
            first_rows = [part * query.shape[2] for part in range(query.shape[0] * query.shape[1])]
        if first_rows is not None:
            first_rows = [row + start for row in first_rows]
        probabilities = dropout.dropout(probabilities, inputs.seed, options.dropout_p, first_rows)
    out = (probabilities @ value.to(wide)).to(query.dtype)
    if not return_lse:
        return out, None
    lse = scores.logsumexp(-1)
    return out, lse if seeing is None else lse.masked_fill(~seeing[..., 0], float("-inf"))


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    """`t.to(dtype)`, which takes the host a microsecond even where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def _softmax(scores: Tensor, seeing: Tensor | None) -> Tensor:
    """Of what `scores_of` gives: 0 in rows that see nothing."""
    weights = scores.softmax(-1)
    return weights if seeing is None else weights * seeing


def attention_weights(inputs: Inputs, options: Options, first_row: int, row_count: int, average: bool) -> Tensor:
    """The softmax weights of some queries, ``[B, H or 1, rows, Lk]``, a block of queries at a time."""
    if inputs.seqlens_q is not None:
        count = sequences(inputs, options)
        shape = (count, 1 if average else inputs.query.shape[1], row_count, options.max_len_k)
        whole = inputs.query.new_zeros(shape, dtype=wide_dtype(inputs.query))
        for dense, group, _ in _groups(inputs, options):
            rows = max(0, min(dense.query.shape[2] - first_row, row_count))
            part = attention_weights(dense, options, first_row, rows, average)
            whole[group, :, :rows, : part.shape[3]] = part
        return whole
    query, key, *_ = inputs
    batch, nhead, _, _ = query.shape
    len_k = key.shape[2]
    wide = wide_dtype(query)
    whole = query.new_empty((batch, 1 if average else nhead, row_count, len_k), dtype=wide)
    key = key.repeat_interleave(nhead // key.shape[1], 1).to(wide)
    step = max(1, _SCORES_AT_A_TIME // max(1, batch * nhead * len_k))
    for start in range(0, row_count, step):
        rows = min(step, row_count - start)
        part = query[:, :, first_row + start : first_row + start + rows].to(wide)
        scores, seeing = scores_of(part, key, inputs, options, first_row + start)
        weights = _softmax(scores, seeing)
        whole[:, :, start : start + rows] = weights.mean(1, keepdim=True) if average else weights
    return whole


def scores_of(query: Tensor, key: Tensor, inputs: Inputs, options: Options, start: int) -> tuple[Tensor, Tensor | None]:
    """Masked scores ``[B, H, rows, Lk]`` of the queries from `start` on, and which of them see anything, ``[..., 1]``
    with batch, heads and rows that broadcast (None: all do).

    The scores of a row that sees nothing are finite, not -inf, so that no NaN arises from it forward or backward.
    """
    scores = (query @ key.transpose(-1, -2)).mul_(options.softmax_scale)
    if options.softcap > 0.0:
        scores = options.softcap * (scores / options.softcap).tanh()
    rows, len_k = query.shape[2], key.shape[2]
    offset = start + position_offset(options, inputs.query.shape[2], len_k)
    distance = None
    if options.left >= 0 or options.right >= 0 or inputs.relative_bias is not None or inputs.alibi_slopes is not None:
        positions = torch.arange(max(rows, len_k), device=query.device)
        distance = positions[:len_k] - positions[:rows, None] - offset
    if inputs.alibi_slopes is not None:
        assert distance is not None
        scores = scores - inputs.alibi_slopes.to(scores.dtype)[:, :, None, None] * distance.abs()
    if inputs.relative_bias is not None:
        assert distance is not None
        reach = inputs.relative_bias.shape[1] // 2
        entry = distance.clamp(-reach, reach) + reach
        added = inputs.relative_bias.to(scores.dtype).index_select(1, entry.flatten())
        scores = scores + added.unflatten(1, entry.shape)
    allowed = None
    if options.left >= 0:
        assert distance is not None
        allowed = distance >= -options.left
    if options.right >= 0:
        assert distance is not None
        allowed = distance <= options.right if allowed is None else allowed & (distance <= options.right)
    mask = inputs.attn_mask
    if mask is not None:
        mask = mask[:, :, start : start + rows] if mask.shape[2] > 1 else mask
        if mask.dtype == torch.bool:
            allowed = mask if allowed is None else allowed & mask
        else:
            scores = scores + mask.to(scores.dtype)
    if inputs.block_map is not None:
        assert inputs.tiles is not None
        seen = elements_seen(inputs.block_map, inputs.tiles, start, rows, len_k)
        allowed = seen if allowed is None else allowed & seen
    first_is_seen = options.left < 0 and (options.right < 0 or offset + options.right >= 0)
    if len_k > 0 and mask is None and inputs.block_map is None and first_is_seen:  # by every query
        return scores if allowed is None else scores.masked_fill(~allowed, float("-inf")), None
    return _hide(scores, allowed, inputs.relative_bias is not None or (mask is not None and mask.dtype != torch.bool))


def _hide(scores: Tensor, allowed: Tensor | None, added: bool) -> tuple[Tensor, Tensor | None]:
    """Scores, -inf where not allowed, and which rows see anything, as `scores_of` returns them. `added`: something that
    may be -inf itself was added to them."""
    if allowed is not None and not added:
        hidden = ~allowed
        blind = hidden.all(-1, keepdim=True)
        if not _any(blind):
            return scores.masked_fill(hidden, float("-inf")), None
        return scores.masked_fill(hidden ^ blind, float("-inf")), ~blind  # a row that sees nothing stays as it is
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if scores.shape[3] == 0:
        return scores, torch.zeros((*scores.shape[:-1], 1), dtype=torch.bool, device=scores.device)
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


def attention_backward(
    dout: Tensor, dlse: Tensor | None, inputs: Inputs, options: Options, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the first five inputs, as far as `needs` asks for them, for the operator of ``torch.compile``."""
    return _gradients(lambda leaves: attention(leaves, options, dlse is not None), (dout, dlse), inputs, needs)


def weights_backward(
    dout: Tensor | None, dweights: Tensor, inputs: Inputs, options: Options, average: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The same of `attention_with_weights`, whose softmax is computed again."""

    def function(leaves: Inputs) -> tuple[Tensor, Tensor]:
        query, key, value, attn_mask, *_ = leaves
        return attention_with_weights(
            query, key, value, attn_mask, inputs.seed, options.dropout_p, options.right == 0, options.softmax_scale,
            average,
        )  # fmt: skip

    return _gradients(function, (dout, dweights), inputs, needs)


def _gradients(
    function: Callable[[Inputs], tuple[Tensor | None, ...]], upstream: tuple[Tensor | None, ...], inputs: Inputs,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the first five inputs of a differentiable function, as far as `needs` asks for them."""
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_(want) if t is not None else None
            for t, want in zip(inputs[:5], needs, strict=True)
        ]
        differentiable: dict[str, Any] = dict(zip(inputs._fields, leaves, strict=False))
        results = zip(function(inputs._replace(**differentiable)), upstream, strict=True)
        pairs = [(out, grad) for out, grad in results if out is not None and grad is not None]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        outputs, given = [out for out, _ in pairs], [grad for _, grad in pairs]
        grads = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
    found = [next(grads) if t is not None and t.requires_grad else None for t in leaves]
    return tuple(
        torch.zeros_like(t) if want and grad is None and t is not None else grad
        for t, want, grad in zip(leaves, needs, found, strict=True)
    )
