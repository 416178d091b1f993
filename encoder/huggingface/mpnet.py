"""MPNet: BERT with a bias of the distance of two tokens, which all layers share."""

from __future__ import annotations

from typing import Any

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
        if packing is None and (
            asks_for_more(args, kwargs)
            or not serves(hidden_states, attention_mask, self.output.LayerNorm.weight)
            or self.why_not_fused(self)
        ):
            return super(PostNormLayer, self).forward(hidden_states, attention_mask, position_bias, *args, **kwargs)
        if packing is not None:
            bias = {"attn_mask": position_bias[..., : packing.max_length, : packing.max_length]}
        elif relative_bias is not None:
            bias = {"attn_mask": attention_mask, "relative_bias": relative_bias}
        elif position_bias is None or attention_mask is None:
            bias = {"attn_mask": position_bias if attention_mask is None else attention_mask}
        else:
            bias = {"attn_mask": position_bias + attention_mask}
        return (self._layer(hidden_states, packing, **bias),)


class _FusedEncoder(PaddingFreeStates):
    """MPNet's encoder; mixed into a subclass of it."""

    by_distance = True

    def _plan(self, inputs: Tensor, attention_mask: Any) -> tuple[Any, dict[str, Any]] | None:
        table = self.relative_attention_bias.weight
        if would_use_triton(inputs) and table.shape[0] >= _BUCKETS:
            return attention_mask, {"relative_bias": kernels.t5_relative_bias(table[:_BUCKETS], max_distance=_REACH)}
        return super()._plan(inputs, attention_mask)

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The position bias, ``[1, H, L, L]``: that of one sequence, since all are alike."""
        return super().compute_position_bias(x[:1], *args, **kwargs)


_LAYER = fused_class(_FusedLayer, mpnet.MPNetLayer, names=_NAMES, stock={
    "attention": mpnet.MPNetAttention, "attention.attn": mpnet.MPNetSelfAttention,
    "intermediate": mpnet.MPNetIntermediate, "output": mpnet.MPNetOutput,
})  # fmt: skip

REPLACEMENTS: dict[type, type] = {
    mpnet.MPNetLayer: _LAYER,
    mpnet.MPNetEncoder: fused_class(_FusedEncoder, mpnet.MPNetEncoder, fused_layer=_LAYER),
}
"""Each class that `fuse` knows here, and the class that takes its place."""
