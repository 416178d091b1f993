"""What families with rotary positions share: tables of the packed tokens, computed once a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter

ROTARY = {
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim: rotate_half",
    "rotate_half": "x: cat",
}
"""What these families' own functions are like."""


def packed_tables(tables: tuple[Tensor, Tensor], call: Call | None, kind: Any = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of a kind of layers: of packed tokens a row each, ``[T, D / 2]``, else as given."""
    if call is None or call.packing is None:
        return tables
    if ("tables", kind) not in call.shared:
        halves = (t[..., : t.shape[-1] // 2].expand(call.packing.shape[0], -1, -1) for t in tables)
        cos, sin = (call.packing.pack(t).contiguous() for t in halves)
        call.shared["tables", kind] = cos, sin
    return call.shared["tables", kind]


class RotaryAdapter(Adapter):
    """Of layers that are given cosine and sine tables, all the same ones."""

    served = frozenset({"hidden_states", "attention_mask", "position_embeddings"})

    def rotates(self, layer: Any) -> bool:
        """Whether a layer uses the tables."""
        return True

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        return not self.rotates(layer) or given.get("position_embeddings") is not None

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        options = super().options_of_call(layer, x, given, call)
        if self.rotates(layer):
            options["rotary"] = packed_tables(given["position_embeddings"], call)
        return options


class RotaryModel(PaddingFree):
    """A model whose own forward computes the tables, and runs the layers."""

    layer_list = "layers"
    served = frozenset({"input_ids", "attention_mask", "inputs_embeds", "position_ids", "token_type_ids"})
