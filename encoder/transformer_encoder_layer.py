"""torch.nn.TransformerEncoderLayer on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import kernels
from .kernels.attention.eager import MAX_HEAD_DIM
from .kernels.common import checks
from .modules import activation_name, why_not_plain
from .multihead_attention import batch_and_length, check_hint, masks_fit, merged_mask
from .packing import PackedTokens, PaddedPacking, in_the_kind_of

_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("self_attn", nn.MultiheadAttention),
    *((name, nn.Linear) for name in ("linear1", "linear2")),
    *((name, nn.LayerNorm) for name in ("norm1", "norm2")),
    *((name, nn.Dropout) for name in ("dropout", "dropout1", "dropout2")),
)
_WEIGHTED = tuple(name for name, _ in _PARTS[:5])
_BLOCKS = ("_sa_block", "_ff_block")


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` with the same constructor, weights, masks and results on fused kernels.

    It runs in training and in inference, post-norm and pre-norm, and inside `nn.TransformerEncoder`. In the place of a
    padded batch it also takes a `fusenc.packing.PackedTokens` or a nested tensor, strided or jagged, and returns the
    same kind. Differences from torch: a row with every key masked attends to nothing (its attention is 0, where torch
    gives NaN on some paths); dropout draws another mask from the same generator; an activation other than ReLU, GELU or
    SiLU runs unfused. A layer whose parts were replaced, parametrised or hooked runs torch's own forward;
    `why_not_fused` says so. docs/torch_nn.md says which of torch's own paths is followed where they differ.

    With the attribute `recompute` set to True the backward pass computes the activation again instead of keeping it: in
    units of `src` a training step keeps 12 instead of 16, where the hidden layer is 4 times as wide.

    Example:
        >>> import torch, fusenc
        >>> layer = fusenc.TransformerEncoderLayer(d_model=32, nhead=4, activation="gelu", batch_first=True)
        >>> layer(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    recompute: bool = False

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
        for name in _BLOCKS:
            if getattr(type(self), name) is not getattr(nn.TransformerEncoderLayer, name) or name in self.__dict__:
                return f"it has a {name} of its own"
        return why_not_plain([("self_attn.out_proj", attn.out_proj, NonDynamicallyQuantizableLinear)])

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `torch.nn.TransformerEncoderLayer.forward`: same arguments, shapes, mask meaning (True is masked).

        `src` may also be packed or nested; then `src_mask` speaks of positions inside each sequence, ``[S, S]`` or
        ``[B * nhead, S, S]`` with S at least the longest, `is_causal` needs no mask beside it, and there is no
        `src_key_padding_mask`.
        """
        if isinstance(src, PackedTokens) or src.is_nested:
            return self._forward_ragged(src, src_mask, src_key_padding_mask, is_causal)
        attn: Any = self._modules["self_attn"]
        sizes = None
        if not self.why_not_fused() and src.dim() in (2, 3) and self._fits(src):
            batch, length = batch_and_length(src, attn.batch_first)
            sizes = (batch, attn.num_heads, length, length)
        if sizes is None or not masks_fit(src_mask, src_key_padding_mask, src, sizes):
            # Torch's own forward computes what we do not, and raises its own errors for bad input.
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        check_hint(is_causal, src_mask)
        mask, causal = merged_mask(
            src_mask, src_key_padding_mask, is_causal, src, sizes, ("src_mask", "src_key_padding_mask")
        )
        if src.dim() == 2:
            return self._layer(src.unsqueeze(0), True, mask, causal).squeeze(0)
        return self._layer(src, attn.batch_first, mask, causal)

    def _fits(self, src: Tensor) -> bool:
        """True if the width is the layer's and the weights are of the dtype of `src`."""
        parts: Any = self._modules
        dtype = src.dtype
        if src.shape[-1] != parts["self_attn"].embed_dim or not dtype.is_floating_point:
            return False
        for name in _WEIGHTED:
            weight = parts[name]._parameters["weight" if name != "self_attn" else "in_proj_weight"]
            if weight is not None and weight.dtype is not dtype:
                return torch.is_autocast_enabled(src.device.type)
        return True

    def _forward_ragged(
        self, src: PackedTokens | Tensor, src_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
    ) -> Any:
        """On packed tokens and nested tensors; the result is of the kind of `src`."""
        packed = as_packed(src, key_padding_mask)
        mask = None if src_mask is None or is_causal else mask_of_packed(src_mask, packed, self.self_attn.num_heads)
        if packed.data.dim() == 2 and self._fits(packed.data) and not self.why_not_fused():
            out = self._layer(packed.data, True, mask, is_causal, packed)
        else:
            out = through_padded(super().forward, packed, mask, is_causal, self)
        return in_the_kind_of(src, packed.with_data(out))

    def _layer(
        self, x: Tensor, batch_first: bool, mask: Tensor | None, is_causal: bool, packed: PackedTokens | None = None
    ) -> Tensor:
        """The layer on ``[B, L, E]``, ``[L, B, E]`` or, packed, ``[T, E]``."""
        parts: Any = self._modules
        attn, norm1, norm2 = parts["self_attn"], parts["norm1"], parts["norm2"]
        dropout, dropout1, dropout2 = parts["dropout"], parts["dropout1"], parts["dropout2"]
        in_proj, out_proj = attn._parameters, attn._modules["out_proj"]._parameters
        first, second = norm1._parameters, norm2._parameters
        up, down = parts["linear1"]._parameters, parts["linear2"]._parameters
        weights = kernels.LayerWeights(
            in_proj["in_proj_weight"], in_proj["in_proj_bias"], out_proj["weight"], out_proj["bias"], first["weight"],
            first["bias"], up["weight"], up["bias"], down["weight"], down["bias"], second["weight"], second["bias"],
        )  # fmt: skip
        activation: Callable[[Tensor], Tensor] = self.activation
        return kernels.encoder_layer(
            x, weights, attn.num_heads, attn_mask=mask, is_causal=is_causal,
            cu_seqlens=None if packed is None else packed.cu_seqlens,
            max_seqlen=0 if packed is None else packed.max_length,
            batch_first=batch_first, norm_first=self.norm_first, activation=activation_name(activation) or activation,
            eps1=norm1.eps, eps2=norm2.eps, recompute=self.recompute,
            attn_dropout_p=attn.dropout if attn.training else 0.0,
            dropout1_p=dropout1.p if dropout1.training else 0.0,
            dropout_p=dropout.p if dropout.training else 0.0,
            dropout2_p=dropout2.p if dropout2.training else 0.0,
        )  # fmt: skip


def _as_planes(mask: Tensor, nhead: int) -> Tensor:
    """``[S, S]`` or ``[B * H, S, S]`` as ``[1 or B, 1 or H, S, S]``."""
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, nhead))


def as_packed(src: PackedTokens | Tensor, key_padding_mask: Tensor | None) -> PackedTokens:
    """A ragged batch of any kind, beside which there can be no padding."""
    if key_padding_mask is not None:
        checks.fail_value("src_key_padding_mask", "None, since a ragged batch has no padding", key_padding_mask)
    return src if isinstance(src, PackedTokens) else PackedTokens.from_nested(src)


def mask_of_packed(mask: Tensor, packed: PackedTokens, nhead: int) -> Tensor:
    """A layer's mask for packed tokens: ``[1 or B, 1 or H, longest, longest]`` with the kernels' meaning, sequences in
    the order in which they are packed."""
    longest = packed.max_length
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        checks.fail_type("src_mask", "a bool or floating tensor", mask)
    if (
        mask.dim() not in (2, 3) or mask.shape[-1] < longest or mask.shape[-2] < longest
        or (mask.dim() == 3 and mask.shape[0] != len(packed) * nhead)
    ):  # fmt: skip
        expected = f"[S, S] or [{len(packed) * nhead}, S, S] with S of at least {longest}, the longest sequence"
        checks.fail_value("src_mask", expected, mask)
    mask = _as_planes(mask, nhead)[:, :, :longest, :longest]
    order = None if packed.padding is None else packed.padding.order
    if order is not None and mask.shape[0] > 1:
        mask = mask[order]
    return ~mask if mask.dtype == torch.bool else mask


def through_padded(
    forward: Callable[..., Tensor], packed: PackedTokens, mask: Tensor | None, is_causal: bool, layer: Any
) -> Tensor:
    """Packed tokens through a forward of torch's, which knows padded batches only; `mask` as from `mask_of_packed`."""
    packing = PaddedPacking.behind(packed.cu_seqlens, packed.max_length, packed.data.shape[0])
    padded, padding = packing.unpack(packed.data), packing.key_padding_mask()
    padding[:, :1] = False  # an empty sequence would give NaN; what it gives now is thrown away
    length = packed.max_length
    if is_causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=padded.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = ~mask
        else:
            padding = torch.zeros_like(padding, dtype=mask.dtype).masked_fill(padding, float("-inf"))
        mask = mask.expand(len(packed), layer.self_attn.num_heads, length, length).flatten(0, 1)
    batch_first = layer.self_attn.batch_first
    out = forward(padded if batch_first else padded.transpose(0, 1), mask, padding)
    return packing.pack(out if batch_first else out.transpose(0, 1))
