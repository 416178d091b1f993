"""What families with rotary positions share: tables of the packed tokens, computed once a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..packing import PaddedPacking
from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter


class RotaryCall(Call):
    """What layers with the same tables share: the rows of these that the packed tokens take."""

    def __init__(self, packing: PaddedPacking | None) -> None:
        super().__init__(packing)
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def tables(self, position_embeddings: tuple[Tensor, Tensor], kind: Any = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables of a kind of layers: of packed tokens a row each, ``[T, D / 2]``, else as given."""
        packing = self.packing
        if packing is None:
            return position_embeddings
        if kind not in self._tables:
            batch = packing.shape[0]
            halves = (t[..., : t.shape[-1] // 2].expand(batch, -1, -1) for t in position_embeddings)
            cos, sin = (packing.pack(t).contiguous() for t in halves)
            self._tables[kind] = cos, sin
        return self._tables[kind]


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
            tables = given["position_embeddings"]
            options["rotary"] = call.tables(tables) if isinstance(call, RotaryCall) else tables
        return options


class RotaryModel(PaddingFree):
    """A model whose own forward computes the tables, and runs the layers."""

    layer_list = "layers"
    served = frozenset({"input_ids", "attention_mask", "inputs_embeds", "position_ids", "token_type_ids"})

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        return RotaryCall(packing)


ROTARY = {
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim: rotate_half",
    "rotate_half": "x: cat",
}
"""What these families' own functions are like."""
