"""Nomic BERT: post-norm, rotary positions, gated feed-forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from ..packing import PaddedPacking
from .calls import Call
from .eurobert import ATTENTION, MLP, PROJECTIONS, options
from .layers import FusedLayer, at, rate
from .rotary import ROTARY, RotaryAdapter, RotaryModel
from .stock import Stock

FAMILIES = {"nomic_bert": ""}

_LAYER = {
    "NomicBertLayer": "hidden_states attention_mask position_embeddings **kwargs: mlp post_attention_dropout "
                      "post_attention_layernorm post_mlp_dropout post_mlp_layernorm self_attn",
    "NomicBertAttention": f"hidden_states attention_mask position_embeddings **kwargs: {ATTENTION}",
    "NomicBertMLP": MLP,
    **ROTARY,
}  # fmt: skip
_MODEL = {
    "NomicBertModel": "input_ids attention_mask token_type_ids position_ids **kwargs: BaseModelOutputWithPooling "
                      "create_bidirectional_mask embeddings num_hidden_layers pooler rotary_emb",
}  # fmt: skip


class _Adapter(RotaryAdapter):
    """Of Nomic BERT's layers."""

    weights: ClassVar = {**PROJECTIONS, "norm1": "post_attention_layernorm", "norm2": "post_mlp_layernorm"}
    attention = "self_attn"
    dropouts = ("post_attention_dropout", "post_mlp_dropout")

    def options_of(self, layer: Any) -> dict[str, Any]:
        return options(layer) | {
            "eps1": at(layer, "post_attention_layernorm").eps, "eps2": at(layer, "post_mlp_layernorm").eps,
            "dropout1_p": rate(layer, "post_attention_dropout"), "dropout2_p": rate(layer, "post_mlp_dropout"),
        }  # fmt: skip


class _FusedModel(RotaryModel):
    """Nomic BERT; mixed into a subclass of it."""

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        call = super()._call(packing, inputs, given)
        if self._modules.get("pooler") is not None:  # it pools before the model's end
            call.last = list(self.layers_of(self))[-1]
        return call

    @classmethod
    def layers_of(cls, encoder: Any) -> Iterable[Any]:
        return encoder._modules["layers"][: encoder.config.num_hidden_layers]  # type: ignore[no-any-return]


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of Nomic BERT's."""
    parts = {"self_attn": stock["NomicBertAttention"], "mlp": stock["NomicBertMLP"]}
    layer = stock.fused(FusedLayer, "NomicBertLayer", _LAYER, adapter=_Adapter(parts))
    yield layer
    yield stock.fused(_FusedModel, "NomicBertModel", _MODEL, fused_layer=layer)
