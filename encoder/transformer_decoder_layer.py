"""torch.nn.TransformerDecoderLayer on the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .kernels.attention.eager import MAX_HEAD_DIM
from .modules import activation_name, why_not_plain
from .multihead_attention import batch_and_length, check_hint, masks_fit, merged_mask

_ATTENTIONS = ("self_attn", "multihead_attn")
_DROPOUTS = ("dropout", "dropout1", "dropout2", "dropout3")
_FEED_FORWARD, _KINDS = ("linear1", "linear2", "norm3"), ("weight", "bias")
_WEIGHTED = ("linear1", "linear2", "norm1", "norm2", "norm3")
_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    *((name, nn.MultiheadAttention) for name in _ATTENTIONS),
    ("linear1", nn.Linear),
    ("linear2", nn.Linear),
    *((f"norm{i}", nn.LayerNorm) for i in (1, 2, 3)),
    *((name, nn.Dropout) for name in _DROPOUTS),
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
        for name in ("batch_first", "num_heads"):
            if getattr(parts["self_attn"], name) != getattr(parts["multihead_attn"], name):
                return f"self_attn and multihead_attn disagree about {name}"
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
        mask, causal = merged_mask(tgt_mask, tgt_key_padding_mask, tgt_is_causal, tgt, sizes[0])
        memory_mask, causal_memory = merged_mask(memory_mask, memory_key_padding_mask, memory_is_causal, tgt, sizes[1])
        unbatched = tgt.dim() == 2
        if unbatched:
            tgt, memory = tgt.unsqueeze(0), memory.unsqueeze(0)
        parts: Any = self._modules
        attn, attn2, norm1, norm2, norm3 = [parts[name] for name in (*_ATTENTIONS, "norm1", "norm2", "norm3")]
        dropout, dropout1, dropout2, dropout3 = [parts[name] for name in _DROPOUTS]
        of_feed_forward = [parts[name]._parameters[kind] for name in _FEED_FORWARD for kind in _KINDS]
        weights, across = [
            kernels.LayerWeights(
                of._parameters["in_proj_weight"], of._parameters["in_proj_bias"],
                *[part._parameters[kind] for part in (of._modules["out_proj"], norm) for kind in _KINDS],
                *of_feed_forward,
            )
            for of, norm in ((attn, norm1), (attn2, norm2))
        ]  # fmt: skip
        out = kernels.decoder_layer(
            tgt, weights, attn.num_heads, memory, across, memory_mask=memory_mask, memory_is_causal=causal_memory,
            memory_dropout_p=attn2.dropout if attn2.training else 0.0, across_eps=norm2.eps,
            across_dropout_p=_rate(dropout2), attn_mask=mask, is_causal=causal,
            batch_first=attn.batch_first or unbatched, norm_first=self.norm_first,
            activation=activation_name(self.activation) or self.activation, eps1=norm1.eps, eps2=norm3.eps,
            attn_dropout_p=attn.dropout if attn.training else 0.0, dropout1_p=_rate(dropout1), dropout_p=_rate(dropout),
            dropout2_p=_rate(dropout3),
        )  # fmt: skip
        return out.squeeze(0) if unbatched else out

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


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
