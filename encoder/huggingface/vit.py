"""ViT, and DINOv2, with registers and without: ViT's layers, and a factor for each channel of what they add."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from .layers import Adapter
from .layout import Layout, at
from .stock import Family, Replaced

_LAYER = {
    "Layer": "attention dropout layernorm_after layernorm_before mlp",
    "Attention attention": "attention_dropout head_dim k_proj o_proj q_proj scaling v_proj",
    "MLP mlp": "hidden_states: activation_fn fc1 fc2",
}
_LAYER_OF_DINO = {
    **_LAYER,
    "Layer": "attention drop_path layer_scale1 layer_scale2 mlp norm1 norm2",
    "LayerScale layer_scale1 layer_scale2": "hidden_state: lambda1",
    "SwiGLUFFN mlp": "x: act_fn down_proj gate_proj up_proj",
}

_layout = functools.partial(
    Layout, "attention", "q_proj k_proj v_proj o_proj", attention_dropout="attention_dropout", norm_first=True
)
_MLP: dict[str, Any] = {"weight1": "mlp.fc1", "activation": "mlp.activation_fn", "weight2": "mlp.fc2"}
_GATED: dict[str, Any] = {
    "weight1": "mlp.gate_proj", "up": "mlp.up_proj", "activation": "mlp.act_fn", "weight2": "mlp.down_proj",
}  # fmt: skip


class _ViT(Adapter):
    """Of ViT's layers."""

    layout = _layout(
        **_MLP, norm1="layernorm_before", norm2="layernorm_after", dropout1_p="dropout.p", dropout2_p="dropout.p"
    )


class _Dino(Adapter):
    """Of DINOv2's layers."""

    layout, gated = (_layout(**mlp, norm1="norm1", norm2="norm2") for mlp in (_MLP, _GATED))

    def layout_of(self, layer: Any) -> Layout:
        return self.gated if "gate_proj" in at(layer, "mlp")._modules else self.layout

    def why_not_more(self, layer: Any) -> str:
        if type(at(layer, "drop_path")) is not nn.Identity:
            return "whole paths are dropped"
        return why_not_plain([("drop_path", at(layer, "drop_path"), nn.Identity)])

    def parameters(self, layer: Any) -> tuple[kernels.LayerWeights, dict[str, Any]]:
        """With the factors in the weights and biases of the products that they follow."""
        weights, modules = super().parameters(layer)
        dtype, device = weights.out_proj_weight.dtype, weights.out_proj_weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        for name, weight, bias, scale in (
            ("out_proj", "out_proj_weight", "out_proj_bias", "layer_scale1"),
            ("weight2", "weight2", "bias2", "layer_scale2"),
        ):
            factor = at(layer, scale).lambda1
            # Some factors are as small as 1e-5: their product with a weight would be none in float16.
            if name in modules or dtype == torch.float16:
                modules[name] = functools.partial(_scaled, at(layer, self.layout_of(layer).paths[name]), factor)
            else:
                scaled = {weight: getattr(weights, weight) * factor[:, None], bias: getattr(weights, bias) * factor}
                weights = weights._replace(**scaled)
        return weights, modules


def _scaled(linear: nn.Module, factor: Tensor, x: Tensor) -> Tensor:
    out: Tensor = linear(x) * factor
    return out


_OF_DINO = [Replaced("Layer", _Dino, _LAYER_OF_DINO)]
FAMILIES = {
    "vit": Family("ViT", [Replaced("Layer", _ViT, _LAYER)]),
    "dinov2": Family("Dinov2", _OF_DINO),
    "dinov2_with_registers": Family("Dinov2WithRegisters", _OF_DINO),
}
