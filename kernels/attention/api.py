"""The public function: arguments, checks, documentation."""

from __future__ import annotations

import contextlib
import math
from typing import Literal, overload

import torch
from torch import Tensor

from ..common import backend, checks, dropout, operator
from . import eager, op


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., *, return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., *, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = ..., dropout_p: float = ...,
    is_causal: bool = ..., scale: float | None = ..., *, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * query @ key^T + mask) @ value``, with the arguments of `F.scaled_dot_product_attention`.

    On a GPU it runs flash-attention style Triton kernels, forward and backward (Dao, FlashAttention-2, 2023):
    the scores never reach memory. Elsewhere, and in float64, it runs eager PyTorch with the same results.

    A query with no key allowed gives output 0, gradient 0 and log-sum-exp -inf; a mask never gives NaN.

    Args:
        query: ``[B, H, Lq, D]``, float32, float16, bfloat16 or float64, any strides: a ``[B, L, H, D]``
            tensor transposed costs no copy. D is 1 to 256 on the kernels.
        key: ``[B, H, Lk, D]``, dtype and device of `query`.
        value: ``[B, H, Lk, Dv]``, likewise; Dv may differ from D.
        attn_mask: broadcastable to ``[B, H, Lq, Lk]``, never copied to that size; bool (True takes part)
            or floating, which is added to the scores. A floating mask that requires grad gets its gradient; that
            call runs eager.
        dropout_p: probability in [0, 1] with which a softmax weight is dropped, whether training or not, as in
            torch. The mask is drawn from PyTorch's generator and never stored.
        is_causal: query i attends to keys up to i (aligned at the top left, as in torch). With `attn_mask` too,
            both apply.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        The output ``[B, H, Lq, Dv]`` in query's dtype, and with `return_lse` the natural log-sum-exp
        ``[B, H, Lq]`` in float32 (float64 for float64). Both are differentiable, once on the kernels.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `query`.
        ValueError: shapes, devices or a mask that do not fit, `dropout_p` outside [0, 1], D or Dv above 256.

    Example:
        >>> import torch, fusenc
        >>> q, k, v = torch.randn(3, 2, 4, 10, 32).unbind(0)  # batch 2, 4 heads, 10 tokens, head size 32
        >>> keep = torch.arange(10) < torch.tensor([[10], [7]])  # the second sequence has 7 tokens
        >>> fusenc.kernels.attention(q, k, v, keep[:, None, None, :]).shape
        torch.Size([2, 4, 10, 32])
    """
    if not (
        isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
        and query.dim() == 4 and key.dim() == 4 and value.dim() == 4
    ):  # fmt: skip
        _explain_ranks(query, key, value)
    autocast = backend.autocast_enabled(query)
    if autocast:
        query, key, value = operator.autocast_inputs(query.device.type, query, key, value)
    batch, nhead, _, head_dim = query.shape
    key_batch, key_nhead, len_k, key_dim = key.shape
    if (
        key_batch != batch or key_nhead != nhead or key_dim != head_dim
        or value.shape[0] != batch or value.shape[1] != nhead or value.shape[2] != len_k
        or key.dtype != query.dtype or value.dtype != query.dtype
        or key.device != query.device or value.device != query.device
        or nhead == 0 or head_dim == 0 or query.dtype not in checks.DTYPES
        or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0
    ):  # fmt: skip
        _explain(query, key, value, dropout_p)
    if attn_mask is not None:
        attn_mask = _checked_mask(attn_mask, query, len_k)
    if scale is not None and not isinstance(scale, (int, float)):
        checks.fail_type("scale", "a number", scale)
    softmax_scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    seed = dropout.new_seed(query) if dropout_p > 0.0 else None
    args = (query, key, value, attn_mask, seed, float(dropout_p), bool(is_causal), softmax_scale)

    mask_grad = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling() and not mask_grad:
        out, lse, _ = op.attention_operator(*args, return_lse)
        return (out, lse) if return_lse else out
    if mask_grad or not backend.use_triton(query):
        if mask_grad:
            backend.note_eager()
        # The inputs are in autocast's dtype by now; what the eager path computes inside is float32.
        with torch.autocast(query.device.type, enabled=False) if autocast else contextlib.nullcontext():
            out, maybe_lse = eager.attention(*args, return_lse)
        return out if maybe_lse is None else (out, maybe_lse)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out, lse = op.Attention.apply(*args)
    else:
        out, lse, _ = op.forward(*args)
    return (out, lse) if return_lse else out


def _checked_mask(attn_mask: Tensor, query: Tensor, len_k: int) -> Tensor:
    """The mask as four dimensions, each of them 1 or full; raises if it cannot broadcast."""
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        checks.fail_type("attn_mask", "a bool or floating tensor", attn_mask)
    full = (*query.shape[:3], len_k)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or any(size not in (1, whole) for size, whole in zip(shape, full, strict=True)):
        checks.fail_value("attn_mask", f"a shape that broadcasts to [B, H, Lq, Lk] = {list(full)}", attn_mask)
    if attn_mask.device != query.device:
        checks.fail_value("attn_mask", f"device {query.device}, that of query", attn_mask)
    return attn_mask if attn_mask.dim() == 4 else attn_mask.view(shape)


def _explain_ranks(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.floating_tensor(name, tensor)
        if tensor.dim() != 4:
            checks.fail_value(name, "four dimensions, [B, H, L, D]", tensor)


def _explain(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> None:
    checks.dropout_probability(dropout_p)
    checks.floating_tensor("query", query)
    checks.same_kind("key", key, "query", query)
    checks.same_kind("value", value, "query", query)
    if query.shape[1] == 0:
        checks.fail_value("query", "at least one head", query)
    if query.shape[3] == 0:
        checks.fail_value("query", "a head size of at least 1", query)
    batch, nhead, _, head_dim = query.shape
    if key.shape[:2] != query.shape[:2] or key.shape[3] != head_dim:
        checks.fail_value("key", f"shape [{batch}, {nhead}, Lk, {head_dim}], to go with query", key)
    checks.fail_value("value", f"shape [{batch}, {nhead}, {key.shape[2]}, Dv], to go with key", value)
