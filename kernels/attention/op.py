"""Attention as operations: what their call path, autograd function and torch.library operators are made from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import checks, compat, plan
from ..common.operator import Operation, Prepare
from . import eager
from .arguments import UNITS, Options, Saved, Tensors, added, wide_dtype

_NO_LIMIT = 1 << 30  # longer than any sequence


# What checks and choices depend on


def _signature(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, relative_bias: Any, alibi_slopes: Any, seqlens_q: Any,
    seqlens_k: Any, block_map: Any, blocks_of_query: Any, blocks_of_key: Any, tiles: Any, max_len_q: int,
    max_len_k: int, *queries: int,
) -> Hashable:  # fmt: skip
    q, k, v = query.shape, key.shape, value.shape
    of_q, of_k, of_v = query.stride(), key.stride(), value.stride()
    place, dtype = query.device, query.dtype
    at_q, at_k, at_v = query.data_ptr(), key.data_ptr(), value.data_ptr()
    if len(q) == 4:
        row, outer = 2, of_q[0] | of_q[1] | of_k[0] | of_k[1] | of_v[0] | of_v[1]
        fits = q[0] == k[0] == v[0] and k[2] == v[2]
    else:
        row, outer, fits = 0, of_q[1] | of_k[1] | of_v[1], k[0] == v[0]
    options = None
    if not (attn_mask is relative_bias is alibi_slopes is seqlens_q is seqlens_k is block_map is None):
        count = q[0] if len(q) == 4 else seqlens_q.shape[0] - 1
        options = (
            None if attn_mask is None else of_mask(attn_mask, (count, q[1], max_len_q, max_len_k)),
            plan.of_parameter(relative_bias), plan.of_vector(seqlens_q), plan.of_vector(seqlens_k),
            None if seqlens_q is None else seqlens_q.shape[0] - count,
            None if seqlens_k is None else seqlens_k.shape[0] - count,
            None if alibi_slopes is None else (
                plan.of_vector(alibi_slopes), alibi_slopes.shape[-1], alibi_slopes.shape[0] == count,
                alibi_slopes.requires_grad,
            ),
            None if block_map is None else (
                max_len_q, max_len_k, count, plan.of_parameters((block_map, blocks_of_query, blocks_of_key, tiles)),
            ),
        )  # fmt: skip
    return (
        dtype, key.dtype, value.dtype, place, key.device == place and value.device == place, fits,
        len(q), len(k), len(v), q[1], k[1], v[1], q[-1], k[-1], v[-1],
        of_q[row], of_q[-1], of_k[row], of_k[-1], of_v[row], of_v[-1], UNITS[outer & 15], outer >> 31,
        (at_q | at_k | at_v) & 15 and (at_q & 15, at_k & 15, at_v & 15),
        (query.numel() + key.numel()) * (q[-1] + v[-1]) // (q[-1] or 1) >> 31,
        (max_len_q - 1).bit_length(), (max_len_k - 1).bit_length(), dtype is torch.float32 and compat.tf32_allowed(),
        (queries or seqlens_q is seqlens_k is None) and max_len_k & 15 == 0, options,
    )  # fmt: skip


def of_mask(mask: Tensor, full: Sequence[int]) -> Hashable:
    """Signature of a mask that is broadcast to `full`, whose last size is that of the keys."""
    rank = len(mask.shape)
    shape, strides = (*(1,) * (4 - rank), *mask.shape), (*(0,) * (4 - rank), *mask.stride())
    outer = 0
    for i in range(3):
        if shape[i] != 1:
            outer |= strides[i]
    return (
        mask.dtype, mask.device, mask.data_ptr() & 15, rank, strides[-1], strides[2] == 0,
        tuple([n == 1 for n in shape]),
        False not in [n in (1, m) for n, m in zip(shape, full, strict=False)], (outer | full[3]) & 15 == 0,
        outer >> 31, (shape[2] + 128) * strides[2] + (shape[-1] + 128) * strides[-1] >> 31,
    )  # fmt: skip


def _signature_of_gradients(grads: Sequence[Tensor | None], saved: Sequence[Any]) -> Hashable:
    """Of the output, its gradient, and the log-sum-exp's or the weights'."""
    dout, other = grads
    return (
        _of_output(saved[-2]), None if dout is None else _of_output(dout),
        None if other is None else (other.is_contiguous(), other.data_ptr() & 15),
    )  # fmt: skip


def _of_output(t: Tensor) -> Hashable:
    strides = t.stride()
    four = len(strides) == 4
    outer = strides[0] | strides[1] if four else strides[1]
    return strides[2 if four else 0], strides[-1], UNITS[outer & 15], outer >> 31, t.data_ptr() & 15


# Checks


def _check(tensors: Any, options: Any, sizes: Any, autocast: bool) -> tuple[Prepare, Options]:
    query, key, value, attn_mask, relative_bias, alibi_slopes, seqlens_q, seqlens_k, block_map, *_, tiles = tensors
    dropout_p, is_causal, scale, enable_gqa, window, softcap, alignment, packed, shape_of_blocks, *flags = options
    checks.dropout_probability(dropout_p)
    _check_operands(query, key, value, enable_gqa, packed)
    len_q, len_k, *_ = sizes
    nhead, batch = query.shape[1], query.shape[0]
    prepare: list[Any] = []
    if packed:
        check_starts("cu_seqlens_q", seqlens_q, "max_seqlen_q", len_q, query)
        check_starts("cu_seqlens_k", seqlens_k, "max_seqlen_k", len_k, query)
        batch = seqlens_q.shape[0] - 1
        if seqlens_k.shape[0] != batch + 1:
            checks.fail_value("cu_seqlens_k", f"{batch + 1} entries, as cu_seqlens_q", seqlens_k)
    else:
        for name, lengths in (("seqlens_q", seqlens_q), ("seqlens_k", seqlens_k)):
            if lengths is not None:
                _check_tensor(name, lengths, query, True)
                if lengths.dim() != 1 or lengths.shape[0] != batch:
                    checks.fail_value(name, f"shape [{batch}]", lengths)
    full = (batch, nhead, len_q, len_k)
    if attn_mask is not None:
        check_mask(attn_mask, query, full)
        if attn_mask.dim() != 4:
            prepare.append((3, four_dimensions))
    if scale is not None and not isinstance(scale, (int, float)):
        checks.fail_type("scale", "a number", scale)
    softmax_scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if softmax_scale <= 0.0:  # the kernels' is above 0, so that the largest product has the largest score
        prepare.append((0, functools.partial(torch.mul, other=-1.0 if softmax_scale else 0.0)))
        softmax_scale = -softmax_scale or 1.0
    left, right = (-1, -1) if window is None else _checked_window(window)
    checks.one_of("alignment", alignment, ("top_left", "bottom_right"))
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0.0 < softcap < math.inf):
        checks.fail_value("softcap", "a number above 0, or None", softcap)
    if alibi_slopes is not None:
        _check_tensor("alibi_slopes", alibi_slopes, query)
        # Size by size, here and elsewhere: torch.compile would fix the sizes of tuples that are compared.
        slopes = alibi_slopes.shape
        if len(slopes) not in (1, 2) or slopes[-1] != nhead or (len(slopes) == 2 and slopes[0] != batch):
            checks.fail_value("alibi_slopes", f"shape [{nhead}] or [{batch}, {nhead}]", alibi_slopes)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            checks.fail_value("alibi_slopes", "a tensor that needs no gradient", alibi_slopes)
    if relative_bias is not None:
        _check_tensor("relative_bias", relative_bias, query)
        if relative_bias.dim() != 2 or relative_bias.shape[0] not in (1, nhead) or relative_bias.shape[1] % 2 == 0:
            checks.fail_value("relative_bias", f"shape [{nhead} or 1, 2 R + 1]", relative_bias)
    if block_map is not None:
        *some, same_q, same_k = shape_of_blocks
        if not all(n in (1, m) for n, m in zip(some, full, strict=False)) or same_q != len_q or same_k != len_k:
            expected = f"one of shape [1 or {batch}, 1 or {nhead}, {len_q}, {len_k}]"
            checks.fail_value("block_mask", expected, shape_of_blocks)
        if tiles.device != query.device:
            checks.fail_value("block_mask", f"device {query.device}, that of query", tiles)
    return tuple(prepare), Options(
        softmax_scale, float(dropout_p), 0.0 if softcap is None else float(softcap), left, 0 if is_causal else right,
        alignment == "bottom_right", packed, *flags,
    )  # fmt: skip


def _check_operands(query: Any, key: Any, value: Any, enable_gqa: bool, packed: bool) -> None:
    rank, expected = (3, "three dimensions, [T, H, D]") if packed else (4, "four dimensions, [B, H, L, D]")
    for name, t in (("query", query), ("key", key), ("value", value)):
        checks.floating_tensor(name, t)
        if t.dim() != rank:
            checks.fail_value(name, expected, t)
    checks.same_kind("key", key, "query", query)
    checks.same_kind("value", value, "query", query)
    nhead, key_nhead, head_dim = query.shape[1], key.shape[1], query.shape[-1]
    if nhead == 0 or head_dim == 0:
        checks.fail_value("query", "at least one head, and a head size of at least 1", query)
    heads_fit = key_nhead == nhead or (enable_gqa and key_nhead > 0 and nhead % key_nhead == 0)
    if not heads_fit or key.shape[-1] != head_dim or (not packed and key.shape[0] != query.shape[0]):
        heads = f"a divisor of {nhead}" if enable_gqa else nhead
        of_key = f"[Tk, {heads}, {head_dim}]" if packed else f"[{query.shape[0]}, {heads}, Lk, {head_dim}]"
        checks.fail_value("key", f"shape {of_key}, to go with query", key)
    if checks.differ(value.shape[:-1], key.shape[:-1]):
        checks.fail_value("value", f"shape [{', '.join(map(str, key.shape[:-1]))}, Dv], to go with key", value)


def check_mask(attn_mask: Any, query: Tensor, full: Sequence[int], name: str = "attn_mask") -> None:
    """Raise unless a mask, called `name`, is a bool or floating tensor that broadcasts to `full`, on the device of
    `query`."""
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        checks.fail_type(name, "a bool or floating tensor", attn_mask)
    sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
    if attn_mask.dim() > 4 or not all(n in (1, m) for n, m in sizes):
        checks.fail_value(name, f"a shape that broadcasts to [B, H, Lq, Lk] = {list(full)}", attn_mask)
    if attn_mask.device != query.device:
        checks.fail_value(name, f"device {query.device}, that of query", attn_mask)


def four_dimensions(mask: Tensor) -> Tensor:
    """A mask as the paths take it."""
    return mask.view((1,) * (4 - mask.dim()) + mask.shape)


def _checked_window(window: Any) -> tuple[int, int]:
    if not isinstance(window, tuple) or len(window) != 2:
        checks.fail_type("window", "a pair (left, right)", window)
    for size in window:
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            checks.fail_type("window", "two integers, or None for no limit", window)
        if size is not None and size < 0:
            checks.fail_value("window", "two numbers of at least 0, or None for no limit", window)
    left, right = (-1 if size is None else min(size, _NO_LIMIT) for size in window)
    return left, right


def check_starts(name: str, starts: Any, max_name: str, longest: Any, query: Tensor) -> None:
    """Raise unless `starts` can be the first rows of sequences of at most `longest` rows, values aside."""
    _check_tensor(name, starts, query, True)
    if starts.dim() != 1 or starts.shape[0] == 0:
        checks.fail_value(name, "one dimension, [B + 1]", starts)
    if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool):
        checks.fail_type(max_name, "an integer", longest)
    if longest < 0:
        checks.fail_value(max_name, "at least 0", longest)


def _check_tensor(name: str, value: Any, query: Tensor, integers: bool = False) -> None:
    if integers:
        checks.integer_tensor(name, value)
    else:
        checks.floating_tensor(name, value)
    if value.device != query.device:
        checks.fail_value(name, f"device {query.device}, that of query", value)


# The operations


def _forward(tensors: Tensors, options: Options, sizes: Sequence[int], needs: Sequence[bool]) -> Callable[..., Any]:
    from .forward import attention_forward

    return attention_forward(tensors, options, sizes, needs)


def _keep(tensors: Sequence[Any], results: Sequence[Any], options: Options) -> Saved:
    return Saved._make((*tensors, results[0], results[2]))


def _backward(
    grads: Sequence[Any], saved: Sequence[Any], options: Options, sizes: Sequence[int], needs: Sequence[bool]
) -> Callable[..., Any]:
    from .backward import attention_backward

    return attention_backward(grads, saved, options, sizes, needs)


def _fake(tensors: Tensors, options: Options, sizes: Any, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    query = tensors.query
    rows = query.shape[:3] if query.dim() == 4 else (query.shape[1], query.shape[0])
    return (
        query.new_empty((*query.shape[:-1], tensors.value.shape[-1])),
        query.new_empty(rows, dtype=wide_dtype(query)) if options.return_lse else None,
        query.new_empty(math.prod(rows) * (1 + added(tensors, options)), dtype=torch.float32) if needs else None,
    )


ATTENTION = Operation(
    "attention", Tensors, Options, differentiable=5, outputs=2, results=3, signature=_signature, check=_check,
    eager=eager.attention, forward=_forward, keep=_keep, backward=_backward, fake=_fake,
    sizes=("max_len_q", "max_len_k"), dropouts=("dropout_p",), contiguous=(4, 6, 7), cast=3,
    grad_signature=_signature_of_gradients,
)  # fmt: skip


def _with_weights(tensors: Tensors, options: Options, sizes: Any, needs: Sequence[bool]) -> Callable[..., Any]:
    from .forward import attention_forward
    from .planes import softmax_weights

    attend, weigh = attention_forward(tensors, options, sizes, (True,)), softmax_weights(tensors, options, sizes)

    def run(*arguments: Any) -> tuple[Tensor | None, ...]:
        out, _, statistics = attend(*arguments[:-2])
        return out, weigh(arguments[:-4], statistics, *arguments[-4:]), statistics

    return run


def _backward_with_weights(
    grads: Sequence[Any], saved: Sequence[Any], options: Options, sizes: Sequence[int], needs: Sequence[bool]
) -> Callable[..., Any]:
    """Weights of which nothing was computed cost the backward pass nothing; else the softmax is computed again."""
    from .backward import attention_backward

    if grads[1] is None:
        launch = attention_backward(grads, saved, options, sizes, needs)
        return lambda grads, saved, *sizes: launch(grads, saved, *sizes[:2])
    return lambda grads, saved, *sizes: WITH_WEIGHTS._eager_gradients(grads, saved[:-2], options, sizes, needs)


def _fake_with_weights(tensors: Tensors, options: Options, sizes: Any, needs: Sequence[bool]) -> tuple[Any, ...]:
    out, _, statistics = _fake(tensors, options, sizes, (True,))
    query, starts = tensors.query, tensors.seqlens_q
    count = starts.shape[0] - 1 if options.packed and starts is not None else query.shape[0]
    shape = (count, *(() if options.average else (query.shape[1],)), sizes[3], sizes[1])
    return out, query.new_empty(shape, dtype=wide_dtype(query)), statistics


WITH_WEIGHTS = Operation(
    "attention_with_weights", Tensors, Options, differentiable=5, outputs=2, results=3, signature=_signature,
    check=_check, eager=eager.attention_with_weights, forward=_with_weights, keep=_keep,
    backward=_backward_with_weights, fake=_fake_with_weights,
    sizes=("max_len_q", "max_len_k", "first_row", "row_count"), dropouts=("dropout_p",), contiguous=(4, 6, 7),
    cast=3, grad_signature=_signature_of_gradients,
)  # fmt: skip
