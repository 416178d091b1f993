"""torch.nn.TransformerEncoder on the fused kernels, without the padding of a ragged batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from .modules import has_hooks
from .packing import PackedTokens, PaddedPacking, in_the_kind_of
from .padding import may_remove, real_tokens, require_setting
from .transformer_encoder_layer import TransformerEncoderLayer, as_packed, mask_of_packed, through_padded


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` with the same constructor, weights, masks and results, of fused layers.

    In the place of a padded batch it also takes a `fusenc.packing.PackedTokens` or a nested tensor, strided or jagged,
    and returns the same kind; it is packed once, for all layers and the norm. A padded batch with a
    `src_key_padding_mask` is packed where that saves time, in training too: its real tokens go through the layers, and
    the output, of the shape of the input, is 0 at the padding. The attribute `padding` decides:

    - "auto" (the default): if `enable_nested_tensor` is left True and the work saved outweighs the cost of packing. On
      a CPU at most 85 % of the tokens may be real, and packing costs 3 million multiply-adds a sequence in each layer
      (hardly ever saved at width 64, by 4 padded tokens a sequence at width 256). On a GPU it costs one wait for the
      device in each call, counted as 3 billion multiply-adds of all layers together.
    - "remove": whenever it can be done.
    - "keep": never.

    It is never done inside torch.compile, a trace, vmap or the capture of a CUDA graph, on fake tensors, with a layer
    that does not run fused or has hooks (they would find packed tokens), or with a `mask` beside padding that does not
    lie behind the tokens.

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

    padding: str = "auto"

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
        setting = self.padding
        require_setting(setting)
        if key_padding_mask is None or src.dim() != 3 or (is_causal and mask is None):
            return None
        if not may_remove(setting, src, key_padding_mask):
            return None
        if setting == "auto" and not getattr(self, "enable_nested_tensor", True):
            return None
        batch, length = src.shape[:2] if batch_first else src.shape[1::-1]
        heads = self.layers[0].self_attn.num_heads
        if key_padding_mask.shape != (batch, length) or (
            mask is not None and mask.shape not in ((length, length), (batch * heads, length, length))
        ):
            return None  # torch's errors
        if not (_is_by_row(self.norm) and self._layers_take_packed(src)):
            return None
        conditions = []
        if key_padding_mask.dtype == torch.bool:
            keep = ~key_padding_mask
        else:
            keep = key_padding_mask == 0.0
            conditions.append((keep | (key_padding_mask == float("-inf"))).all())  # no more than a padding mask
        if mask is not None:  # positions inside a packed sequence have to be those that the mask speaks of
            conditions.append(~(keep[:, 1:] & ~keep[:, :-1]).any())
        tokens = real_tokens(
            setting, keep, src, products=self._products(), num_layers=len(self.layers), conditions=conditions
        )
        return PaddedPacking(tokens, batch_first=batch_first) if tokens and tokens.hidden else None

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
