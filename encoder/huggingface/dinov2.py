"""DINOv2, with registers and without: ViT's layers, and a factor for each channel of what they add."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from .layers import Adapter, FusedLayer, activation, at, parameters
from .stock import Stock
from .vit import ATTENTION

FAMILIES = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
"""Model types of transformers and the prefix of their classes. Their layers are the same but for the name."""

_LAYER = {
    "Layer": "hidden_states attention_mask **kwargs: "
             "attention drop_path layer_scale1 layer_scale2 mlp norm1 norm2",
    "LayerScale": "hidden_state: lambda1",
    "MLP": "hidden_states: activation_fn fc1 fc2",
    "SwiGLUFFN": "x: act_fn down_proj gate_proj up_proj",
    "Attention": ATTENTION,
}  # fmt: skip


class _Adapter(Adapter):
    """Of DINOv2's layers."""

    weights: ClassVar = {
        "in_proj": "attention.q_proj", "k_proj": "attention.k_proj", "v_proj": "attention.v_proj",
        "out_proj": "attention.o_proj", "norm1": "norm1", "weight1": "mlp.fc1", "weight2": "mlp.fc2", "norm2": "norm2",
    }  # fmt: skip
    attention = "attention"

    def weights_of(self, layer: Any) -> Any:
        if "gate_proj" not in at(layer, "mlp")._modules:
            return self.weights
        return {**self.weights, "weight1": "mlp.gate_proj", "up": "mlp.up_proj", "weight2": "mlp.down_proj"}

    def why_not_more(self, layer: Any) -> str:
        if type(at(layer, "drop_path")) is not nn.Identity:
            return "whole paths are dropped"
        return why_not_plain([("drop_path", at(layer, "drop_path"), nn.Identity)])

    def options_of(self, layer: Any) -> dict[str, Any]:
        attention, mlp = at(layer, "attention"), at(layer, "mlp")
        gated = "gate_proj" in mlp._modules
        return {
            "norm_first": True, "scale": attention.scaling, "gated": gated,
            "activation": activation(mlp.act_fn if gated else mlp.activation_fn),
            "eps1": at(layer, "norm1").eps, "eps2": at(layer, "norm2").eps,
            "attn_dropout_p": attention.attention_dropout if attention.training else 0.0,
        }  # fmt: skip

    def run(self, layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        weights, modules = parameters(layer, self.weights_of(layer))
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        for name, bias, scale in (("out_proj", "out_proj_bias", "layer_scale1"), ("weight2", "bias2", "layer_scale2")):
            factor = at(layer, scale).lambda1
            # Some factors are as small as 1e-5: their product with a weight would be none in float16.
            if name in modules or dtype == torch.float16:
                modules[name] = functools.partial(_scaled, at(layer, self.weights_of(layer)[name]), factor)
            else:
                field = name if name == "weight2" else f"{name}_weight"
                scaled = {field: getattr(weights, field) * factor[:, None], bias: getattr(weights, bias) * factor}
                weights = weights._replace(**scaled)
        nhead = weights.out_proj_weight.shape[1] // self.head_dim_of(layer)
        return kernels.encoder_layer(x, weights, nhead, modules=modules, **options)


def _scaled(linear: nn.Module, factor: Tensor, x: Tensor) -> Tensor:
    out: Tensor = linear(x) * factor
    return out


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    parts = {
        "attention": stock["Attention"], "mlp": (stock["MLP"], stock["SwiGLUFFN"]),
        "layer_scale1": stock["LayerScale"], "layer_scale2": stock["LayerScale"],
    }  # fmt: skip
    yield stock.fused(FusedLayer, "Layer", _LAYER, adapter=_Adapter(parts))
