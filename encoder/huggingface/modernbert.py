"""ModernBERT: rotary positions, layers that see all and layers that see a window, gated feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..modules import why_not_plain
from ..packing import PaddedPacking
from .calls import Call
from .layers import FusedLayer, activation, at, rate
from .rotary import RotaryAdapter, RotaryCall, RotaryModel
from .stock import Stock

FAMILIES = {"modernbert": ""}

_LAYER = {
    "ModernBertEncoderLayer": "hidden_states attention_mask position_embeddings **kwargs: attn attn_norm mlp mlp_norm",
    "ModernBertAttention": "hidden_states position_embeddings attention_mask **kwargs: "
                           "Wo Wqkv apply_rotary_pos_emb attention_dropout head_dim out_drop sliding_window",
    "ModernBertMLP": "hidden_states: Wi Wo act drop",
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim: float rotate_half",
    "rotate_half": "x: cat",
}  # fmt: skip
_MODEL = {
    "ModernBertModel": "input_ids attention_mask position_ids **kwargs: attention_type create_bidirectional_mask "
                       "create_bidirectional_sliding_window_mask embeddings final_norm layer_types rotary_emb",
}  # fmt: skip


class _Call(RotaryCall):
    """The band of a window too."""

    def __init__(self, packing: PaddedPacking | None) -> None:
        super().__init__(packing)
        self._bands: dict[int, Tensor] = {}

    def band(self, reach: int, x: Tensor) -> Tensor | None:
        """Which keys are no farther than `reach` tokens from a query, bool ``[L, L]``; None if all are."""
        length = x.shape[1] if self.packing is None else self.packing.max_length
        if length <= reach + 1:
            return None
        if reach not in self._bands:
            every = torch.ones(length, length, dtype=torch.bool, device=x.device)
            self._bands[reach] = every.tril(reach).triu(-reach)
        return self._bands[reach]


class _Adapter(RotaryAdapter):
    """Of ModernBERT's layers."""

    weights: ClassVar = {
        "in_proj": "attn.Wqkv", "out_proj": "attn.Wo", "norm1": "attn_norm", "weight1": "mlp.Wi", "weight2": "mlp.Wo",
        "norm2": "mlp_norm",
    }  # fmt: skip
    attention = "attn"
    dropouts = ("mlp.drop",)

    def weights_of(self, layer: Any) -> dict[str, str]:
        places = dict(self.weights)
        if type(at(layer, "attn_norm")) is nn.Identity:
            del places["norm1"]
        return places

    def why_not_more(self, layer: Any) -> str:
        # The first layer has no norm of its own, and without dropout there is no module for it.
        pairs = (("attn_norm", nn.LayerNorm), ("attn.out_drop", nn.Dropout))
        modules = ((path, at(layer, path), kind) for path, kind in pairs)
        return why_not_plain(
            (path, module, nn.Identity if type(module) is nn.Identity else kind) for path, module, kind in modules
        )

    def options_of(self, layer: Any) -> dict[str, Any]:
        attn, mlp, first = at(layer, "attn"), at(layer, "mlp"), at(layer, "attn_norm")
        plain, out_drop = type(first) is nn.Identity, at(attn, "out_drop")
        return {
            "norm_first": True, "no_norm1": plain, "gated": True, "activation": activation(mlp.act),
            "eps1": 0.0 if plain else first.eps, "eps2": at(layer, "mlp_norm").eps,
            "attn_dropout_p": attn.attention_dropout if attn.training else 0.0,
            "dropout1_p": out_drop.p if type(out_drop) is nn.Dropout and out_drop.training else 0.0,
            "dropout_p": rate(mlp, "drop"),
        }  # fmt: skip

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        tables, mask = given["position_embeddings"], given.get("attention_mask")
        if not isinstance(call, _Call):
            return {"rotary": tables, "attn_mask": mask}
        size = at(layer, "attn").sliding_window
        reach = None if size is None else size - 1
        if call.packing is not None:
            tables, mask = call.tables(tables, layer.attention_type), None
        if reach is None:
            return {"rotary": tables, "attn_mask": mask}
        if x.is_cuda:
            return {"rotary": tables, "attn_mask": mask, "window": (reach, reach)}
        # Elsewhere torch's attention is faster with a mask than ours with a window.
        return {"rotary": tables, "attn_mask": call.band(reach, x)}


class _FusedModel(RotaryModel):
    """ModernBERT; mixed into a subclass of it."""

    by_distance = True
    served = frozenset({"input_ids", "attention_mask", "inputs_embeds", "position_ids"})

    def _plan(self, inputs: Tensor, given: dict[str, Any], flattened: dict[str, Any]) -> tuple[Any, Call] | None:
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.shape == inputs.shape[:2]):
            return None
        plan = super()._plan(inputs, given, flattened)
        if plan is None:
            return None
        mask, call = plan
        if call.packing is not None:
            return _for_all(None), call
        if not inputs.is_cuda:
            return None
        return _for_all(None if mask is None else mask.bool()[:, None, None]), call

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        return _Call(packing)


def _for_all(mask: Tensor | None) -> dict[str, Tensor | None]:
    """The same mask for layers of either kind."""
    return {"full_attention": mask, "sliding_attention": mask}


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of ModernBERT's."""
    parts = {"attn": stock["ModernBertAttention"], "mlp": stock["ModernBertMLP"]}
    layer = stock.fused(FusedLayer, "ModernBertEncoderLayer", _LAYER, adapter=_Adapter(parts))
    yield layer
    yield stock.fused(_FusedModel, "ModernBertModel", _MODEL, fused_layer=layer)
