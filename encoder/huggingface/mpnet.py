"""MPNet: BERT with a bias of the distance of two tokens, which all layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.mpnet import modeling_mpnet as mpnet

from .. import kernels
from ..kernels.common.backend import would_use_triton
from ..packing import PaddedPacking
from .common import PaddingFreeStates, asks_for_more, fused_class, serves
from .post_norm import Names, PostNormLayer

_BUCKETS, _REACH = 32, 128  # MPNet's own, whatever the configuration says

_NAMES = Names(
    attention="attention.attn", projections=("q", "k", "v"), nhead="num_attention_heads",
    attention_dropout="attention.attn.dropout", out="attention.attn.o", dropout1="attention.dropout",
    norm1="attention.LayerNorm", up="intermediate.dense", activation="intermediate.intermediate_act_fn",
    down="output.dense", dropout2="output.dropout", norm2="output.LayerNorm",
)  # fmt: skip


class _FusedLayer(PostNormLayer):
    """A layer of MPNet's; mixed into a subclass of it."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
        *args: Any, packing: PaddedPacking | None = None, relative_bias: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As MPNet's own layer; `relative_bias` is the position bias by distance, for kernels that read that."""
        norm: Any = self._modules["output"]._modules["LayerNorm"]  # type: ignore[union-attr]
        if packing is None and (
            asks_for_more(args, kwargs)
            or not serves(hidden_states, attention_mask, norm.weight)
            or (attention_mask is not None and attention_mask.dtype == torch.bool)  # which MPNet would add as a number
            or self.why_not_fused(self)
        ):
            return super(PostNormLayer, self).forward(hidden_states, attention_mask, position_bias, *args, **kwargs)
        options: dict[str, Tensor | None]
        if packing is not None:
            assert position_bias is not None
            options = {"attn_mask": position_bias[..., : packing.max_length, : packing.max_length]}
        elif relative_bias is not None:
            options = {"attn_mask": attention_mask, "relative_bias": relative_bias}
        elif position_bias is None or attention_mask is None:
            options = {"attn_mask": position_bias if attention_mask is None else attention_mask}
        else:
            options = {"attn_mask": position_bias + attention_mask}
        return (self._layer(hidden_states, packing, **options),)


class _FusedEncoder(PaddingFreeStates):
    """MPNet's encoder; mixed into a subclass of it."""

    by_distance = True

    def _plan(self, inputs: Tensor, attention_mask: Any) -> tuple[Any, dict[str, Any]] | None:
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
            return None
        table: Any = self._modules["relative_attention_bias"].weight  # type: ignore[union-attr]
        if would_use_triton(inputs) and table.shape[0] >= _BUCKETS:
            return attention_mask, {"relative_bias": kernels.t5_relative_bias(table[:_BUCKETS], max_distance=_REACH)}
        return super()._plan(inputs, attention_mask)

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The position bias, ``[1, H, L, L]``: that of one sequence, since all are alike."""
        return super().compute_position_bias(x[:1], *args, **kwargs)  # type: ignore[misc]


_LAYER = fused_class(_FusedLayer, mpnet.MPNetLayer, names=_NAMES, stock={
    "attention": mpnet.MPNetAttention, "attention.attn": mpnet.MPNetSelfAttention,
    "intermediate": mpnet.MPNetIntermediate, "output": mpnet.MPNetOutput,
})  # fmt: skip

REPLACEMENTS: dict[type, type] = {
    mpnet.MPNetLayer: _LAYER,
    mpnet.MPNetEncoder: fused_class(_FusedEncoder, mpnet.MPNetEncoder, fused_layer=_LAYER),
}
"""Each class that `fuse` knows here, and the class that takes its place."""
