"""ModernBERT: rotary positions, layers that see all and layers that see a window, gated feed-forward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import why_not_plain
from .calls import Call
from .layout import Layout, at
from .rotary import RotaryAdapter, RotaryModel, packed_tables
from .stock import Family, Replaced

_ARGUMENTS = "hidden_states attention_mask position_embeddings **kwargs"
_LAYER = {
    "ModernBertEncoderLayer": f"{_ARGUMENTS}: attn attn_norm mlp mlp_norm",
    "ModernBertAttention attn": f"{_ARGUMENTS}: Wo Wqkv apply_rotary_pos_emb attention_dropout head_dim out_drop "
                                "sliding_window",
    "ModernBertMLP mlp": "hidden_states: Wi Wo act drop",
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim: float rotate_half",
    "rotate_half": "x: cat",
}  # fmt: skip
_MODEL = {
    "ModernBertModel": "input_ids attention_mask position_ids **kwargs: attention_type create_bidirectional_mask "
                       "create_bidirectional_sliding_window_mask embeddings final_norm layer_types rotary_emb",
}  # fmt: skip


class _Adapter(RotaryAdapter):
    """Of ModernBERT's layers."""

    _layout = functools.partial(
        Layout, "attn", "Wqkv Wo", scale="", attention_dropout="attention_dropout", norm_first=True, gated=True,
        norm2="mlp_norm", weight1="mlp.Wi", activation="mlp.act", weight2="mlp.Wo", dropout_p="mlp.drop.p",
    )  # fmt: skip
    layout = _layout(norm1="attn_norm")
    first = _layout()

    def layout_of(self, layer: Any) -> Layout:
        return self.first if type(at(layer, "attn_norm")) is nn.Identity else self.layout

    def why_not_more(self, layer: Any) -> str:
        # The first layer has no norm of its own, and without dropout there is no module for it.
        pairs = (("attn_norm", nn.LayerNorm), ("attn.out_drop", nn.Dropout))
        modules = ((path, at(layer, path), kind) for path, kind in pairs)
        return why_not_plain(
            (path, module, nn.Identity if type(module) is nn.Identity else kind) for path, module, kind in modules
        )

    def options_of(self, layer: Any) -> dict[str, Any]:
        options, out_drop = super().options_of(layer), at(layer, "attn.out_drop")
        if type(out_drop) is nn.Dropout and out_drop.training:
            options["dropout1_p"] = out_drop.p
        return options

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        tables, mask = given["position_embeddings"], given.get("attention_mask")
        if call is None:
            return {"rotary": tables, "attn_mask": mask}
        packing, size = call.packing, at(layer, "attn").sliding_window
        if packing is not None:
            tables, mask = packed_tables(tables, call, layer.attention_type), None
        if size is None:
            return {"rotary": tables, "attn_mask": mask}
        if x.is_cuda:
            return {"rotary": tables, "attn_mask": mask, "window": (size - 1, size - 1)}
        # Elsewhere torch's attention is faster with a mask than ours with a window.
        length = x.shape[1] if packing is None else packing.max_length
        if ("band", size) not in call.shared and length > size:
            every = torch.ones(length, length, dtype=torch.bool, device=x.device)
            call.shared["band", size] = every.tril(size - 1).triu(1 - size)
        return {"rotary": tables, "attn_mask": call.shared.get(("band", size))}


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


def _for_all(mask: Tensor | None) -> dict[str, Tensor | None]:
    """The same mask for layers of either kind."""
    return {"full_attention": mask, "sliding_attention": mask}


FAMILIES = {
    "modernbert": Family("", (
        Replaced("ModernBertEncoderLayer", _Adapter, _LAYER),
        Replaced("ModernBertModel", _FusedModel, _MODEL, "ModernBertEncoderLayer"),
    )),
}  # fmt: skip
