"""The encoders of T5 and mT5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..kernels.common.backend import would_use_triton
from ..packing import PaddedPacking
from .calls import Call
from .encoders import PaddingFree
from .layers import Adapter, FusedLayer, activation, at, rate
from .stock import Stock

FAMILIES = {"t5": "T5", "mt5": "MT5"}
"""Model types of transformers and the prefix of their classes. Their layers are the same but for the name."""

_DENSE = "layer.1.DenseReluDense"
_BLOCK = {
    "Block": "hidden_states attention_mask position_bias **kwargs: any clamp finfo float16 isinf layer max where",
    "LayerSelfAttention": "hidden_states attention_mask position_bias **kwargs: SelfAttention dropout layer_norm",
    "Attention": "hidden_states mask position_bias **kwargs: compute_bias dropout gradient_checkpointing "
                 "has_relative_attention_bias k key_value_proj_dim n_heads o q requires_grad scaling v",
    "Attention.compute_bias": "query_length key_length device past_seen_tokens: _relative_position_bucket weight "
                              "relative_attention_bias relative_attention_max_distance relative_attention_num_buckets",
    "Attention._relative_position_bucket": "relative_position bidirectional num_buckets max_distance: "
                                           "abs float full_like log math min where zeros_like",
    "LayerNorm": "hidden_states: bfloat16 float16 float32 mean pow rsqrt variance_epsilon weight",
    "LayerFF": "hidden_states: DenseReluDense dropout layer_norm",
    "DenseActDense": "hidden_states: act dropout int8 weight wi wo",
    "DenseGatedActDense": "hidden_states: act dropout int8 weight wi_0 wi_1 wo",
}  # fmt: skip
_STACK = {
    "Stack": "input_ids attention_mask **kwargs: "
             "block create_bidirectional_mask create_causal_mask dropout embed_tokens final_layer_norm",
}  # fmt: skip


class _Adapter(Adapter):
    """Of the blocks of T5's encoder."""

    weights: ClassVar = {
        "in_proj": "layer.0.SelfAttention.q", "k_proj": "layer.0.SelfAttention.k", "v_proj": "layer.0.SelfAttention.v",
        "out_proj": "layer.0.SelfAttention.o", "norm1": "layer.0.layer_norm", "weight1": f"{_DENSE}.wi",
        "weight2": f"{_DENSE}.wo", "norm2": "layer.1.layer_norm",
    }  # fmt: skip
    attention = "layer.0.SelfAttention"
    dropouts = ("layer.0.dropout", "layer.1.dropout", f"{_DENSE}.dropout")
    served = frozenset({"hidden_states", "attention_mask", "position_bias"})

    def head_dim_of(self, layer: Any) -> int:
        return at(layer, self.attention).key_value_proj_dim  # type: ignore[no-any-return]

    def weights_of(self, layer: Any) -> Any:
        if "wi_0" not in at(layer, _DENSE)._modules:
            return self.weights
        return {**self.weights, "weight1": f"{_DENSE}.wi_0", "up": f"{_DENSE}.wi_1"}

    def why_not_parts(self, layer: Any) -> str:
        return "a decoder block" if layer.is_decoder else super().why_not_parts(layer)

    def why_not_more(self, layer: Any) -> str:
        places = self.weights_of(layer)
        products = [at(layer, places[name]) for name in ("weight1", "up", "weight2", "out_proj") if name in places]
        dtypes = {getattr(getattr(module, "weight", None), "dtype", None) for module in products}
        if torch.float16 in dtypes:
            return "float16 hidden states are clamped between the parts"
        return "the weights are of several dtypes" if len(dtypes) > 1 else ""

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention, dense = at(layer, self.attention), at(layer, _DENSE)
        return {
            "norm_first": True, "norm": "rms", "gated": "wi_0" in dense._modules, "scale": attention.scaling,
            "activation": activation(dense.act), "eps1": at(layer, "layer.0.layer_norm").variance_epsilon,
            "eps2": at(layer, "layer.1.layer_norm").variance_epsilon,
            "attn_dropout_p": attention.dropout if attention.training else 0.0,
            "dropout1_p": rate(layer, "layer.0.dropout"), "dropout_p": rate(dense, "dropout"),
            "dropout2_p": rate(layer, "layer.1.dropout"),
        }  # fmt: skip

    def serves(self, layer: Any, given: dict[str, Any]) -> bool:
        return given.get("position_bias") is not None or at(layer, self.attention).has_relative_attention_bias

    def options_of_call(self, layer: Any, x: Tensor, given: dict[str, Any], call: Call | None) -> dict[str, Any]:
        if given.get("position_bias") is None:
            given["position_bias"] = _position_bias(at(layer, self.attention), x, call)
        packed = call is not None and call.packing is not None
        return _bias_and_mask(given["position_bias"], None if packed else given.get("attention_mask"))

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


def _bias_and_mask(bias: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    """The two as arguments of attention."""
    if bias.dim() == 2:
        return {"relative_bias": bias, "attn_mask": mask}
    if mask is None:
        return {"attn_mask": bias}
    return {
        "attn_mask": torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
    }


class _FusedStack(PaddingFree):
    """T5's encoder; mixed into a subclass of the family's own stack."""

    layer_list = "block"
    by_distance = True

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why a stack cannot run fused, or ""."""
        return "a decoder" if encoder.is_decoder else super().why_not_fused(encoder)


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    parts = {
        "layer.0": stock["LayerSelfAttention"], "layer.0.SelfAttention": stock["Attention"],
        "layer.1": stock["LayerFF"], _DENSE: (stock["DenseActDense"], stock["DenseGatedActDense"]),
    }  # fmt: skip
    block = stock.fused(FusedLayer, "Block", _BLOCK, adapter=_Adapter(parts, stock["LayerNorm"]))
    yield block
    yield stock.fused(_FusedStack, "Stack", _STACK, fused_layer=block)
