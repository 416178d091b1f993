"""BERT and the families whose layers are the same but for the name."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.attention.eager import MAX_HEAD_DIM
from ..modules import has_hooks, why_not_plain
from ..packing import PaddedPacking, attend
from .common import ACTIVATIONS, CAPTURE, collected, fused_class

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
}
"""Module names of transformers and the prefix of their classes. Their layers are the same but for the name."""

_PARTS = ("Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
_PROJECTIONS = ("query", "key", "value")


class _FusedLayer(nn.Module):
    """A BERT layer on the fused kernels; mixed into a subclass of the family's own layer."""

    stock: ClassVar[dict[str, type]]
    """The family's own classes of the parts that the fused forward stands in for, by the end of their names."""

    @classmethod
    def why_not_fused(cls, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        if layer.is_decoder or layer.add_cross_attention:
            return "a decoder layer"
        if layer.chunk_size_feed_forward:
            return "the feed-forward is chunked"
        attention, output, intermediate = (layer._modules[name] for name in ("attention", "output", "intermediate"))
        attention_self, attention_output = attention._modules["self"], attention._modules["output"]
        holders = [
            ("attention", attention, cls.stock["Attention"]),
            ("attention.self", attention_self, cls.stock["SelfAttention"]),
            ("attention.output", attention_output, cls.stock["SelfOutput"]),
            ("intermediate", intermediate, cls.stock["Intermediate"]),
            ("output", output, cls.stock["Output"]),
        ]
        reason = why_not_plain(holders, except_of=CAPTURE)
        if reason:
            return reason
        if type(intermediate.intermediate_act_fn) not in ACTIVATIONS:
            return f"activation {intermediate.intermediate_act_fn} is not fused"
        if attention_self.attention_head_size > MAX_HEAD_DIM:
            return f"the head size is above {MAX_HEAD_DIM}"
        return why_not_plain(
            [
                *((f"attention.self.{name}", attention_self._modules[name], nn.Linear) for name in _PROJECTIONS),
                ("attention.self.dropout", attention_self._modules["dropout"], nn.Dropout),
                ("attention.output.dense", attention_output._modules["dense"], nn.Linear),
                ("attention.output.dropout", attention_output._modules["dropout"], nn.Dropout),
                ("attention.output.LayerNorm", attention_output._modules["LayerNorm"], nn.LayerNorm),
                ("intermediate.dense", intermediate._modules["dense"], nn.Linear),
                ("output.dense", output._modules["dense"], nn.Linear),
                ("output.dropout", output._modules["dropout"], nn.Dropout),
                ("output.LayerNorm", output._modules["LayerNorm"], nn.LayerNorm),
            ]
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any,
        packing: PaddedPacking | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """As the family's own layer; with `packing`, on packed tokens ``[T, width]`` without a mask."""
        if packing is None and self._why_not_now(hidden_states, attention_mask, args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        parts: Any = self._modules
        attention, intermediate, output = parts["attention"], parts["intermediate"], parts["output"]
        attended = self._attention(attention._modules["self"], hidden_states, attention_mask, packing)
        out = attention._modules["output"]
        x = _add_norm(out._modules["dense"](attended), hidden_states, out)
        up, down = intermediate._modules["dense"], output._modules["dense"]
        activation = ACTIVATIONS[type(intermediate.intermediate_act_fn)]
        x2 = kernels.ffn(x, up.weight, up.bias, down.weight, down.bias, activation=activation)
        return _add_norm(x2, x, output)

    def _why_not_now(self, hidden_states: Tensor, attention_mask: Tensor | None, args: Any, kwargs: Any) -> bool:
        """True if this call asks for something the fused forward does not do."""
        if any(a is not None for a in args) or kwargs.get("past_key_values") is not None:
            return True
        if kwargs.get("encoder_hidden_states") is not None or kwargs.get("encoder_attention_mask") is not None:
            return True
        if attention_mask is not None and attention_mask.dim() != 4:  # flash and flex attention have masks of their own
            return True
        if "attentions" in collected():
            return True
        parts: Any = self._modules
        norms = (parts["attention"]._modules["output"], parts["output"])
        if any(norm._modules["LayerNorm"].weight.dtype != hidden_states.dtype for norm in norms) and (
            not torch.is_autocast_enabled(hidden_states.device.type)  # under it every norm is float32
        ):
            return True
        return bool(self.why_not_fused(self))

    @staticmethod
    def _attention(module: Any, x: Tensor, attention_mask: Tensor | None, packing: PaddedPacking | None) -> Tensor:
        heads = (module.num_attention_heads, module.attention_head_size)
        parts = module._modules
        query, key, value = (parts[name](x).unflatten(-1, heads) for name in _PROJECTIONS)
        dropout_p = parts["dropout"].p if module.training else 0.0
        if packing is not None:
            out = packing.attend(query, key, value, dropout_p=dropout_p, scale=module.scaling)
        else:
            out = attend(query, key, value, attn_mask=attention_mask, dropout_p=dropout_p, scale=module.scaling)
        return out.flatten(-2)


def _add_norm(x: Tensor, residual: Tensor, output: Any) -> Tensor:
    """The dropout and normalisation of a family's ``*SelfOutput`` or ``*Output`` module."""
    norm, dropout = output._modules["LayerNorm"], output._modules["dropout"]
    return kernels.add_norm(
        x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout.p, training=dropout.training
    )


class _FusedEncoder(nn.Module):
    """A BERT encoder that leaves padding out on the CPU; mixed into a subclass of the family's own encoder."""

    fused_layer: ClassVar[type]

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why an encoder cannot run fused, or "": it needs each of its layers fused."""
        for layer in encoder.layer:
            if not issubclass(cls.fused_layer, type(layer)):
                return f"{type(layer).__name__} is not a layer that is fused"
            reason = cls.fused_layer.why_not_fused(layer)  # type: ignore[attr-defined]
            if reason:
                return str(reason)
        return ""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the family's own encoder."""
        keep = self._padding(hidden_states, attention_mask, args, kwargs)
        if keep is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        packing = PaddedPacking(keep)
        out = super().forward(packing.pack(hidden_states), None, *args, **kwargs, packing=packing)
        out.last_hidden_state = packing.unpack(out.last_hidden_state)
        return out

    def _padding(self, x: Tensor, attention_mask: Tensor | None, args: Any, kwargs: Any) -> Tensor | None:
        """Which tokens are real, bool ``[B, L]``, if this call can and should leave the others out, else None.

        On a GPU the number of tokens would have to be waited for; a compiled or traced graph would keep this batch's.
        """
        if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.dim() != 4:
            return None
        if not x.is_cpu or x.dim() != 3 or torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return None
        batch, length = x.shape[:2]
        if attention_mask.shape[1:] != (1, length, length) or attention_mask.shape[0] != batch:
            return None
        if any(a is not None for a in args) or any(
            kwargs.get(name) is not None
            for name in ("past_key_values", "encoder_hidden_states", "encoder_attention_mask")
        ):
            return None
        keep = attention_mask[:, 0, 0]
        if attention_mask.stride(2) != 0 and not bool((attention_mask[:, 0] == keep[:, None]).all()):
            return None  # more than a padding mask
        if collected():
            return None
        layers: Any = self.layer
        for layer in layers:  # a hook would find packed tokens, and an unfused layer could not read them
            if not isinstance(layer, _FusedLayer) or has_hooks(layer, CAPTURE) or layer.why_not_fused(layer):
                return None
        return keep


def _families() -> dict[type, type]:
    replacements: dict[type, type] = {}
    for module_name, prefix in FAMILIES.items():
        module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
        stock = {part: getattr(module, prefix + part) for part in _PARTS}
        layer = fused_class(_FusedLayer, getattr(module, prefix + "Layer"), stock=stock)
        encoder = fused_class(_FusedEncoder, getattr(module, prefix + "Encoder"), fused_layer=layer)
        replacements |= {kind.__mro__[2]: kind for kind in (layer, encoder)}
    return replacements


REPLACEMENTS = _families()
"""Each class that `fuse` knows here, and the class that takes its place."""
