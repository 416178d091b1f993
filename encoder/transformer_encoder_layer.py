"""torch.nn.TransformerEncoderLayer on the fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import kernels
from .kernels.attention.eager import MAX_HEAD_DIM
from .modules import activation_name, why_not_plain
from .packing import Packing, attend

_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("self_attn", nn.MultiheadAttention),
    ("linear1", nn.Linear),
    ("dropout", nn.Dropout),
    ("linear2", nn.Linear),
    ("norm1", nn.LayerNorm),
    ("norm2", nn.LayerNorm),
    ("dropout1", nn.Dropout),
    ("dropout2", nn.Dropout),
)

_WEIGHTED = ("linear1", "linear2", "norm1", "norm2")


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` with the same constructor, weights, masks and results on fused kernels.

    It runs in training and in inference, post-norm and pre-norm, and inside `nn.TransformerEncoder`, whose nested
    tensors it takes too. Differences from torch: a row with every key masked attends to nothing (its attention
    is 0, where torch gives NaN on some paths); dropout draws another mask from the same generator; an activation
    other than ReLU or GELU runs unfused. A layer whose parts were replaced, parametrised or hooked runs
    torch's own forward; `why_not_fused` says so.

    Example:
        >>> import torch, fusenc
        >>> layer = fusenc.TransformerEncoderLayer(d_model=32, nhead=4, activation="gelu", batch_first=True)
        >>> layer(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def why_not_fused(self) -> str:
        """Why calls run torch's own forward, or "" if they run fused."""
        parts: Any = self._modules
        reason = why_not_plain((name, parts[name], kind) for name, kind in _PARTS)
        if reason:
            return reason
        attn = parts["self_attn"]
        if not attn._qkv_same_embed_dim or attn.bias_k is not None or attn.add_zero_attn:
            return "self_attn has options that are not fused"
        if attn.head_dim > MAX_HEAD_DIM:
            return f"the head size is above {MAX_HEAD_DIM}"
        return why_not_plain([("self_attn.out_proj", attn.out_proj, NonDynamicallyQuantizableLinear)])

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `torch.nn.TransformerEncoderLayer.forward`: same arguments, shapes, mask meaning (True is masked)."""
        if not self._serves(src, src_mask, src_key_padding_mask, is_causal):
            # Torch's own forward computes what we do not, and raises its own errors for bad input.
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            return self._forward_nested(src)
        if src_mask is None and src_key_padding_mask is None:
            mask, causal = None, False
        elif is_causal and src_key_padding_mask is None:
            mask, causal = None, True  # as in torch, the hint stands for the mask
        else:
            mask, causal = self._merged_mask(src, src_mask, src_key_padding_mask), False
        if src.dim() == 2:
            return self._layer(src.unsqueeze(0), True, mask, causal, None).squeeze(0)
        return self._layer(src, self.self_attn.batch_first, mask, causal, None)

    def _serves(
        self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None, is_causal: bool
    ) -> bool:
        """True if this call can run fused: plain modules, and inputs that torch would take."""
        if self.why_not_fused():
            return False
        attn: Any = self._modules["self_attn"]
        weight = attn._parameters["in_proj_weight"]
        if src.is_nested:
            return (
                src.layout == torch.strided and src.dim() == 3 and attn.batch_first
                and src_mask is None and src_key_padding_mask is None
            )  # fmt: skip
        if src.dim() not in (2, 3) or src.shape[-1] != attn.embed_dim or not src.is_floating_point():
            return False
        weights = [self._modules[name]._parameters["weight"] for name in _WEIGHTED]  # type: ignore[union-attr]
        if any(w is not None and w.dtype != src.dtype for w in (weight, *weights)) and not torch.is_autocast_enabled(
            src.device.type
        ):
            return False
        if src_mask is None and src_key_padding_mask is None:
            return not is_causal
        batch, length = _batch_and_length(src, attn.batch_first)
        if src_key_padding_mask is not None:
            if src_key_padding_mask.shape != ((batch, length) if src.dim() == 3 else (length,)):
                return False
            if not (src_key_padding_mask.dtype == torch.bool or src_key_padding_mask.is_floating_point()):
                return False
        if src_mask is not None:
            if src_mask.shape not in ((length, length), (batch * attn.num_heads, length, length)):
                return False
            if not (src_mask.dtype == torch.bool or src_mask.is_floating_point()):
                return False
        return not (is_causal and src_mask is None)

    def _merged_mask(self, src: Tensor, src_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """One mask with the kernels' meaning: bool with True taking part, or floating and added."""
        attn = self.self_attn
        batch, length = _batch_and_length(src, attn.batch_first)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(batch, 1, 1, length)
        if src_mask is not None:
            src_mask = src_mask.view(-1 if src_mask.dim() == 2 else batch, 1 if src_mask.dim() == 2 else attn.num_heads,
                                     length, length)  # fmt: skip
        masks = [m for m in (src_mask, key_padding_mask) if m is not None]
        if all(m.dtype == torch.bool for m in masks):
            return ~(masks[0] | masks[1]) if len(masks) == 2 else ~masks[0]
        if len(masks) == 2 and masks[0].dtype != masks[1].dtype:
            masks = [  # warns, as torch does, that mixed mask types are deprecated
                F._canonical_mask(m, "src_key_padding_mask", masks[0].dtype, "src_mask", src.dtype)  # type: ignore[misc]
                for m in masks
            ]
        return masks[0] + masks[1] if len(masks) == 2 else masks[0]

    def _forward_nested(self, src: Tensor) -> Tensor:
        """A nested tensor, as `nn.TransformerEncoder` makes of a padded batch in inference; the result is one too."""
        sequences = src.unbind()
        out = self._layer(torch.cat(sequences), True, None, False, Packing([len(s) for s in sequences], src.device))
        return torch._nested_view_from_buffer(
            out.contiguous().view(-1),
            src._nested_tensor_size(),
            *torch._nested_compute_contiguous_strides_offsets(src._nested_tensor_size()),
        )

    def _layer(
        self, x: Tensor, batch_first: bool, mask: Tensor | None, is_causal: bool, packing: Packing | None
    ) -> Tensor:
        """The layer on ``[B, L, E]``, ``[L, B, E]`` or, packed, ``[T, E]``."""
        parts: Any = self._modules
        norm1, norm2, dropout1, dropout2 = parts["norm1"], parts["norm2"], parts["dropout1"], parts["dropout2"]
        activation = activation_name(self.activation)
        if activation is not None:
            attn, dropout = parts["self_attn"], parts["dropout"]
            weights = kernels.LayerWeights(
                attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias, norm1.weight,
                norm1.bias, *_parameters(parts["linear1"]), *_parameters(parts["linear2"]), norm2.weight, norm2.bias,
            )  # fmt: skip
            return kernels.encoder_layer(
                x, weights, attn.num_heads, attn_mask=mask, is_causal=is_causal,
                cu_seqlens=None if packing is None else packing.cu_seqlens,
                max_seqlen=0 if packing is None else packing.longest,
                batch_first=batch_first, norm_first=self.norm_first, activation=activation,
                eps1=norm1.eps, eps2=norm2.eps,
                attn_dropout_p=attn.dropout if attn.training else 0.0, dropout1_p=_rate(dropout1),
                dropout_p=_rate(dropout), dropout2_p=_rate(dropout2),
            )  # fmt: skip
        # An activation that the kernels do not have: the parts one by one.
        if not self.norm_first:
            attended = self._attention(x, batch_first, mask, is_causal, packing)
            x = _add_norm(attended, x, norm1, dropout1)
            return _add_norm(self._feed_forward(x), x, norm2, dropout2)
        attended = self._attention(_add_norm(x, None, norm1, None), batch_first, mask, is_causal, packing)
        normed, x = kernels.add_norm(
            attended, x, norm2.weight, norm2.bias,
            eps=norm2.eps, dropout_p=dropout1.p, training=dropout1.training, return_sum=True,
        )  # fmt: skip
        return x + F.dropout(self._feed_forward(normed), dropout2.p, dropout2.training)

    def _attention(
        self, x: Tensor, batch_first: bool, mask: Tensor | None, is_causal: bool, packing: Packing | None
    ) -> Tensor:
        attn: Any = self._modules["self_attn"]
        dropout_p = attn.dropout if attn.training else 0.0
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        query, key, value = qkv.view(*x.shape[:-1], 3, attn.num_heads, attn.head_dim).unbind(-3)
        if packing is not None:
            out = packing.attend(query, key, value, dropout_p=dropout_p)
        elif batch_first:
            out = attend(query, key, value, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p)
        else:
            swapped = (t.transpose(0, 1) for t in (query, key, value))
            out = attend(*swapped, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p).transpose(0, 1)
        out_proj = attn._modules["out_proj"]
        return F.linear(out.reshape(x.shape), out_proj.weight, out_proj.bias)

    def _feed_forward(self, x: Tensor) -> Tensor:
        parts: Any = self._modules
        return parts["linear2"](parts["dropout"](self.activation(parts["linear1"](x))))


def _parameters(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _batch_and_length(src: Tensor, batch_first: bool) -> tuple[int, int]:
    if src.dim() == 2:
        return 1, src.shape[0]
    return (src.shape[0], src.shape[1]) if batch_first else (src.shape[1], src.shape[0])


def _add_norm(x: Tensor, residual: Tensor | None, norm: nn.LayerNorm, dropout: nn.Dropout | None) -> Tensor:
    p, training = (0.0, False) if dropout is None else (dropout.p, dropout.training)
    return kernels.add_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=p, training=training)
