"""MPNet: BERT with a bias of the distance of two tokens, which all layers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.common.backend import would_use_triton
from ..packing import PaddedPacking
from .common import PaddingFreeStates, asks_for_more, by_name, serves
from .post_norm import Names, PostNormLayer
from .stock import Stock

FAMILIES = {"mpnet": "MPNet"}

_BUCKETS, _REACH = 32, 128  # MPNet's own, whatever the configuration says

_NAMES = Names(
    attention="attention.attn", projections=("q", "k", "v"),
    attention_dropout="attention.attn.dropout", out="attention.attn.o", dropout1="attention.dropout",
    norm1="attention.LayerNorm", up="intermediate.dense", activation="intermediate.intermediate_act_fn",
    down="output.dense", dropout2="output.dropout", norm2="output.LayerNorm",
)  # fmt: skip
_PARTS = {
    "attention": "Attention", "attention.attn": "SelfAttention", "intermediate": "Intermediate", "output": "Output",
}  # fmt: skip
_LAYER = {
    "Layer": "hidden_states attention_mask position_bias **kwargs: attention intermediate output",
    "Attention": "hidden_states attention_mask position_bias **kwargs: LayerNorm attn dropout",
    "SelfAttention": "hidden_states attention_mask position_bias **kwargs: "
                     "all_head_size attention_head_size dropout k math matmul o q softmax sqrt v",
    "Intermediate": "hidden_states: dense intermediate_act_fn",
    "Output": "hidden_states input_tensor: LayerNorm dense dropout",
}  # fmt: skip
_ENCODER = {
    "Encoder": "hidden_states attention_mask **kwargs: compute_position_bias layer",
    "Encoder.compute_position_bias": "x position_ids num_buckets: relative_attention_bias relative_position_bucket",
    "Encoder.relative_position_bucket": "relative_position num_buckets max_distance: "
                                        "abs float full_like log math min where",
}  # fmt: skip


class _FusedLayer(PostNormLayer):
    """A layer of MPNet's; mixed into a subclass of it."""

    served = frozenset({"hidden_states", "attention_mask", "position_bias"})

    def forward(
        self, *args: Any, packing: PaddedPacking | None = None, relative_bias: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As MPNet's own layer; `relative_bias` is the position bias by distance, for kernels that read that."""
        given = by_name(self, args, kwargs)
        x, attention_mask, position_bias = map(given.get, ("hidden_states", "attention_mask", "position_bias"))
        norm: Any = self._modules["output"]._modules["LayerNorm"]  # type: ignore[union-attr]
        if packing is None and (
            asks_for_more(given, self.served)
            or not serves(x, attention_mask, norm.weight)
            or (attention_mask is not None and attention_mask.dtype == torch.bool)  # which MPNet would add as a number
            or self.why_not_fused(self)
        ):
            return super(PostNormLayer, self).forward(**given)
        options: dict[str, Tensor | None]
        if relative_bias is not None:
            options = {"attn_mask": attention_mask, "relative_bias": relative_bias}
        elif packing is not None:
            assert position_bias is not None
            options = {"attn_mask": position_bias[..., : packing.max_length, : packing.max_length]}
        elif position_bias is None or attention_mask is None:
            options = {"attn_mask": position_bias if attention_mask is None else attention_mask}
        else:
            options = {"attn_mask": position_bias + attention_mask}
        return (self._layer(x, packing, **options),)


class _FusedEncoder(PaddingFreeStates):
    """MPNet's encoder; mixed into a subclass of it."""

    by_distance = True

    def _plan(self, inputs: Tensor, attention_mask: Any) -> tuple[Any, dict[str, Any]] | None:
        if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
            return None
        plan = super()._plan(inputs, attention_mask)
        table: Any = self._modules["relative_attention_bias"].weight  # type: ignore[union-attr]
        if would_use_triton(inputs) and table.shape[0] >= _BUCKETS:
            mask, options = plan or (attention_mask, {})
            relative_bias = kernels.t5_relative_bias(table[:_BUCKETS], max_distance=_REACH)
            return mask, {**options, "relative_bias": relative_bias}
        return plan

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The position bias, ``[1, H, L, L]``: that of one sequence, since all are alike."""
        return super().compute_position_bias(x[:1], *args, **kwargs)  # type: ignore[misc]


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of MPNet's."""
    parts = {path: stock[name] for path, name in _PARTS.items()}
    layer = stock.fused(_FusedLayer, "Layer", _LAYER, names=_NAMES, parts=parts)
    yield layer
    yield stock.fused(_FusedEncoder, "Encoder", _ENCODER, fused_layer=layer)
