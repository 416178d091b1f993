"""Fused layers and encoders of Hugging Face's BERT family. Imported only where transformers already is."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils import output_capturing

from . import kernels
from .modules import has_hooks, why_not_plain
from .packing import PaddedPacking, attend

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
}
"""Module names of transformers and the prefix of their classes. Their layers are the same but for the name."""

_ACTIVATIONS = {
    type(ACT2FN[theirs]): ours
    for theirs, ours in (
        ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"),
    )
}  # fmt: skip


# transformers leaves hooks on its modules that sleep until a call asks for hidden states or attentions.
_CAPTURE = output_capturing.__name__


def _collected() -> Any:
    """The outputs (hidden states, attentions) that the running call of a model records, by name; empty if none."""
    return output_capturing._active_collector.get() or {}


class _FusedLayer(nn.Module):
    """A BERT layer on the fused kernels; mixed into a subclass of the family's own layer."""

    @staticmethod
    def why_not_fusable(layer: Any) -> str:
        """Why a layer cannot be fused, or ""."""
        if layer.is_decoder or layer.add_cross_attention:
            return "a decoder layer"
        if layer.chunk_size_feed_forward:
            return "the feed-forward is chunked"
        if type(layer.intermediate.intermediate_act_fn) not in _ACTIVATIONS:
            return f"activation {layer.intermediate.intermediate_act_fn} is not fused"
        return _FusedLayer._why_not_plain(layer)

    @staticmethod
    def _why_not_plain(layer: Any) -> str:
        attention, output = layer._modules["attention"], layer._modules["output"]
        attention_self, attention_output = attention._modules["self"], attention._modules["output"]
        intermediate = layer._modules["intermediate"]
        for holder in (attention, attention_self, attention_output, intermediate, output):
            if has_hooks(holder, except_of=_CAPTURE):
                return f"{type(holder).__name__} has hooks"
        return why_not_plain(
            [
                ("attention.output.dense", attention_output._modules["dense"], nn.Linear),
                ("attention.output.LayerNorm", attention_output._modules["LayerNorm"], nn.LayerNorm),
                ("intermediate.dense", intermediate._modules["dense"], nn.Linear),
                ("output.dense", output._modules["dense"], nn.Linear),
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
        activation = _ACTIVATIONS[type(intermediate.intermediate_act_fn)]
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
        if "attentions" in _collected():
            return True
        return bool(self._why_not_plain(self))

    @staticmethod
    def _attention(module: Any, x: Tensor, attention_mask: Tensor | None, packing: PaddedPacking | None) -> Tensor:
        heads = (module.num_attention_heads, module.attention_head_size)
        parts = module._modules
        query, key, value = (parts[name](x).unflatten(-1, heads) for name in ("query", "key", "value"))
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

    @staticmethod
    def why_not_fusable(encoder: Any) -> str:
        """Why an encoder cannot be fused, or "": it needs each of its layers fused."""
        return next(filter(None, map(_FusedLayer.why_not_fusable, encoder.layer)), "")

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

        On a GPU the number of tokens would have to be waited for, and torch.compile would break the graph.
        """
        if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.dim() != 4:
            return None
        if x.is_cuda or x.dim() != 3 or torch.compiler.is_compiling():
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
        if _collected():
            return None
        layers: Any = self.layer
        for layer in layers:  # a hook would find packed tokens, and an unfused layer could not read them
            if not isinstance(layer, _FusedLayer) or has_hooks(layer, _CAPTURE) or layer._why_not_plain(layer):
                return None
        return keep


def _families() -> dict[type, type]:
    replacements: dict[type, type] = {}
    for module_name, prefix in FAMILIES.items():
        module = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
        for part, mixin in (("Layer", _FusedLayer), ("Encoder", _FusedEncoder)):
            plain = getattr(module, prefix + part)
            name = f"Fused{prefix}{part}"
            fused = type(name, (mixin, plain), {"__module__": __name__, "__doc__": mixin.__doc__})
            globals()[name] = fused  # so that a fused model can be pickled
            replacements[plain] = fused
    return replacements


REPLACEMENTS = _families()
"""Each class that `fuse` knows here, and the class that takes its place."""
