"""MPNet: BERT with a bias of the distance of two tokens, which all layers share."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.common.backend import would_use_triton
from ..packing import PaddedPacking
from .bert import BertKind
from .calls import FLATTENED, Call, by_name, require_known
from .encoders import PaddingFreeStates, why_a_layer_is_not_fused
from .layers import bias_and_mask
from .layout import Layout
from .stock import Family, Replaced

_BUCKETS, _REACH = 32, 128  # MPNet's own, whatever the configuration says

_ARGUMENTS = "hidden_states attention_mask position_bias **kwargs"
_LAYER = {
    "Layer": f"{_ARGUMENTS}: attention intermediate output",
    "Attention attention": f"{_ARGUMENTS}: LayerNorm attn dropout",
    "SelfAttention attention.attn":
        f"{_ARGUMENTS}: all_head_size attention_head_size dropout k math matmul o q softmax sqrt v",
    "Intermediate intermediate": "hidden_states: dense intermediate_act_fn",
    "Output output": "hidden_states input_tensor: LayerNorm dense dropout",
}  # fmt: skip
_ENCODER = {
    "Encoder": "compute_position_bias layer",
    "Encoder.compute_position_bias": "x position_ids num_buckets: relative_attention_bias relative_position_bucket",
    "Encoder.relative_position_bucket":
        "relative_position num_buckets max_distance: abs float full_like log math min where",
}  # fmt: skip


class _Adapter(BertKind):
    """Of MPNet's layers."""

    layout = Layout(
        "attention.attn", "q k v o", scale="", attention_dropout="dropout.p", norm1="attention.LayerNorm",
        norm2="output.LayerNorm", weight1="intermediate.dense", activation="intermediate.intermediate_act_fn",
        weight2="output.dense", dropout1_p="attention.dropout.p", dropout2_p="output.dropout.p",
    )  # fmt: skip
    served = frozenset({"hidden_states", "attention_mask", "position_bias"})

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        mask = given.get("attention_mask")
        return mask is None or mask.dtype != torch.bool  # which MPNet would add as a number

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        bias: Any = given.get("position_bias")
        if call is not None:
            bias = call.shared.get("relative_bias", bias)
            if call.packing is not None and bias.dim() == 4:
                bias = bias[..., : call.packing.max_length, : call.packing.max_length]
        return bias_and_mask(bias, given.get("attention_mask"))

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        return (out,)


_flattened: ContextVar[dict[str, Any]] = ContextVar("flattened")
"""The arguments of a flattened batch on their way from the model, which does not hand them on, to its encoder."""


class _FusedModel(nn.Module):
    """MPNet, which keeps the arguments of a flattened batch for its encoder; mixed into a subclass of it."""

    fused_layer: ClassVar[Any]

    @classmethod
    def why_not_fused(cls, model: Any) -> str:
        """Why a model's encoder cannot run fused, or ""."""
        return why_a_layer_is_not_fused(model.encoder.layer, cls.fused_layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As MPNet's own."""
        given = by_name(self, args, kwargs)
        flattened = {name: given.pop(name) for name in FLATTENED if given.get(name) is not None}
        if not flattened:
            return super().forward(**given)
        if not isinstance(self.encoder, _FusedEncoder):
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


FAMILIES = {
    "mpnet": Family("MPNet", (
        Replaced("Layer", _Adapter, _LAYER),
        Replaced("Encoder", _FusedEncoder, _ENCODER, "Layer"),
        Replaced("Model", _FusedModel, {}, "Layer"),
    )),
}  # fmt: skip
