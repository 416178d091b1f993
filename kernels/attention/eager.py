"""Attention in plain PyTorch: the path of the CPU and of float64, and the reference of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import dropout


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, seed: Tensor | None,
    dropout_p: float, is_causal: bool, softmax_scale: float, return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Output and, on request, log-sum-exp; differentiable. torch's own kernel serves what it can on the CPU."""
    served = seed is None and not return_lse and not (is_causal and attn_mask is not None)
    if served and attn_mask is not None:
        served = attn_mask.dtype in (torch.bool, query.dtype)
    if served and query.device.type == "cpu" and not query.is_cuda:  # it answers fully masked rows with 0, as we do
        out = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=softmax_scale)
        return out, None
    wide = torch.promote_types(query.dtype, torch.float32)
    probabilities, lse = softmax_of_scores(query.to(wide), key.to(wide), attn_mask, is_causal, softmax_scale)
    out = dropout.dropout(probabilities, seed, dropout_p) @ value.to(wide)
    return out.to(query.dtype), lse


def softmax_of_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Probabilities ``[B, H, Lq, Lk]`` and their log-sum-exp; a row with nothing allowed is 0 with LSE -inf."""
    scores = query @ key.transpose(-1, -2) * softmax_scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    nothing = (scores == float("-inf")).all(-1)
    scores = scores.masked_fill(nothing[..., None], 0.0)  # so that no NaN arises, forward or backward
    probabilities = scores.softmax(-1).masked_fill(nothing[..., None], 0.0)
    return probabilities, scores.logsumexp(-1).masked_fill(nothing, float("-inf"))


def attention_backward(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, dropout_p: float, is_causal: bool, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients as formulas (FlashAttention-2, algorithm 2), for the operator of ``torch.compile``."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v, do = query.to(wide), key.to(wide), value.to(wide), dout.to(wide)
    p, _ = softmax_of_scores(q, k, attn_mask, is_causal, softmax_scale)
    delta = (out.to(wide) * do).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dp = dropout.dropout(do @ v.transpose(-1, -2), seed, dropout_p)
    ds = p * (dp - delta[..., None])
    dv = dropout.dropout(p, seed, dropout_p).transpose(-1, -2) @ do
    dq = ds @ k * softmax_scale
    dk = ds.transpose(-1, -2) @ q * softmax_scale
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)
