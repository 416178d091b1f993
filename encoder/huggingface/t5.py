"""The encoders of T5 and mT5."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.common.backend import would_use_triton
from ..packing import PaddedPacking
from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter, bias_and_mask
from .layout import Layout, at
from .stock import Family, Replaced

_DENSE = "layer.1.DenseReluDense"
_ARGUMENTS = "hidden_states attention_mask position_bias **kwargs"
_BLOCK = {
    "Block": f"{_ARGUMENTS}: any clamp finfo float16 isinf layer max where",
    "LayerSelfAttention layer.0": f"{_ARGUMENTS}: SelfAttention dropout layer_norm",
    "Attention layer.0.SelfAttention":
        "hidden_states mask position_bias **kwargs: compute_bias dropout gradient_checkpointing "
        "has_relative_attention_bias k key_value_proj_dim n_heads o q requires_grad scaling v",
    "Attention.compute_bias":
        "query_length key_length device past_seen_tokens: _relative_position_bucket weight "
        "relative_attention_bias relative_attention_max_distance relative_attention_num_buckets",
    "Attention._relative_position_bucket":
        "relative_position bidirectional num_buckets max_distance: abs float full_like log math min where zeros_like",
    "LayerNorm": "hidden_states: bfloat16 float16 float32 mean pow rsqrt variance_epsilon weight",
    "LayerFF layer.1": "hidden_states: DenseReluDense dropout layer_norm",
    f"DenseActDense {_DENSE}": "hidden_states: act dropout int8 weight wi wo",
    f"DenseGatedActDense {_DENSE}": "hidden_states: act dropout int8 weight wi_0 wi_1 wo",
}  # fmt: skip
_STACK = {
    "Stack": "input_ids attention_mask **kwargs: "
             "block create_bidirectional_mask create_causal_mask dropout embed_tokens final_layer_norm",
}  # fmt: skip


class _Adapter(Adapter):
    """Of the blocks of T5's encoder."""

    _layout = functools.partial(
        Layout, "layer.0.SelfAttention", "q k v o", norm="rms", norm_first=True, norm1="layer.0.layer_norm",
        norm2="layer.1.layer_norm", activation=f"{_DENSE}.act", weight2=f"{_DENSE}.wo", dropout1_p="layer.0.dropout.p",
        dropout_p=f"{_DENSE}.dropout.p", dropout2_p="layer.1.dropout.p",
    )  # fmt: skip
    layout = _layout(weight1=f"{_DENSE}.wi")
    gated = _layout(weight1=f"{_DENSE}.wi_0", up=f"{_DENSE}.wi_1")
    norm = "LayerNorm"
    head_dim = "key_value_proj_dim"
    served = frozenset({"hidden_states", "attention_mask", "position_bias"})

    def layout_of(self, layer: Any) -> Layout:
        return self.gated if "wi_0" in at(layer, _DENSE)._modules else self.layout

    def why_not_parts(self, layer: Any) -> str:
        return "a decoder block" if layer.is_decoder else super().why_not_parts(layer)

    def why_not_more(self, layer: Any) -> str:
        paths = self.layout_of(layer).paths
        products = [at(layer, paths[name]) for name in ("weight1", "up", "weight2", "out_proj") if name in paths]
        dtypes = {getattr(getattr(module, "weight", None), "dtype", None) for module in products}
        if torch.float16 in dtypes:
            return "float16 hidden states are clamped between the parts"
        return "the weights are of several dtypes" if len(dtypes) > 1 else ""

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        return given.get("position_bias") is not None or at(layer, self.layout.attention).has_relative_attention_bias

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        if given.get("position_bias") is None:
            given["position_bias"] = _position_bias(at(layer, self.layout.attention), x, call)
        packed = call is not None and call.packing is not None
        return bias_and_mask(given["position_bias"], None if packed else given.get("attention_mask"))

    def results(self, out: Tensor, given: dict[str, Any]) -> Any:
        return out, given["position_bias"], None


def _position_bias(module: Any, x: Tensor, call: Call | None) -> Tensor:
    """The bias that all blocks share: by distance where kernels read that, else ``[1, H, L, L]``, as torch's do."""
    if call is not None and would_use_triton(x):
        table, reach = module.relative_attention_bias.weight, module.relative_attention_max_distance
        return kernels.t5_relative_bias(table, max_distance=reach)
    packing: PaddedPacking | None = None if call is None else call.packing
    length = x.shape[1] if packing is None else packing.max_length
    bias: Tensor = module.compute_bias(length, length, device=x.device)
    return bias


class _FusedStack(PaddingFree):
    """T5's encoder; mixed into a subclass of the family's own stack."""

    layer_list = "block"
    by_distance = True

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why a stack cannot run fused, or ""."""
        return "a decoder" if encoder.is_decoder else super().why_not_fused(encoder)


_REPLACED = (Replaced("Block", _Adapter, _BLOCK), Replaced("Stack", _FusedStack, _STACK, "Block"))
FAMILIES = {"t5": Family("T5", _REPLACED), "mt5": Family("MT5", _REPLACED)}
