"""Attention in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import dropout

MAX_HEAD_DIM = 256
"""Of the kernels; the eager path has no such limit."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seed: Tensor | None,
    dropout_p: float, is_causal: bool, softmax_scale: float, return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Output and, on request, log-sum-exp; differentiable. torch's own kernel serves what it can on the CPU."""
    served = seed is None and not return_lse and not (is_causal and attn_mask is not None)
    if served and attn_mask is not None and attn_mask.dtype != torch.bool:
        served = attn_mask.dtype == query.dtype and not (torch.is_grad_enabled() and _has_rows_of_large(attn_mask))
    if served and query.device.type == "cpu" and not query.is_cuda:  # it answers fully masked rows with 0, as we do
        out = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=softmax_scale)
        return out, None
    wide = torch.promote_types(query.dtype, torch.float32)
    scores, nothing = _scores(query.to(wide), key.to(wide), attn_mask, is_causal, softmax_scale)
    probabilities = _softmax(scores, nothing)
    if seed is not None:
        probabilities = dropout.dropout(probabilities, seed, dropout_p)
    out = (probabilities @ value.to(wide)).to(query.dtype)
    if not return_lse:
        return out, None
    lse = scores.logsumexp(-1)
    return out, lse if nothing is None else lse.masked_fill(nothing, float("-inf"))


_LARGE = 1e4


def _has_rows_of_large(attn_mask: Tensor) -> bool:
    """True if a row of a floating mask holds large numbers only (and not -inf).

    torch's backward pass on the CPU recomputes the softmax from the log-sum-exp, which has lost all else in such a
    row: its gradients are wrong by any factor.
    """
    if attn_mask.shape[-1] == 0 or torch.compiler.is_compiling():  # nor may a compiled graph depend on values
        return False
    largest = attn_mask.detach().amax(-1)
    try:
        return bool(((largest.abs() > _LARGE) & largest.isfinite()).any())
    except RuntimeError:  # under torch.func.vmap nothing may depend on values
        return False


def _scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Masked scores ``[B, H, Lq, Lk]`` and which rows have nothing to attend to (None: no row can lack it).

    The scores of such a row are 0, not -inf, so that no NaN arises from it forward or backward.
    """
    scores = query @ key.transpose(-1, -2) * softmax_scale
    if attn_mask is None and key.shape[2] > 0:  # even a causal mask leaves each query the first key
        if is_causal:
            scores = scores.masked_fill(~_below_diagonal(scores), float("-inf"))
        return scores, None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if is_causal:
        scores = scores.masked_fill(~_below_diagonal(scores), float("-inf"))
    nothing = (scores == float("-inf")).all(-1)
    return scores.masked_fill(nothing[..., None], 0.0), nothing


def _below_diagonal(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def _softmax(scores: Tensor, nothing: Tensor | None) -> Tensor:
    probabilities = scores.softmax(-1)
    return probabilities if nothing is None else probabilities.masked_fill(nothing[..., None], 0.0)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    seed: Tensor | None, out: Tensor, statistics: Tensor, dropout_p: float, is_causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients as formulas (FlashAttention-2, algorithm 2), for the operator of ``torch.compile``."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v, do = query.to(wide), key.to(wide), value.to(wide), dout.to(wide)
    p = _softmax(*_scores(q, k, attn_mask, is_causal, softmax_scale))
    delta = (out.to(wide) * do).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dp = dropout.dropout(do @ v.transpose(-1, -2), seed, dropout_p)
    ds = p * (dp - delta[..., None])
    dv = dropout.dropout(p, seed, dropout_p).transpose(-1, -2) @ do
    dq = ds @ k * softmax_scale
    dk = ds.transpose(-1, -2) @ q * softmax_scale
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)
