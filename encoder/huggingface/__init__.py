"""Hugging Face's models on the fused kernels. Importing this imports transformers.

`fusenc.fuse` takes the fused layers and encoders from here. After ``import fusenc.huggingface`` attention alone can
be had too, in any model whose attention transformers lets one choose: ``attn_implementation="fusenc"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from . import bart, bert, clip, esm, gpt2, modernbert, mpnet, rotary, t5, vit, wav2vec2
from .heads import why_padding_matters
from .interface import attention_forward
from .layers import Adapter, FusedLayer, lay_together, let_go
from .stock import Family, Stock, why_changed

__all__ = ["attention_forward", "lay_together", "let_go", "why_changed", "why_padding_matters"]

REPLACEMENTS: dict[type, type] = {}
"""Each class that `fuse` knows here, and the class that takes its place."""

PLAIN: set[type] = set()
"""Classes that stay as they are by nature, although transformers checkpoints them as it does layers."""

MISSING: dict[str, str] = {}
"""The reason why the classes of a model type, by its name in ``transformers.models``, could not be loaded."""


def _load(name: str, family: Family) -> None:
    """Load a model type. A missing class affects that type alone."""
    fused: dict[str, type] = {}
    try:
        stock = Stock(name, family.prefix)
        for of, kind, relies_on, layer, attributes in family.replaced:
            more: dict[str, Any] = {"fused_layer": fused[layer]} if layer else {}
            if issubclass(kind, Adapter):
                kind, more = FusedLayer, {"adapter": kind(stock, relies_on)}
            fused[of] = stock.fused(kind, of, relies_on, **more, **attributes)
        plain = {stock[part] for part in family.plain}
    except Exception as error:  # whatever a module of transformers raises when it is imported
        MISSING[name] = str(error)
    else:
        REPLACEMENTS.update({stock[of]: of_fusenc for of, of_fusenc in fused.items()})
        PLAIN.update(plain)


for _module in (bart, bert, clip, esm, gpt2, modernbert, mpnet, rotary, t5, vit, wav2vec2):
    for _name, _family in _module.FAMILIES.items():
        _load(_name, _family)


def why_unknown(module: nn.Module) -> str:
    """Why a layer of a family that is not known here stays as it is; "" for what is no such layer."""
    if not isinstance(module, GradientCheckpointingLayer) or type(module) in PLAIN:
        return ""
    return _why_missing(module) or f"{type(module).__name__} is no layer of a supported family"


def _why_missing(module: nn.Module) -> str:
    """Why the model type of this module is missing, or ""."""
    return next((MISSING[name] for name in type(module).__module__.split(".")[2:3] if name in MISSING), "")


def unknown_models(model: nn.Module, known: Sequence[str]) -> dict[str, str]:
    """The models inside `model` that hold none of the `known` paths, with that as the reason."""
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(_inside(path, other) for other in known):
            continue
        if not any(isinstance(part, PreTrainedModel) for part in module.modules() if part is not module):
            found[path] = _why_missing(module) or f"{type(module).__name__} holds no layer of a supported family"
    return found


def _inside(path: str, other: str) -> bool:
    return not path or other == path or other.startswith(path + ".")
