"""MPNet: BERT with a bias of the distance of two tokens, which all layers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.common.backend import would_use_triton
from ..packing import PaddedPacking
from .bert import BertKind
from .calls import FLATTENED, Call, by_name, require_known
from .encoders import PaddingFreeStates
from .layers import FusedLayer, activation, at, rate
from .stock import Stock

FAMILIES = {"mpnet": "MPNet"}

_BUCKETS, _REACH = 32, 128  # MPNet's own, whatever the configuration says

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


class _Adapter(BertKind):
    """Of MPNet's layers."""

    weights: ClassVar = {
        "in_proj": "attention.attn.q", "k_proj": "attention.attn.k", "v_proj": "attention.attn.v",
        "out_proj": "attention.attn.o", "norm1": "attention.LayerNorm", "weight1": "intermediate.dense",
        "weight2": "output.dense", "norm2": "output.LayerNorm",
    }  # fmt: skip
    attention = "attention.attn"
    dropouts = ("attention.attn.dropout", "attention.dropout", "output.dropout")
    served = frozenset({"hidden_states", "attention_mask", "position_bias"})

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention = at(layer, "attention")
        return {
            "activation": activation(at(layer, "intermediate").intermediate_act_fn),
            "eps1": at(attention, "LayerNorm").eps, "eps2": at(layer, "output.LayerNorm").eps,
            "attn_dropout_p": rate(attention, "attn.dropout"), "dropout1_p": rate(attention, "dropout"),
            "dropout2_p": rate(layer, "output.dropout"),
        }  # fmt: skip

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        mask = given.get("attention_mask")
        return mask is None or mask.dtype != torch.bool  # which MPNet would add as a number

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        mask, bias = given.get("attention_mask"), given.get("position_bias")
        by_distance = None if call is None else call.shared.get("relative_bias")
        if by_distance is not None:
            return {"attn_mask": mask, "relative_bias": by_distance}
        if call is not None and call.packing is not None:
            assert bias is not None
            return {"attn_mask": bias[..., : call.packing.max_length, : call.packing.max_length]}
        return {"attn_mask": bias + mask if bias is not None and mask is not None else mask if bias is None else bias}

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        return (out,)


_flattened: ContextVar[dict[str, Any]] = ContextVar("flattened")
"""The arguments of a flattened batch on their way from the model, which does not hand them on, to its encoder."""


class _FusedModel(nn.Module):
    """MPNet, which keeps the arguments of a flattened batch for its encoder; mixed into a subclass of it."""

    fused_encoder: ClassVar[Any]

    @classmethod
    def why_not_fused(cls, model: Any) -> str:
        """Why a model's encoder cannot run fused, or ""."""
        return cls.fused_encoder.why_not_fused(model.encoder)  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As MPNet's own."""
        given = by_name(self, args, kwargs)
        flattened = {name: given.pop(name) for name in FLATTENED if given.get(name) is not None}
        if not flattened:
            return super().forward(**given)
        if not isinstance(self.encoder, self.fused_encoder):
            require_known(flattened, None)
        token = _flattened.set(flattened)
        try:
            return super().forward(**given)
        finally:
            _flattened.reset(token)


class _FusedEncoder(PaddingFreeStates):
    """MPNet's encoder; mixed into a subclass of it."""

    by_distance = True

    def _flattened(self, given: dict[str, Any]) -> dict[str, Any]:
        return {} if torch.compiler.is_compiling() else _flattened.get({})

    def _plan(self, inputs: Tensor, given: dict[str, Any], flattened: dict[str, Any]) -> tuple[Any, Call] | None:
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            return None
        return super()._plan(inputs, given, flattened)

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        table: Any = self._modules["relative_attention_bias"].weight  # type: ignore[union-attr]
        if not would_use_triton(inputs) or table.shape[0] < _BUCKETS:
            return Call(packing)
        return Call(packing, relative_bias=kernels.t5_relative_bias(table[:_BUCKETS], max_distance=_REACH))

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The position bias, ``[1, H, L, L]``: that of one sequence, since all are alike."""
        return super().compute_position_bias(x[:1], *args, **kwargs)  # type: ignore[misc]


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of MPNet's."""
    parts = {path: stock[name] for path, name in _PARTS.items()}
    layer = stock.fused(FusedLayer, "Layer", _LAYER, adapter=_Adapter(parts))
    yield layer
    encoder = stock.fused(_FusedEncoder, "Encoder", _ENCODER, fused_layer=layer)
    yield encoder
    yield stock.fused(_FusedModel, "Model", {}, fused_layer=layer, fused_encoder=encoder)
