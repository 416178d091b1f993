"""GPT-2: causal, pre-norm, weights the other way round. In a call that fills or reads a cache the stock blocks run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..packing import FlattenedPacking, PaddedPacking
from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter
from .layout import Layout, at
from .stock import Family, Replaced

_BLOCK = {
    "Block": "attn ln_1 ln_2 ln_cross_attn mlp",
    "Attention attn": "_upcast_and_reordered_attn attn_dropout c_attn c_proj head_dim q_attn reorder_and_upcast_attn "
                      "resid_dropout scaling split split_size",
    "MLP mlp": "hidden_states: act c_fc c_proj dropout",
}  # fmt: skip
_MODEL = {
    "Model": "input_ids attention_mask token_type_ids position_ids **kwargs: add_cross_attention "
             "create_bidirectional_mask create_causal_mask drop gradient_checkpointing h ln_f ndim pop "
             "warn_if_padding_and_no_attention_mask wpe wte",
}  # fmt: skip


class _Adapter(Adapter):
    """Of GPT-2's blocks."""

    layout = Layout(
        "attn", "c_attn c_proj", attention_dropout="attn_dropout", norm_first=True, norm1="ln_1", norm2="ln_2",
        weight1="mlp.c_fc", activation="mlp.act", weight2="mlp.c_proj", dropout1_p="attn.resid_dropout.p",
        dropout2_p="mlp.dropout.p",
    )  # fmt: skip

    def why_not_more(self, layer: Any) -> str:
        if "crossattention" in layer._modules:
            return "it has cross-attention"
        return "attention is reordered and upcast" if at(layer, "attn").reorder_and_upcast_attn else ""


class _FusedModel(PaddingFree):
    """GPT-2; mixed into a subclass of it."""

    layer_list = "h"
    served = frozenset({"input_ids", "attention_mask", "inputs_embeds", "position_ids", "token_type_ids"})

    def _plan(self, inputs: Tensor, given: dict[str, Any], flattened: dict[str, Any]) -> tuple[Any, Call] | None:
        bidirectional = not getattr(self.config, "is_causal", True)
        plan = None if bidirectional or self._uses_cache(given) else super()._plan(inputs, given, flattened)
        if plan is not None and plan[1].packing is None:  # without a mask GPT-2 looks for padding among the ids
            return given.get("attention_mask"), plan[1]
        return plan

    def _uses_cache(self, given: dict[str, Any]) -> bool:
        asked: Any = given.get("use_cache")
        return bool(self.config.use_cache if asked is None else asked)  # type: ignore[union-attr]

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        call = Call(packing, is_causal=True)
        call.last = list(self.layers_of(self))[-1]
        return call

    def _prepare(self, given: dict[str, Any], call: Call, is_flattened: bool) -> None:
        if call.packing is None:
            return
        if isinstance(call.packing, FlattenedPacking) and given.get("position_ids") is None:
            given["position_ids"] = call.packing.positions()[None]
        # A mask of four dimensions is handed on as it is: none of T x T is made of the positions. No block reads it.
        given["attention_mask"] = call.packing.indices.new_zeros(1, 1, 1, 1)

    def _for_stock(self, given: dict[str, Any], flattened: dict[str, Any]) -> dict[str, Any]:
        """transformers makes a mask of positions that restart, unless there is another mask or a cache."""
        way = self.config._attn_implementation  # type: ignore[union-attr]
        masked = given.get("position_ids") is not None and given.get("attention_mask") is None
        if masked and way in ("eager", "sdpa") and not self._uses_cache(given):
            return {}
        return super()._for_stock(given, flattened)


FAMILIES = {
    "gpt2": Family("GPT2", (Replaced("Block", _Adapter, _BLOCK), Replaced("Model", _FusedModel, _MODEL, "Block"))),
}
