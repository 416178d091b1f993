"""torch.nn.TransformerEncoder on the fused kernels, without the padding of a ragged batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from .modules import has_hooks
from .packing import PackedTokens, PaddedPacking, in_the_kind_of
from .transformer_encoder_layer import TransformerEncoderLayer, as_packed, mask_of_packed, through_padded

FULLEST = 0.85
"""Share of real tokens up to which a padded batch is packed on a CPU (docs/torch_nn.md has the measurement)."""
LEAST_WORK = 3_000_000
"""Multiply-adds that a layer's products would have to spend on the padding of a sequence, on average, for it to pay:
attention of a sequence of its own costs as much."""


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` with the same constructor, weights, masks and results, of fused layers.

    In the place of a padded batch it also takes a `fusenc.packing.PackedTokens` or a nested tensor, strided or jagged,
    and returns the same kind; it is packed once, for all layers and the norm. A padded batch with a
    `src_key_padding_mask` is packed where that pays, in training too: its real tokens go through the layers, and the
    output, of the shape of the input, is 0 at the padding. `pack_padding` decides:

    - None (the default): on a CPU if `enable_nested_tensor` is left True, at most 85 % of the tokens are real, and the
      work saved outweighs what packing costs (3 million multiply-adds a sequence in each layer: hardly ever at width
      64, with 4 padded tokens a sequence at width 256). Never on a GPU, where the number of tokens would have to be
      waited for.
    - True: whenever it can be done, on a GPU too.
    - False: never.

    It is never done inside torch.compile or a trace, with a layer that does not run fused or has hooks (they would find
    packed tokens), or with a `mask` beside padding that does not lie behind the tokens.

    Layers of another class run as they are, as in torch. docs/torch_nn.md says which of torch's own paths is followed
    where they differ.

    Example:
        >>> import torch, fusenc
        >>> layer = fusenc.TransformerEncoderLayer(d_model=32, nhead=4, batch_first=True)
        >>> encoder = fusenc.TransformerEncoder(layer, num_layers=2)
        >>> padding = torch.arange(10) >= torch.tensor([[10], [4]])  # True is padding
        >>> encoder(torch.randn(2, 10, 32), src_key_padding_mask=padding).shape
        torch.Size([2, 10, 32])
        >>> packed = fusenc.packing.pack(torch.randn(2, 10, 32), padding)
        >>> encoder(packed).data.shape
        torch.Size([14, 32])
    """

    pack_padding: bool | None = None

    def why_not_fused(self) -> str:
        """Why not all layers run fused, or "" if they do (once `fuse` has replaced torch's)."""
        if "forward" in self.__dict__:
            return "it has a forward of its own"
        to_be_fused = not isinstance(self, TransformerEncoder)
        for name, layer in self.layers.named_children():
            if not (_is_fused(layer) or (to_be_fused and type(layer) is nn.TransformerEncoderLayer)):
                return f"layers.{name} is a {type(layer).__module__}.{type(layer).__name__}"
            reason = TransformerEncoderLayer.why_not_fused(layer)  # type: ignore[arg-type]
            if reason:
                return f"layers.{name}: {reason}"
        return ""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As `torch.nn.TransformerEncoder.forward`: same arguments, shapes, mask meaning (True is masked).

        `src` may also be packed or nested; then there is no `src_key_padding_mask`, and `mask` is as in the layer.
        """
        ragged = isinstance(src, PackedTokens) or src.is_nested
        if not all(_is_fused(layer) for layer in self.layers):
            if ragged:
                return self._unfused(src, mask, src_key_padding_mask, is_causal)
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        if ragged:
            packed = as_packed(src, src_key_padding_mask)
            is_causal = _detect_is_causal_mask(mask, is_causal)
            if not (isinstance(src, PackedTokens) or (self._layers_take_packed(packed.data) and _is_by_row(self.norm))):
                return self._stack(src, mask, None, is_causal)  # a hook finds what was given
            return in_the_kind_of(src, self._stack(packed, mask, None, is_causal))
        dtypes = {m.dtype for m in (mask, src_key_padding_mask) if m is not None}
        if dtypes and dtypes != {torch.bool}:  # checks and warnings of torch; bool masks stay what they are
            src_key_padding_mask = F._canonical_mask(
                src_key_padding_mask, "src_key_padding_mask", F._none_or_dtype(mask), "mask", src.dtype
            )
            mask = F._canonical_mask(mask, "mask", None, "", src.dtype, False)
        batch_first = self.layers[0].self_attn.batch_first
        is_causal = _detect_is_causal_mask(mask, is_causal, _get_seq_len(src, batch_first))
        packing = self._packing(src, mask, src_key_padding_mask, is_causal, batch_first)
        if packing is None:
            return self._stack(src, mask, src_key_padding_mask, is_causal)
        return packing.unpack(self._stack(PackedTokens.of_padded(src, packing), mask, None, is_causal).data)

    def _stack(self, x: Any, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool) -> Any:
        """All layers and the norm, on whatever the layers take."""
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=key_padding_mask)
        if self.norm is None:
            return x
        return x.with_data(self.norm(x.data)) if isinstance(x, PackedTokens) else self.norm(x)

    def _unfused(self, src: Any, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool | None) -> Any:
        """A ragged batch through layers that may know padded ones only."""
        packed = as_packed(src, key_padding_mask)
        first: Any = self.layers[0]
        if mask is not None:
            mask = mask_of_packed(mask, packed, first.self_attn.num_heads)
        return in_the_kind_of(
            src, packed.with_data(through_padded(super().forward, packed, mask, bool(is_causal), first))
        )

    def _packing(
        self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, batch_first: bool
    ) -> PaddedPacking | None:
        """The packing of a padded batch, if its padding can and should be left out."""
        if key_padding_mask is None or self.pack_padding is False or src.dim() != 3 or (is_causal and mask is None):
            return None
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or type(src) is not Tensor:
            return None
        asked = self.pack_padding is True
        if not asked and (src.is_cuda or not src.is_cpu or not getattr(self, "enable_nested_tensor", True)):
            return None
        batch, length = src.shape[:2] if batch_first else src.shape[1::-1]
        heads = self.layers[0].self_attn.num_heads
        if key_padding_mask.shape != (batch, length) or (
            mask is not None and mask.shape not in ((length, length), (batch * heads, length, length))
        ):
            return None  # torch's errors
        if not (_is_by_row(self.norm) and self._layers_take_packed(src)):
            return None
        if torch._C._functorch.is_batchedtensor(src) or torch._C._functorch.is_batchedtensor(key_padding_mask):
            return None
        if key_padding_mask.dtype == torch.bool:
            keep = ~key_padding_mask
        else:
            keep = key_padding_mask == 0.0
            if not bool((keep | (key_padding_mask == float("-inf"))).all()):
                return None  # more than a padding mask
        if not asked:
            total = keep.numel()
            padding = total - int(keep.sum())
            if padding < (1.0 - FULLEST) * total or padding * self._products() < LEAST_WORK * batch:
                return None
        if mask is not None and bool((keep[:, 1:] & ~keep[:, :-1]).any()):
            return None  # positions inside a packed sequence are not those that the mask speaks of
        return PaddedPacking(keep, batch_first=batch_first)

    def _products(self) -> int:
        """Multiply-adds of a layer's products for a token."""
        first: Any = self.layers[0]
        width, hidden = first.self_attn.embed_dim, first.linear1.out_features
        return 4 * width * width + 2 * width * hidden

    def _layers_take_packed(self, x: Tensor) -> bool:
        """Whether every layer runs fused on tokens like these, without hooks, which would find them packed."""
        layers: Any = self.layers
        return all(not has_hooks(layer) and layer._fits(x) and not layer.why_not_fused() for layer in layers)


def _is_fused(layer: nn.Module) -> bool:
    return type(layer).forward is TransformerEncoderLayer.forward  # a subclass may have one of its own


def _is_by_row(norm: nn.Module | None) -> bool:
    """Whether a norm treats each token for itself and nobody looks on."""
    if norm is None:
        return True
    return type(norm) in (nn.LayerNorm, nn.RMSNorm) and len(norm.normalized_shape) == 1 and not has_hooks(norm)  # type: ignore[arg-type]
