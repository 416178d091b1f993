"""Hugging Face's models on the fused kernels. Importing this imports transformers.

`fusenc.fuse` takes the fused layers and encoders from here. After ``import fusenc.huggingface`` attention alone can
be had too, in any model whose attention transformers lets one choose: ``attn_implementation="fusenc"``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from . import albert, bart, bert, clip, distilbert, modernbert, mpnet, t5, vit
from .interface import attention_forward

__all__ = ["attention_forward"]

REPLACEMENTS: dict[type, type] = {
    **bert.REPLACEMENTS,
    **distilbert.REPLACEMENTS,
    **albert.REPLACEMENTS,
    **mpnet.REPLACEMENTS,
    **vit.REPLACEMENTS,
    **clip.REPLACEMENTS,
    **modernbert.REPLACEMENTS,
    **t5.REPLACEMENTS,
    **bart.REPLACEMENTS,
}
"""Each class that `fuse` knows here, and the class that takes its place."""


def why_unknown(module: nn.Module) -> str:
    """Why a layer of a family that is not known here stays as it is; "" for what is no such layer."""
    if isinstance(module, GradientCheckpointingLayer):
        return f"{type(module).__name__} is no layer of a supported family"
    return ""


def unknown_models(model: nn.Module, known: Sequence[str]) -> dict[str, str]:
    """The models inside `model` that hold none of the `known` paths, with that as the reason."""
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or any(_inside(path, other) for other in known):
            continue
        if not any(isinstance(part, PreTrainedModel) for part in module.modules() if part is not module):
            found[path] = f"{type(module).__name__} holds no layer of a supported family"
    return found


def _inside(path: str, other: str) -> bool:
    return not path or other == path or other.startswith(path + ".")
