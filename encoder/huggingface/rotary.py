"""Rotary positions: EuroBERT (pre-norm, RMSNorm, fewer heads of key and value), Nomic BERT (post-norm), and what these
share with ModernBERT and ESM."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..packing import PaddedPacking
from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter
from .layout import Layout
from .stock import Family, Replaced

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


_ATTENTION = (
    "hidden_states position_embeddings attention_mask **kwargs: "
    "apply_rotary_pos_emb attention_dropout head_dim k_proj o_proj q_proj scaling v_proj"
)
_MLP = "x: act_fn down_proj gate_proj up_proj"
_LAYER = {
    "EuroBertDecoderLayer": "hidden_states attention_mask position_ids position_embeddings **kwargs: "
                            "input_layernorm mlp post_attention_layernorm self_attn",
    "EuroBertAttention self_attn": _ATTENTION,
    "EuroBertMLP mlp": _MLP,
    "EuroBertRMSNorm": "hidden_states: float32 mean pow rsqrt variance_epsilon weight",
    **ROTARY,
}  # fmt: skip
_MODEL = {
    "EuroBertModel": "input_ids attention_mask position_ids **kwargs: create_bidirectional_mask embed_tokens norm "
                     "num_hidden_layers rotary_emb",
}  # fmt: skip
_LAYER_OF_NOMIC = {
    "NomicBertLayer": "hidden_states attention_mask position_embeddings **kwargs: mlp post_attention_dropout "
                      "post_attention_layernorm post_mlp_dropout post_mlp_layernorm self_attn",
    "NomicBertAttention self_attn": _ATTENTION,
    "NomicBertMLP mlp": _MLP,
    **ROTARY,
}  # fmt: skip
_MODEL_OF_NOMIC = {
    "NomicBertModel": "input_ids attention_mask token_type_ids position_ids **kwargs: BaseModelOutputWithPooling "
                      "create_bidirectional_mask embeddings num_hidden_layers pooler rotary_emb",
}  # fmt: skip

_layout = functools.partial(
    Layout, "self_attn", "q_proj k_proj v_proj o_proj", attention_dropout="attention_dropout", weight1="mlp.gate_proj",
    up="mlp.up_proj", activation="mlp.act_fn", weight2="mlp.down_proj",
)  # fmt: skip


class _EuroBert(RotaryAdapter):
    """Of EuroBERT's layers."""

    layout = _layout(norm="rms", norm_first=True, norm1="input_layernorm", norm2="post_attention_layernorm")
    norm = "EuroBertRMSNorm"


class _NomicBert(RotaryAdapter):
    """Of Nomic BERT's layers."""

    layout = _layout(
        norm1="post_attention_layernorm", norm2="post_mlp_layernorm", dropout1_p="post_attention_dropout.p",
        dropout2_p="post_mlp_dropout.p",
    )  # fmt: skip


class _FusedNomicBert(RotaryModel):
    """Nomic BERT; mixed into a subclass of it."""

    def _call(self, packing: PaddedPacking | None, inputs: Tensor, given: dict[str, Any]) -> Call:
        call = super()._call(packing, inputs, given)
        if self._modules.get("pooler") is not None:  # it pools before the model's end
            call.last = list(self.layers_of(self))[-1]
        return call

    @classmethod
    def layers_of(cls, encoder: Any) -> Iterable[Any]:
        return encoder._modules["layers"][: encoder.config.num_hidden_layers]


FAMILIES = {
    "eurobert": Family("", (
        Replaced("EuroBertDecoderLayer", _EuroBert, _LAYER),
        Replaced("EuroBertModel", RotaryModel, _MODEL, "EuroBertDecoderLayer"),
    )),
    "nomic_bert": Family("", (
        Replaced("NomicBertLayer", _NomicBert, _LAYER_OF_NOMIC),
        Replaced("NomicBertModel", _FusedNomicBert, _MODEL_OF_NOMIC, "NomicBertLayer"),
    )),
}  # fmt: skip
