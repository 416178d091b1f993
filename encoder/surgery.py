"""fuse and unfuse: the layers of an existing model change their class, and nothing else.

A fused layer is a subclass of the class it replaces, with another forward. Parameters, buffers, hooks, names
and state_dict stay as they are, so checkpoints and optimisers do not notice, and going back is exact.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .transformer_encoder_layer import TransformerEncoderLayer


@dataclass
class FuseReport:
    """What `fuse` did, by module path within the model."""

    fused: dict[str, str] = field(default_factory=dict)
    """Path to the name of the class that now runs there."""
    left: dict[str, str] = field(default_factory=dict)
    """Path to the reason why an encoder layer stays as it was ("" is the path of the model itself)."""


def fuse(model: nn.Module) -> FuseReport:
    """Run the encoder layers inside `model` on the fused kernels, in place.

    Knows `nn.TransformerEncoderLayer` and the layers of Hugging Face's BERT, RoBERTa, XLM-RoBERTa, CamemBERT
    and ELECTRA. Parameters, state_dict and `save_pretrained` are untouched. On the CPU the encoders of these
    Hugging Face models also leave padding out: tokens are packed once, run through all layers and are unpacked
    once, so hidden states at padded positions come back as 0 (unfused they hold values nobody should use).

    Args:
        model: any module; it is searched through.

    Returns:
        What was fused, and what was left and why. A model without a known layer is unchanged.

    Raises:
        TypeError: `model` is no nn.Module.

    Example:
        >>> import torch, fusenc
        >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), 2)
        >>> sorted(fusenc.fuse(model).fused)
        ['layers.0', 'layers.1']
        >>> fusenc.unfuse(model)
    """
    _require_module(model)
    replacements: dict[type, Any] = {nn.TransformerEncoderLayer: TransformerEncoderLayer}
    of_transformers, problem = _of_transformers()
    replacements.update(of_transformers)
    report = FuseReport()
    if problem and any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        report.left[""] = problem
    for path, module in model.named_modules():
        replacement = replacements.get(type(module))
        reason = _why_left(module, tuple(replacements)) if replacement is None else replacement.why_not_fused(module)
        if reason:
            report.left[path] = reason
        elif replacement is not None:
            module.__class__ = replacement
            report.fused[path] = replacement.__qualname__
    if not report.fused and not report.left:
        report.left[""] = f"{type(model).__name__} holds no encoder layer of a supported family"
    return report


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every fused layer inside `model` runs the forward of the class it had before.

    A `fusenc.TransformerEncoderLayer` that was built as such becomes torch's too.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _require_module(model)
    replaced: dict[type, type] = {TransformerEncoderLayer: nn.TransformerEncoderLayer}
    replaced.update({fused: plain for plain, fused in _of_transformers()[0].items()})
    for module in model.modules():
        plain = replaced.get(type(module))
        if plain is not None:
            module.__class__ = plain


def _of_transformers() -> tuple[dict[type, type], str]:
    """Replacements of the layers of Hugging Face's models, and why there are none although transformers is loaded."""
    if "transformers" not in sys.modules:  # then no model can hold one of its layers
        return {}, ""
    try:
        from .huggingface import REPLACEMENTS
    except (ImportError, AttributeError) as error:
        return {}, f"this version of transformers is not supported: {error}"
    return REPLACEMENTS, ""


def _why_left(module: nn.Module, known: tuple[type, ...]) -> str:
    if isinstance(module, TransformerEncoderLayer):
        return "already fused"
    if isinstance(module, known):
        fused = any(type(module).__mro__[1] is kind for kind in known) and type(module).__module__.startswith("fusenc.")
        return "already fused" if fused else f"{type(module).__name__} is a subclass with a forward of its own"
    return ""


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
