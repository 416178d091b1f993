"""The public functions: arguments, checks, documentation."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..common import backend, checks, dropout, operator
from ..common import device as gpu
from . import eager, op
from .arguments import Inputs, Options, wide_dtype
from .block_mask import BlockMask

Alignment = Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None]
_DTYPES = checks.DTYPES | checks.FLOAT8
_NOTHING = contextlib.nullcontext()
_NO_BLOCKS = (None, None, None, None)
_FAR = 1 << 30  # farther than any sequence is long


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, window: Window | None = ...,
    alibi_slopes: Tensor | None = ..., relative_bias: Tensor | None = ..., softcap: float | None = ...,
    alignment: Alignment = ..., seqlens_q: Tensor | None = ..., seqlens_k: Tensor | None = ...,
    block_mask: BlockMask | None = ..., query_scale: Tensor | None = ..., key_scale: Tensor | None = ...,
    value_scale: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, window: Window | None = ...,
    alibi_slopes: Tensor | None = ..., relative_bias: Tensor | None = ..., softcap: float | None = ...,
    alignment: Alignment = ..., seqlens_q: Tensor | None = ..., seqlens_k: Tensor | None = ...,
    block_mask: BlockMask | None = ..., query_scale: Tensor | None = ..., key_scale: Tensor | None = ...,
    value_scale: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., enable_gqa: bool = ..., *, window: Window | None = ...,
    alibi_slopes: Tensor | None = ..., relative_bias: Tensor | None = ..., softcap: float | None = ...,
    alignment: Alignment = ..., seqlens_q: Tensor | None = ..., seqlens_k: Tensor | None = ...,
    block_mask: BlockMask | None = ..., query_scale: Tensor | None = ..., key_scale: Tensor | None = ...,
    value_scale: Tensor | None = ..., return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    alignment: Alignment = "top_left",
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    block_mask: BlockMask | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * query @ key^T + bias) @ value``: `F.scaled_dot_product_attention` and more.

    On a GPU it runs flash-attention style Triton kernels, forward and backward (Dao, FlashAttention-2, 2023):
    the scores never reach memory. Elsewhere, and in float64, it runs eager PyTorch with the same results. All options
    go together; a key must be allowed by each of them.

    A query with no key allowed gives output 0, gradient 0 and log-sum-exp -inf; a mask never gives NaN.

    Args:
        query: ``[B, H, Lq, D]``, float32, float16, bfloat16 or float64, any strides: a ``[B, L, H, D]``
            tensor transposed costs no copy. D is 1 to 256 on the kernels. For inference also float8 (e4m3fn or e5m2),
            on a GPU of NVIDIA's from sm_89 on; values and softmax weights are then multiplied in float16.
        key: ``[B, H, Lk, D]``, dtype and device of `query`; with `enable_gqa` its heads may be fewer.
        value: ``[B, H, Lk, Dv]``, likewise; Dv may differ from D.
        attn_mask: broadcastable to ``[B, H, Lq, Lk]``, never copied to that size; bool (True takes part)
            or floating, which is added to the scores. A floating mask that requires grad gets its gradient, summed over
            the dimensions it was broadcast over.
        dropout_p: probability in [0, 1] with which a softmax weight is dropped, whether training or not, as in
            torch. The mask is drawn from PyTorch's generator and never stored.
        is_causal: query i attends to keys up to its position.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        enable_gqa: H may be a multiple of key's and value's heads, each of which serves neighbouring query heads.
        window: ``(left, right)``: how many keys before and after its position a query sees; None for all.
        alibi_slopes: ``[H]`` or ``[B, H]``: ``-slope * |distance|`` is added to the scores (Press et al., 2022); see
            `alibi_slopes`. No gradient.
        relative_bias: ``[H, 2 R + 1]`` or ``[1, 2 R + 1]``: a number for each distance of key and query, clipped to
            -R..R, is added to the scores (Shaw et al., 2018); see `t5_relative_bias`. Differentiable.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before anything is added, as in Gemma 2.
        alignment: position of query i among the keys, of which `is_causal`, `window`, `alibi_slopes` and
            `relative_bias` speak: i (``"top_left"``, as torch's `is_causal`) or ``i + Lk - Lq`` (``"bottom_right"``, as
            flash-attn's). With `seqlens_q` and `seqlens_k` Lq and Lk are each sequence's own.
        seqlens_q: ``[B]``, int32 or int64: only so many queries of each sequence are real; the rest give 0. Blocks of
            padding cost nothing. None: all.
        seqlens_k: the same of the keys.
        block_mask: a `BlockMask`, whose empty blocks cost nothing.
        query_scale: of float8 tensors, which stand for their numbers times this: float32, broadcastable to ``[B, H]``,
            or None for 1.
        key_scale: the same, broadcastable to ``[B, heads of key]``.
        value_scale: the same.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        The output ``[B, H, Lq, Dv]`` in query's dtype (bfloat16 for float8), and with `return_lse` the natural
        log-sum-exp ``[B, H, Lq]`` in float32 (float64 for float64). Both are differentiable, once on the kernels.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `query`.
        ValueError: shapes, devices or a mask that do not fit, `dropout_p` outside [0, 1], a negative `window`, lengths
            past the end (checked on the CPU alone, where that needs no wait; on a GPU they are cut), D or Dv above 256.

    Example:
        >>> import torch, fusenc
        >>> q, k, v = torch.randn(3, 2, 4, 10, 32).unbind(0)  # batch 2, 4 heads, 10 tokens, head size 32
        >>> keep = torch.arange(10) < torch.tensor([[10], [7]])  # the second sequence has 7 tokens
        >>> fusenc.kernels.attention(q, k, v, keep[:, None, None, :]).shape
        torch.Size([2, 4, 10, 32])
    """
    query, key, value, autocast = _checked(query, key, value, dropout_p, enable_gqa)
    batch, _, len_q, _ = query.shape
    len_k = key.shape[2]
    if seqlens_q is not None or seqlens_k is not None:
        seqlens_q, seqlens_k = (
            _checked_lengths(name, lengths, batch, whole, query)
            for name, lengths, whole in (("seqlens_q", seqlens_q, len_q), ("seqlens_k", seqlens_k, len_k))
        )
    inputs, options = assemble(
        query, key, value, seqlens_q, seqlens_k, batch, len_q, len_k, False, attn_mask, dropout_p, is_causal, scale,
        window, alibi_slopes, relative_bias, softcap, alignment, block_mask, query_scale, key_scale, value_scale,
    )  # fmt: skip
    out, lse = _run(inputs, options, return_lse, autocast)
    return out if lse is None else (out, lse)


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    average: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention` and the softmax weights it multiplied the values by, after dropout; both differentiable.

    For a model that looks at its weights while it trains, as `torch.nn.MultiheadAttention` with `need_weights`. On the
    kernels the output costs what `attention` costs, and the weights a pass more and their own storage alone: of an
    average no head's weights are kept. If nothing was computed from the weights, the backward pass is that of
    `attention`; else it computes the softmax again, in eager PyTorch.

    Args:
        query: ``[B, H, Lq, D]``, as in `attention`, as are all arguments but the last.
        key: ``[B, H, Lk, D]``.
        value: ``[B, H, Lk, Dv]``.
        attn_mask: as in `attention`.
        dropout_p: as in `attention`.
        is_causal: as in `attention`.
        scale: as in `attention`.
        average: the mean of the weights over the heads.

    Returns:
        The output, as `attention` gives it, and float32 (float64 for float64) weights ``[B, H, Lq, Lk]``, or
        ``[B, Lq, Lk]`` of an average. A query with no key allowed has weights 0.

    Raises:
        TypeError: as `attention`; float8 inputs.
        ValueError: as `attention`.

    Example:
        >>> import torch, fusenc
        >>> q, k, v = torch.randn(3, 2, 4, 10, 32).unbind(0)
        >>> out, weights = fusenc.kernels.attention_with_weights(q, k, v, average=True)
        >>> out.shape, weights.shape
        (torch.Size([2, 4, 10, 32]), torch.Size([2, 10, 10]))
    """
    query, key, value, autocast = _checked(query, key, value, dropout_p, False)
    if query.dtype in checks.FLOAT8:
        checks.floating_tensor("query", query)
    batch, nhead, len_q, head_dim = query.shape
    len_k = key.shape[2]
    if torch.compiler.is_compiling() or not backend.use_triton(query):
        if attn_mask is not None:
            attn_mask = _checked_mask(attn_mask, query, (batch, nhead, len_q, len_k))
        if scale is None:
            scale = 1.0 / math.sqrt(head_dim)
        elif not isinstance(scale, (int, float)):
            checks.fail_type("scale", "a number", scale)
        seed = dropout.new_seed(query) if dropout_p > 0.0 else None
        arguments = (query, key, value, attn_mask, seed, dropout_p, is_causal, scale, average)
        if not autocast:
            return eager.attention_with_weights(*arguments)
        with torch.autocast(query.device.type, enabled=False):
            return eager.attention_with_weights(*arguments)
    _refuse_vmap(query)
    inputs, options = assemble(
        query, key, value, None, None, batch, len_q, len_k, False, attn_mask, dropout_p, is_causal, scale,
        None, None, None, None, "top_left", None,
    )  # fmt: skip
    if _needs_gradients(inputs):
        out, weights = op.AttentionWithWeights.apply(*inputs, *options, average)
    else:
        out, weights, _ = op.forward_with_weights(inputs, options, average)
    return out, weights


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    alignment: Alignment = "bottom_right",
    block_mask: BlockMask | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` inside each sequence of a packed batch, whose sequences lie one after the other without padding.

    The packed arguments are those of flash-attn's ``flash_attn_varlen_func``, the options those of `attention`; what
    they say of positions is said of positions inside each sequence.

    Args:
        query: ``[Tq, H, D]``, the queries of all sequences; dtypes, strides and D as in `attention`.
        key: ``[Tk, Hk, D]``; Hk divides H.
        value: ``[Tk, Hk, Dv]``.
        cu_seqlens_q: int32 or int64 ``[B + 1]``: where each sequence's queries begin, and Tq at the end.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: queries of the longest sequence, or more.
        max_seqlen_k: the same of the keys.
        attn_mask: broadcastable to ``[B, H, max_seqlen_q, max_seqlen_k]``.
        dropout_p: as in `attention`.
        is_causal: as in `attention`.
        scale: as in `attention`.
        window: as in `attention`.
        alibi_slopes: as in `attention`.
        relative_bias: as in `attention`.
        softcap: as in `attention`.
        alignment: as in `attention`, but for the default, which is flash-attn's; where queries and keys are equally
            many, it makes no difference.
        block_mask: of ``[1 or B, 1 or H, max_seqlen_q, max_seqlen_k]``.
        query_scale: as in `attention`, as are `key_scale` and `value_scale`.
        key_scale: as in `attention`.
        value_scale: as in `attention`.
        return_lse: also return the log-sum-exp.

    Returns:
        The output ``[Tq, H, Dv]``, and with `return_lse` the natural log-sum-exp ``[H, Tq]``, as flash-attn's.

    Raises:
        TypeError: as `attention`; `cu_seqlens` that are no int32 or int64 tensors.
        ValueError: as `attention`; `cu_seqlens` that do not begin at 0, descend or do not end at the number of tokens,
            or a sequence longer than the maximum (checked on the CPU alone, where that needs no wait; on a GPU nothing
            outside the tensors is touched, and tokens of no sequence have no defined output).

    Example:
        >>> import torch, fusenc
        >>> q, k, v = torch.randn(3, 17, 4, 32).unbind(0)  # two sequences, of 10 and of 7 tokens
        >>> cu = torch.tensor([0, 10, 17])
        >>> fusenc.kernels.attention_varlen(q, k, v, cu, cu, 10, 10).shape
        torch.Size([17, 4, 32])
    """
    if not (
        isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        and query.dim() == 3 and key.dim() == 3 and value.dim() == 3
    ):  # fmt: skip
        _explain_ranks(query, key, value, "three dimensions, [T, H, D]", 3)
    autocast = backend.autocast_enabled(query)
    if autocast and query.dtype not in checks.FLOAT8:
        query, key, value = operator.autocast_inputs(query.device.type, query, key, value)
    # One row of tokens: [T, H, D] is [1, H, T, D] with other strides.
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    nhead, total_q, head_dim = query.shape[1:]
    key_nhead, total_k, key_dim = key.shape[1:]
    if (
        key_dim != head_dim or value.shape[1] != key_nhead or value.shape[2] != total_k
        or key.dtype != query.dtype or value.dtype != query.dtype
        or key.device != query.device or value.device != query.device
        or nhead == 0 or key_nhead == 0 or nhead % key_nhead or head_dim == 0 or query.dtype not in _DTYPES
        or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0
    ):  # fmt: skip
        _explain_packed(query, key, value, dropout_p)
    cu_seqlens_q = checked_starts("cu_seqlens_q", cu_seqlens_q, total_q, "max_seqlen_q", max_seqlen_q, query)
    batch = cu_seqlens_q.shape[0] - 1
    if isinstance(cu_seqlens_k, Tensor) and cu_seqlens_k.dim() == 1 and cu_seqlens_k.shape[0] != batch + 1:
        checks.fail_value("cu_seqlens_k", f"{batch + 1} entries, as cu_seqlens_q", cu_seqlens_k)
    cu_seqlens_k = checked_starts("cu_seqlens_k", cu_seqlens_k, total_k, "max_seqlen_k", max_seqlen_k, query)
    inputs, options = assemble(
        query, key, value, cu_seqlens_q, cu_seqlens_k, batch, max_seqlen_q, max_seqlen_k, True, attn_mask, dropout_p,
        is_causal, scale, window, alibi_slopes, relative_bias, softcap, alignment, block_mask,
        query_scale, key_scale, value_scale,
    )  # fmt: skip
    out, lse = _run(inputs, options, return_lse, autocast)
    out = out[0].transpose(0, 1)
    return out if lse is None else (out, lse[0])


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    average: bool = False,
    queries: tuple[int, int] | None = None,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None,
    softcap: float | None = None,
    alignment: Alignment = "top_left",
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    block_mask: BlockMask | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """The softmax weights that `attention` with the same arguments would use, for reading a model.

    They are computed block by block: of an average, or of some queries, no more than that is ever stored. There is no
    dropout and no gradient.

    Args:
        query: ``[B, H, Lq, D]`` as in `attention`, or packed, ``[Tq, H, D]``, as in `attention_varlen`.
        key: ``[B, H, Lk, D]``, or ``[Tk, Hk, D]``.
        attn_mask: as in `attention`, as are all arguments that are not listed here.
        is_causal: as in `attention`.
        scale: as in `attention`.
        enable_gqa: as in `attention`.
        average: the mean over the heads.
        queries: ``(first, last)``: only these, first included, last not; all if None.
        window: as in `attention`.
        alibi_slopes: as in `attention`.
        relative_bias: as in `attention`.
        softcap: as in `attention`.
        alignment: as in `attention`.
        seqlens_q: as in `attention`; rows and columns past a sequence's end are 0.
        seqlens_k: as in `attention`.
        block_mask: as in `attention`.
        cu_seqlens_q: as in `attention_varlen`, of packed inputs; so are the three that follow.
        cu_seqlens_k: as in `attention_varlen`.
        max_seqlen_q: as in `attention_varlen`.
        max_seqlen_k: as in `attention_varlen`.

    Returns:
        float32 (float64 for float64) ``[B, H, queries, Lk]``, or ``[B, queries, Lk]`` of an average. Rows add up to 1,
        or 0 for a query with no key allowed. Of a packed batch ``[B, H, max_seqlen_q, max_seqlen_k]``, 0 past the ends.

    Raises:
        TypeError: as `attention`.
        ValueError: as `attention`; `queries` that are no range of them.

    Example:
        >>> import torch, fusenc
        >>> q, k = torch.randn(2, 2, 4, 10, 32).unbind(0)
        >>> fusenc.kernels.attention_weights(q, k, average=True, queries=(0, 1)).shape  # of the first token
        torch.Size([2, 1, 10])
    """
    packed = cu_seqlens_q is not None
    rank, expected = (3, "three dimensions, [T, H, D]") if packed else (4, "four dimensions, [B, H, L, D]")
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() == key.dim() == rank):
        _explain_ranks(query, key, key, expected, rank)
    checks.floating_tensor("query", query)
    autocast = backend.autocast_enabled(query)
    if autocast:
        query, key = operator.autocast_inputs(query.device.type, query, key)
    if packed:
        query, key = (t.transpose(0, 1)[None] for t in (query, key))
        enable_gqa = True
    batch, nhead, len_q, _ = query.shape
    len_k = key.shape[2]
    fits = key.shape[0] == batch and key.shape[3] == query.shape[3] and query.shape[3] > 0 and key.shape[1] > 0
    heads = key.shape[1] == nhead or (enable_gqa and key.shape[1] > 0 and nhead % key.shape[1] == 0)
    if not (fits and heads) or key.dtype != query.dtype or key.device != query.device:
        _explain(query, key, key, 0.0, enable_gqa)
    if packed:
        seqlens_q = checked_starts("cu_seqlens_q", cu_seqlens_q, len_q, "max_seqlen_q", max_seqlen_q, query)
        seqlens_k = checked_starts("cu_seqlens_k", cu_seqlens_k, len_k, "max_seqlen_k", max_seqlen_k, query)
        if seqlens_q.shape != seqlens_k.shape:
            checks.fail_value("cu_seqlens_k", f"{seqlens_q.shape[0]} entries, as cu_seqlens_q", cu_seqlens_k)
        assert max_seqlen_q is not None and max_seqlen_k is not None
        batch, len_q, len_k = seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
    elif seqlens_q is not None or seqlens_k is not None:
        seqlens_q, seqlens_k = (
            _checked_lengths(name, lengths, batch, whole, query)
            for name, lengths, whole in (("seqlens_q", seqlens_q, len_q), ("seqlens_k", seqlens_k, len_k))
        )
    first, last = (0, len_q) if queries is None else _checked_queries(queries, len_q)
    with torch.no_grad():
        inputs, options = assemble(
            query, key, key, seqlens_q, seqlens_k, batch, len_q, len_k, packed, attn_mask, 0.0, is_causal, scale,
            window, alibi_slopes, relative_bias, softcap, alignment, block_mask,
        )  # fmt: skip
        if backend.use_triton(query):
            from .planes import softmax_weights

            _, _, statistics = op.forward(inputs, options, False)
            assert statistics is not None
            weights = softmax_weights(statistics, inputs, options, first, last - first, average)
        else:
            with torch.autocast(query.device.type, enabled=False) if autocast else contextlib.nullcontext():
                weights = eager.attention_weights(inputs, options, first, last - first, average)
    return weights[:, 0] if average else weights


def assemble(
    query: Tensor, key: Tensor, value: Tensor, seqlens_q: Tensor | None, seqlens_k: Tensor | None,
    batch: int, len_q: int, len_k: int, packed: bool, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, window: Window | None, alibi_slopes: Tensor | None, relative_bias: Tensor | None,
    softcap: float | None, alignment: str, block_mask: BlockMask | None,
    query_scale: Tensor | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> tuple[Inputs, Options]:  # fmt: skip
    """Check the options and bring everything into the one form that the paths take."""
    nhead, head_dim = query.shape[1], query.shape[3]
    if attn_mask is not None:
        attn_mask = _checked_mask(attn_mask, query, (batch, nhead, len_q, len_k))
    if scale is None:
        softmax_scale = 1.0 / math.sqrt(head_dim)
    elif isinstance(scale, (int, float)):
        softmax_scale = float(scale)
        if softmax_scale <= 0.0:  # the kernels' scale is above 0, so that the largest product has the largest score
            wide = query.half() if query.dtype in checks.FLOAT8 else query
            query = (wide * (-1.0 if softmax_scale else 0.0)).to(query.dtype)
            softmax_scale = -softmax_scale or 1.0
    else:
        checks.fail_type("scale", "a number", scale)
    left, right = (-1, -1) if window is None else _checked_window(window)
    if is_causal:
        right = 0
    if alignment not in ("top_left", "bottom_right"):
        checks.fail_value("alignment", "'top_left' or 'bottom_right'", alignment)
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0.0 < softcap < math.inf):
        checks.fail_value("softcap", "a number above 0, or None", softcap)
    if alibi_slopes is not None:
        alibi_slopes = _checked_slopes(alibi_slopes, query, batch)
    if relative_bias is not None:
        _check_relative_bias(relative_bias, query)
        relative_bias = relative_bias.contiguous()  # kernels step along it by one
    blocks: tuple[Tensor | None, ...] = _NO_BLOCKS
    if block_mask is not None:
        blocks = _checked_blocks(block_mask, query, (batch, nhead, len_q, len_k))
    seed = dropout.new_seed(query) if dropout_p > 0.0 else None
    scales = None
    if (
        query.dtype in checks.FLOAT8 or query_scale is not None or key_scale is not None or value_scale is not None
    ):  # fmt: skip
        scales = _checked_scales(query, key, batch, attn_mask, relative_bias, query_scale, key_scale, value_scale)
    block_map, blocks_of_query, blocks_of_key, tiles = blocks
    inputs = Inputs(
        query, key, value, attn_mask, relative_bias, alibi_slopes, seed, seqlens_q, seqlens_k,
        block_map, blocks_of_query, blocks_of_key, tiles, scales,
    )  # fmt: skip
    cap = 0.0 if softcap is None else float(softcap)
    options = Options(
        softmax_scale, float(dropout_p), cap, left, right, alignment == "bottom_right", packed, len_q, len_k
    )
    return inputs, options


def _run(inputs: Inputs, options: Options, return_lse: bool, autocast: bool) -> tuple[Tensor, Tensor | None]:
    """The call on the path that serves it: an operator inside torch.compile, else kernels or eager PyTorch."""
    # The inputs are in autocast's dtype by now; what a path computes inside is float32.
    query = inputs.query
    quiet: Any = torch.autocast(query.device.type, enabled=False) if autocast else _NOTHING
    if torch.compiler.is_compiling():
        with quiet:
            out, lse, _ = op.attention_operator(*inputs, *options, return_lse)
        return out, lse if return_lse else None
    if not backend.use_triton(query):
        with quiet:
            return eager.attention(inputs, options, return_lse)
    _refuse_vmap(query)
    if inputs.scales is None and _needs_gradients(inputs):
        return op.Attention.apply(*inputs, *options, return_lse)
    return op.forward(inputs, options, return_lse)[:2]


def _refuse_vmap(query: Tensor) -> None:
    if torch._C._functorch.is_batchedtensor(query):
        raise RuntimeError(
            "fusenc's kernels do not run under torch.func.vmap: give them the batch as dimension 0 instead"
        )


def _needs_gradients(inputs: Inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[: op.DIFFERENTIABLE])


def _checked(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The inputs of a dense call in autocast's dtype, and whether autocast is in force; raises if they do not fit."""
    if not (
        isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        and query.dim() == 4 and key.dim() == 4 and value.dim() == 4
    ):  # fmt: skip
        _explain_ranks(query, key, value, "four dimensions, [B, H, L, D]", 4)
    autocast = backend.autocast_enabled(query)
    if autocast and query.dtype not in checks.FLOAT8:
        query, key, value = operator.autocast_inputs(query.device.type, query, key, value)
    batch, nhead, _, head_dim = query.shape
    key_batch, key_nhead, len_k, key_dim = key.shape
    value_batch, value_nhead, value_len, _ = value.shape
    if (
        key_batch != batch or (key_nhead != nhead and not enable_gqa) or key_dim != head_dim
        or value_batch != batch or value_nhead != key_nhead or value_len != len_k
        or key.dtype != query.dtype or value.dtype != query.dtype
        or key.device != query.device or value.device != query.device
        or nhead == 0 or head_dim == 0 or query.dtype not in _DTYPES
        or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0
        or (key_nhead != nhead and (key_nhead == 0 or nhead % key_nhead))
    ):  # fmt: skip
        _explain(query, key, value, dropout_p, enable_gqa)
    return query, key, value, autocast


def _checked_mask(attn_mask: Tensor, query: Tensor, full: tuple[int, ...]) -> Tensor:
    """The mask as four dimensions, each of them 1 or full; raises if it cannot broadcast."""
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        checks.fail_type("attn_mask", "a bool or floating tensor", attn_mask)
    shape = attn_mask.shape
    if len(shape) != 4:
        shape = torch.Size([1] * (4 - len(shape)) + list(shape))
    if len(shape) != 4 or not (
        shape[0] in (1, full[0]) and shape[1] in (1, full[1]) and shape[2] in (1, full[2]) and shape[3] in (1, full[3])
    ):
        checks.fail_value("attn_mask", f"a shape that broadcasts to [B, H, Lq, Lk] = {list(full)}", attn_mask)
    if attn_mask.device != query.device:
        checks.fail_value("attn_mask", f"device {query.device}, that of query", attn_mask)
    return attn_mask if attn_mask.dim() == 4 else attn_mask.view(shape)


def _checked_window(window: Any) -> tuple[int, int]:
    if not isinstance(window, tuple) or len(window) != 2:
        checks.fail_type("window", "a pair (left, right)", window)
    for size in window:
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            checks.fail_type("window", "two integers, or None for no limit", window)
        if size is not None and size < 0:
            checks.fail_value("window", "two numbers of at least 0, or None for no limit", window)
    left, right = (-1 if size is None else min(size, _FAR) for size in window)
    return left, right


def _checked_slopes(slopes: Any, query: Tensor, batch: int) -> Tensor:
    nhead = query.shape[1]
    checks.floating_tensor("alibi_slopes", slopes)
    # Size by size, here and elsewhere: torch.compile would fix the sizes of tuples that are compared.
    fits = slopes.dim() in (1, 2) and slopes.shape[-1] == nhead and (slopes.dim() == 1 or slopes.shape[0] == batch)
    if not fits:
        checks.fail_value("alibi_slopes", f"shape [{nhead}] or [{batch}, {nhead}]", slopes)
    if slopes.device != query.device:
        checks.fail_value("alibi_slopes", f"device {query.device}, that of query", slopes)
    if slopes.requires_grad and torch.is_grad_enabled():
        checks.fail_value("alibi_slopes", "a tensor that needs no gradient", slopes)
    return slopes.to(wide_dtype(query)).view(-1, nhead)


def _check_relative_bias(bias: Any, query: Tensor) -> None:
    nhead = query.shape[1]
    checks.floating_tensor("relative_bias", bias)
    if bias.dim() != 2 or bias.shape[0] not in (1, nhead) or bias.shape[1] % 2 == 0:
        checks.fail_value("relative_bias", f"shape [{nhead} or 1, 2 R + 1]", bias)
    if bias.device != query.device:
        checks.fail_value("relative_bias", f"device {query.device}, that of query", bias)


def _checked_blocks(block_mask: Any, query: Tensor, full: tuple[int, ...]) -> tuple[Tensor, ...]:
    if not isinstance(block_mask, BlockMask):
        checks.fail_type("block_mask", "a BlockMask", block_mask)
    fits = [size in (1, whole) for size, whole in zip(block_mask.shape[:2], full[:2], strict=True)]
    if not all(fits) or any(size != whole for size, whole in zip(block_mask.shape[2:], full[2:], strict=True)):
        batch, nhead, len_q, len_k = full
        expected = f"one of shape [1 or {batch}, 1 or {nhead}, {len_q}, {len_k}]"
        checks.fail_value("block_mask", expected, block_mask.shape)
    if block_mask.tiles.device != query.device:
        checks.fail_value("block_mask", f"device {query.device}, that of query", block_mask.tiles)
    return block_mask.block_map, block_mask.blocks_of_query, block_mask.blocks_of_key, block_mask.tiles


def _checked_scales(
    query: Tensor, key: Tensor, batch: int, attn_mask: Tensor | None, relative_bias: Tensor | None,
    query_scale: Tensor | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """float32 ``[B, H, 2]``: what products and what values are multiplied by."""
    if query.is_cuda and not gpu.has_float8(query.device.index):
        name = gpu.architecture(query.device.index)
        checks.fail_value("query", f"float16 or bfloat16 on {name}, which multiplies no float8 numbers", query)
    for name, bias in (("attn_mask", attn_mask), ("relative_bias", relative_bias)):
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            checks.fail_value(name, "a tensor that needs no gradient, as float8 is for inference", bias)
    nhead, key_nhead = query.shape[1], key.shape[1]
    found = []
    given = (("query_scale", query_scale, nhead), ("key_scale", key_scale, key_nhead))
    for name, scale, heads in (*given, ("value_scale", value_scale, key_nhead)):
        if query.dtype not in checks.FLOAT8:
            if scale is not None:
                checks.fail_value(name, "None, since query is no float8 tensor", scale)
            continue
        if scale is None:
            found.append(torch.ones((batch, nhead), dtype=torch.float32, device=query.device))
            continue
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
            checks.fail_type(name, "a float32 tensor", scale)
        if scale.device != query.device:
            checks.fail_value(name, f"device {query.device}, that of query", scale)
        try:
            found.append(scale.expand(batch, heads).repeat_interleave(nhead // heads, 1))
        except RuntimeError:
            checks.fail_value(name, f"a shape that broadcasts to [{batch}, {heads}]", scale)
    return torch.stack([found[0] * found[1], found[2]], -1)


def _checked_lengths(name: str, lengths: Any, batch: int, whole: int, query: Tensor) -> Tensor:
    if lengths is None:
        return torch.full((batch,), whole, dtype=torch.int32, device=query.device)
    _check_integers(name, lengths, query)
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        checks.fail_value(name, f"shape [{batch}]", lengths)
    if _values_cost_nothing(lengths) and batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= whole:
        checks.fail_value(name, f"lengths from 0 to {whole}", lengths.tolist())
    return lengths.int()


def checked_starts(name: str, starts: Any, total: int, max_name: str, longest: Any, query: Tensor) -> Tensor:
    _check_integers(name, starts, query)
    if starts.dim() != 1 or starts.shape[0] == 0:
        checks.fail_value(name, "one dimension, [B + 1]", starts)
    if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool):
        checks.fail_type(max_name, "an integer", longest)
    if longest < 0:
        checks.fail_value(max_name, "at least 0", longest)
    if _values_cost_nothing(starts):
        values = starts.tolist()
        if values[0] != 0 or values[-1] != total:
            checks.fail_value(name, f"the first entry 0 and the last {total}, the number of tokens", values)
        lengths = [b - a for a, b in itertools.pairwise(values)]
        if lengths and min(lengths) < 0:
            checks.fail_value(name, "ascending entries", values)
        if lengths and max(lengths) > longest:
            checks.fail_value(max_name, f"at least {max(lengths)}, the longest sequence", longest)
    return starts.int()


def _check_integers(name: str, value: Any, query: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        checks.fail_type(name, "an int32 or int64 tensor", value)
    if value.device != query.device:
        checks.fail_value(name, f"device {query.device}, that of query", value)


def _values_cost_nothing(t: Tensor) -> bool:
    """Whether a look at the values makes nobody wait, as it would on a GPU, and breaks no graph."""
    return t.device.type == "cpu" and not t.is_cuda and not torch.compiler.is_compiling()


def _checked_queries(queries: Any, len_q: int) -> tuple[int, int]:
    if not isinstance(queries, tuple) or len(queries) != 2 or not all(isinstance(n, int) for n in queries):
        checks.fail_type("queries", "a pair of integers (first, last)", queries)
    first, last = queries
    if not 0 <= first <= last <= len_q:
        checks.fail_value("queries", f"0 <= first <= last <= {len_q}", queries)
    return first, last


def _explain_ranks(query: Any, key: Any, value: Any, expected: str, rank: int) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in checks.FLOAT8:
            checks.floating_tensor(name, tensor)
        if tensor.dim() != rank:
            checks.fail_value(name, expected, tensor)


def _explain_kinds(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> None:
    checks.dropout_probability(dropout_p)
    for name, tensor in (("key", key), ("value", value)):
        if query.dtype not in checks.FLOAT8:
            checks.floating_tensor("query", query)
            checks.same_kind(name, tensor, "query", query)
        elif tensor.dtype != query.dtype:
            checks.fail_type(name, f"dtype {query.dtype}, that of query", tensor)
        elif tensor.device != query.device:
            checks.fail_value(name, f"device {query.device}, that of query", tensor)
    if query.shape[1] == 0:
        checks.fail_value("query", "at least one head", query)
    if query.shape[3] == 0:
        checks.fail_value("query", "a head size of at least 1", query)


def _explain(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, enable_gqa: bool) -> None:
    _explain_kinds(query, key, value, dropout_p)
    batch, nhead, _, head_dim = query.shape
    heads_fit = key.shape[1] == nhead or (enable_gqa and key.shape[1] > 0 and nhead % key.shape[1] == 0)
    if key.shape[0] != batch or not heads_fit or key.shape[3] != head_dim:
        heads = f"a divisor of {nhead}" if enable_gqa else nhead
        checks.fail_value("key", f"shape [{batch}, {heads}, Lk, {head_dim}], to go with query", key)
    checks.fail_value("value", f"shape [{batch}, {key.shape[1]}, {key.shape[2]}, Dv], to go with key", value)


def _explain_packed(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> None:
    _explain_kinds(query, key, value, dropout_p)
    nhead, _, head_dim = query.shape[1:]
    if key.shape[1] == 0 or nhead % key.shape[1] or key.shape[3] != head_dim:
        expected = f"shape [Tk, a divisor of {nhead}, {head_dim}], to go with query"
        checks.fail_value("key", expected, key[0].transpose(0, 1))
    expected = f"shape [{key.shape[2]}, {key.shape[1]}, Dv], to go with key"
    checks.fail_value("value", expected, value[0].transpose(0, 1))
