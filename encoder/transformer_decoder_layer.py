"""torch.nn.TransformerDecoderLayer on the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels.attention.eager import MAX_HEAD_DIM
from .kernels.common.backend import would_use_triton
from .modules import activation_name, why_not_plain
from .multihead_attention import (
    batch_and_length,
    check_hint,
    join_heads,
    masks_fit,
    merged_mask,
    project,
)

_ATTENTIONS = ("self_attn", "multihead_attn")
_WEIGHTED = ("linear1", "linear2", "norm1", "norm2", "norm3")
_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    *((name, nn.MultiheadAttention) for name in _ATTENTIONS),
    ("linear1", nn.Linear),
    ("linear2", nn.Linear),
    *((f"norm{i}", nn.LayerNorm) for i in (1, 2, 3)),
    *((name, nn.Dropout) for name in ("dropout", "dropout1", "dropout2", "dropout3")),
)
_BLOCKS = ("_sa_block", "_mha_block", "_ff_block")


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` with the same constructor, weights, masks and results on fused kernels.

    It runs in training and in inference, post-norm and pre-norm, and inside `nn.TransformerDecoder`. Differences from
    torch: a row with every key masked attends to nothing (its attention is 0, where torch gives NaN on some paths);
    dropout draws another mask from the same generator; an activation that the kernels lack runs unfused. A layer
    whose parts were replaced, parametrised, hooked or overridden runs torch's own forward; `why_not_fused` says so.

    Example:
        >>> import torch, fusenc
        >>> layer = fusenc.TransformerDecoderLayer(d_model=32, nhead=4, activation="gelu", batch_first=True)
        >>> layer(torch.randn(2, 10, 32), torch.randn(2, 7, 32)).shape
        torch.Size([2, 10, 32])
    """

    def why_not_fused(self) -> str:
        """Why calls run torch's own forward, or "" if they run fused."""
        parts: Any = self._modules
        reason = why_not_plain((name, parts[name], kind) for name, kind in _PARTS)
        if reason:
            return reason
        for name in _ATTENTIONS:
            attn = parts[name]
            if not attn._qkv_same_embed_dim or attn.bias_k is not None or attn.add_zero_attn:
                return f"{name} has options that are not fused"
            if attn.head_dim > MAX_HEAD_DIM:
                return f"the head size is above {MAX_HEAD_DIM}"
        if parts["self_attn"].batch_first is not parts["multihead_attn"].batch_first:
            return "self_attn and multihead_attn disagree about batch_first"
        cls = type(self)
        if cls is not TransformerDecoderLayer:
            for name in _BLOCKS:
                if getattr(cls, name) is not getattr(nn.TransformerDecoderLayer, name):
                    return f"{cls.__name__} has {name} of its own"
        return ""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As `torch.nn.TransformerDecoderLayer.forward`: same arguments, shapes, mask meaning (True is masked)."""
        sizes = () if self.why_not_fused() else self._sizes(tgt, memory)
        if (
            not sizes
            or not masks_fit(tgt_mask, tgt_key_padding_mask, tgt, sizes[0])
            or not masks_fit(memory_mask, memory_key_padding_mask, tgt, sizes[1])
        ):
            # Torch's own forward computes what we do not, and raises its own errors for bad input.
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip
        check_hint(tgt_is_causal, tgt_mask)
        check_hint(memory_is_causal, memory_mask)
        to_itself = merged_mask(tgt_mask, tgt_key_padding_mask, tgt_is_causal, tgt, sizes[0])
        to_memory = merged_mask(memory_mask, memory_key_padding_mask, memory_is_causal, tgt, sizes[1])
        parts: Any = self._modules
        norm1, norm2, norm3 = parts["norm1"], parts["norm2"], parts["norm3"]
        dropout1, dropout2, dropout3 = parts["dropout1"], parts["dropout2"], parts["dropout3"]
        # The bias of a product is added where its result is read, in the norm's kernel, whose backward pass sums its
        # gradient. Elsewhere the product adds it for nothing.
        fold = would_use_triton(tgt)
        if not self.norm_first:
            attended, bias = _attend(parts["self_attn"], tgt, tgt, *to_itself, fold)
            x = _add_norm(attended, tgt, norm1, dropout1, bias)
            attended, bias = _attend(parts["multihead_attn"], x, memory, *to_memory, fold)
            x = _add_norm(attended, x, norm2, dropout2, bias)
            activated, bias = self._feed_forward(x, fold)
            return _add_norm(activated, x, norm3, dropout3, bias)
        normed = kernels.add_norm(tgt, None, norm1.weight, norm1.bias, eps=norm1.eps)
        attended, bias = _attend(parts["self_attn"], normed, normed, *to_itself, fold)
        normed, x = _add_norm(attended, tgt, norm2, dropout1, bias, return_sum=True)
        attended, bias = _attend(parts["multihead_attn"], normed, memory, *to_memory, fold)
        normed, x = _add_norm(attended, x, norm3, dropout2, bias, return_sum=True)
        return self._feed_forward(normed, False, x)[0]

    def _sizes(self, tgt: Tensor, memory: Tensor) -> tuple[tuple[int, int, int, int], ...]:
        """Batch, heads, queries and keys of both attentions; empty for inputs that do not fit."""
        attn: Any = self._modules["self_attn"]
        width, rank, dtype = attn.embed_dim, tgt.dim(), tgt.dtype
        if (
            tgt.is_nested or memory.is_nested or rank not in (2, 3) or memory.dim() != rank
            or tgt.shape[-1] != width or memory.shape[-1] != width
        ):  # fmt: skip
            return ()
        if not tgt.is_floating_point() or not torch.is_autocast_enabled(tgt.device.type):
            weights = [self._modules[name]._parameters["weight"] for name in _WEIGHTED]  # type: ignore[union-attr]
            weights += [self._modules[name].in_proj_weight for name in _ATTENTIONS]  # type: ignore[union-attr]
            if any(t is not None and t.dtype != dtype for t in (memory, *weights)):
                return ()
        batch, len_q = batch_and_length(tgt, attn.batch_first)
        memory_batch, len_k = batch_and_length(memory, attn.batch_first)
        if memory_batch != batch:
            return ()
        return (batch, attn.num_heads, len_q, len_q), (batch, attn.num_heads, len_q, len_k)

    def _feed_forward(self, x: Tensor, fold: bool, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The block's output, dropped out and added to a residual if there is one, and with `fold` the bias that it
        still lacks."""
        parts: Any = self._modules
        linear1, linear2, dropout, dropout3 = (parts[name] for name in ("linear1", "linear2", "dropout", "dropout3"))
        activation = activation_name(self.activation)
        if activation is None:
            out = linear2(dropout(self.activation(linear1(x))))
            return (out if residual is None else residual + dropout3(out)), None
        out = kernels.ffn(
            x, linear1.weight, linear1.bias, linear2.weight, None if fold else linear2.bias, activation=activation,
            dropout_p=_rate(dropout), out_dropout_p=0.0 if residual is None else _rate(dropout3), residual=residual,
        )  # fmt: skip
        return out, linear2.bias if fold else None


def _attend(
    attn: nn.MultiheadAttention, x: Tensor, memory: Tensor, mask: Tensor | None, is_causal: bool, fold: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention's output, and with `fold` the bias that it still lacks."""
    query, key, value = project(attn, x, memory, memory, attn.batch_first)
    dropout_p = attn.dropout if attn.training else 0.0
    out = join_heads(kernels.attention(query, key, value, mask, dropout_p, is_causal), x, attn.batch_first)
    weight, bias = attn.out_proj.weight, attn.out_proj.bias
    return (F.linear(out, weight), bias) if fold else (F.linear(out, weight, bias), None)


def _add_norm(
    x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout, x_bias: Tensor | None,
    return_sum: bool = False,
) -> Any:  # fmt: skip
    return kernels.add_norm(
        x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=_rate(dropout), x_bias=x_bias,
        return_sum=return_sum,
    )  # fmt: skip


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
