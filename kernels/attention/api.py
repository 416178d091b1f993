"""The public functions: arguments and documentation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..common import checks
from .block_mask import BlockMask
from .op import ATTENTION, WITH_WEIGHTS

Alignment = Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None]


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
    return_lse: bool = False,
) -> Any:
    """``softmax(scale * query @ key^T + bias) @ value``: `F.scaled_dot_product_attention` and more.

    On a GPU it runs flash-attention style Triton kernels, forward and backward (Dao, FlashAttention-2, 2023):
    the scores never reach memory. Elsewhere, and in float64, it runs eager PyTorch with the same results. All options
    go together; a key must be allowed by each of them.

    A query with no key allowed gives output 0, gradient 0 and log-sum-exp -inf; a mask never gives NaN.

    Args:
        query: ``[B, H, Lq, D]``, float32, float16, bfloat16 or float64, any strides: a ``[B, L, H, D]``
            tensor transposed costs no copy. D is 1 to 256 on the kernels.
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
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        The output ``[B, H, Lq, Dv]`` in query's dtype, and with `return_lse` the natural log-sum-exp ``[B, H, Lq]`` in
        float32 (float64 for float64). Both are differentiable, once on the kernels.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `query`.
        ValueError: shapes, devices or a mask that do not fit, `dropout_p` outside [0, 1], a negative `window`, lengths
            past the end (checked on the CPU alone; on a GPU they are clamped), D or Dv above 256.

    Example:
        >>> import torch, fusenc
        >>> q, k, v = torch.randn(3, 2, 4, 10, 32).unbind(0)  # batch 2, 4 heads, 10 tokens, head size 32
        >>> keep = torch.arange(10) < torch.tensor([[10], [7]])  # the second sequence has 7 tokens
        >>> fusenc.kernels.attention(q, k, v, keep[:, None, None, :]).shape
        torch.Size([2, 4, 10, 32])
    """
    blocks, shape_of_blocks = _NO_BLOCKS if block_mask is None else _parts(block_mask)
    options = (
        dropout_p, is_causal, scale, enable_gqa, window, softcap, alignment, False, shape_of_blocks, return_lse, False,
    )  # fmt: skip
    tensors = (query, key, value, attn_mask, relative_bias, alibi_slopes, seqlens_q, seqlens_k, *blocks)
    out, lse = ATTENTION(tensors, options, _lengths(query, key))[:2]
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, *, window: Window | None = None, alibi_slopes: Tensor | None = None,
    relative_bias: Tensor | None = None, softcap: float | None = None, alignment: Alignment = "bottom_right",
    block_mask: BlockMask | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
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
        dropout_p, is_causal, scale, window, alibi_slopes, relative_bias, softcap: as in `attention`.
        alignment: as in `attention`, but for the default, which is flash-attn's.
        block_mask: of ``[1 or B, 1 or H, max_seqlen_q, max_seqlen_k]``.
        return_lse: also return the log-sum-exp.

    Returns:
        The output ``[Tq, H, Dv]``, and with `return_lse` the natural log-sum-exp ``[H, Tq]``, as flash-attn's.

    Raises:
        TypeError: as `attention`; `cu_seqlens` that are no int32 or int64 tensors.
        ValueError: as `attention`; `cu_seqlens` that do not begin at 0, descend or do not end at the number of tokens,
            or a sequence longer than the maximum (checked on the CPU alone; on a GPU they are clamped to the tensors,
            and tokens of no sequence have no defined output).

    Example:
        >>> import torch, fusenc
        >>> q, k, v = torch.randn(3, 17, 4, 32).unbind(0)  # two sequences, of 10 and of 7 tokens
        >>> cu = torch.tensor([0, 10, 17])
        >>> fusenc.kernels.attention_varlen(q, k, v, cu, cu, 10, 10).shape
        torch.Size([17, 4, 32])
    """
    blocks, shape_of_blocks = _NO_BLOCKS if block_mask is None else _parts(block_mask)
    options = (dropout_p, is_causal, scale, True, window, softcap, alignment, True, shape_of_blocks, return_lse, False)
    tensors = (query, key, value, attn_mask, relative_bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, *blocks)
    out, lse = ATTENTION(tensors, options, (max_seqlen_q, max_seqlen_k))[:2]
    return (out, lse) if return_lse else out


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, *, average: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` and the softmax weights it multiplied the values by, after dropout; both differentiable.

    For a model that looks at its weights while it trains, as `torch.nn.MultiheadAttention` with `need_weights`. On the
    kernels the output costs what `attention` costs, and the weights a pass more and their own storage alone: of an
    average no head's weights are kept. If nothing was computed from the weights, the backward pass is that of
    `attention`; else it computes the softmax again, in eager PyTorch.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale: as in `attention`.
        average: the mean of the weights over the heads.

    Returns:
        The output, as `attention` gives it, and float32 (float64 for float64) weights ``[B, H, Lq, Lk]``, or
        ``[B, Lq, Lk]`` of an average. A query with no key allowed has weights 0.

    Raises:
        TypeError, ValueError: as `attention`.

    Example:
        >>> import torch, fusenc
        >>> q, k, v = torch.randn(3, 2, 4, 10, 32).unbind(0)
        >>> out, weights = fusenc.kernels.attention_with_weights(q, k, v, average=True)
        >>> out.shape, weights.shape
        (torch.Size([2, 4, 10, 32]), torch.Size([2, 10, 10]))
    """
    options = (dropout_p, is_causal, scale, False, None, None, "top_left", False, None, False, average)
    sizes = _lengths(query, key)
    out, weights = WITH_WEIGHTS((query, key, value, attn_mask, *[None] * 8), options, (*sizes, 0, sizes[0]))[:2]
    return out, weights


@torch.no_grad()
def attention_weights(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, *, average: bool = False, queries: tuple[int, int] | None = None,
    window: Window | None = None, alibi_slopes: Tensor | None = None, relative_bias: Tensor | None = None,
    softcap: float | None = None, alignment: Alignment = "top_left", seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None, block_mask: BlockMask | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> Tensor:  # fmt: skip
    """The softmax weights that `attention` with the same arguments would use, for reading a model.

    They are computed block by block: of an average, or of some queries, no more than that is ever stored. There is no
    dropout and no gradient.

    Args:
        query: ``[B, H, Lq, D]`` as in `attention`, or packed, ``[Tq, H, D]``, as in `attention_varlen`.
        key: ``[B, H, Lk, D]``, or ``[Tk, Hk, D]``.
        attn_mask, is_causal, scale, enable_gqa, window, alibi_slopes, relative_bias, softcap, alignment, block_mask:
            as in `attention`.
        average: the mean over the heads.
        queries: ``(first, last)``: only these, first included, last not; all if None.
        seqlens_q, seqlens_k: as in `attention`; rows and columns past a sequence's end are 0.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `attention_varlen`, of packed inputs.

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
    packed, sizes = cu_seqlens_q is not None, _lengths(query, key)
    if packed:
        enable_gqa, seqlens_q, seqlens_k, sizes = True, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)
    blocks, shape_of_blocks = _NO_BLOCKS if block_mask is None else _parts(block_mask)
    options = (0.0, is_causal, scale, enable_gqa, window, softcap, alignment, packed, shape_of_blocks, False, average)
    first, last = (0, sizes[0]) if queries is None else _checked_queries(queries, sizes[0])
    tensors = (query, key, key, attn_mask, relative_bias, alibi_slopes, seqlens_q, seqlens_k, *blocks)
    return WITH_WEIGHTS(tensors, options, (*sizes, first, last - first))[1]


_NO_BLOCKS: tuple[tuple[Any, ...], Any] = ((None,) * 4, None)


def _parts(block_mask: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Tensors and shape of a block mask."""
    if not isinstance(block_mask, BlockMask):
        checks.fail_type("block_mask", "a BlockMask", block_mask)
    m = block_mask
    return (m.block_map, m.blocks_of_query, m.blocks_of_key, m.tiles), m.shape


def _lengths(query: Any, key: Any) -> tuple[Any, Any]:
    """Queries and keys of a dense batch, for any arguments: what is wrong with these is said later."""
    try:
        return query.shape[2], key.shape[2]
    except (AttributeError, IndexError):
        return 0, 0


def _checked_queries(queries: Any, len_q: int) -> tuple[int, int]:
    if not isinstance(queries, tuple) or len(queries) != 2 or not all(isinstance(n, int) for n in queries):
        checks.fail_type("queries", "a pair of integers (first, last)", queries)
    first, last = queries
    if not 0 <= first <= last <= len_q:
        checks.fail_value("queries", f"0 <= first <= last <= {len_q}", queries)
    return first, last
