"""fuse and unfuse: the layers of an existing model change their class, and nothing else.

A fused layer is a subclass of the class it replaces, with another forward. Parameters, buffers, hooks, names
and state_dict stay as they are, so checkpoints and optimisers do not notice, and going back is exact.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .multihead_attention import MultiheadAttention
from .padding import require_setting
from .transformer import Transformer, TransformerDecoder
from .transformer_decoder_layer import TransformerDecoderLayer
from .transformer_encoder import TransformerEncoder
from .transformer_encoder_layer import TransformerEncoderLayer

_OF_TORCH: dict[type, Any] = {
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.MultiheadAttention: MultiheadAttention,
}
_STACKS: dict[type, type] = {TransformerDecoder: nn.TransformerDecoder, Transformer: nn.Transformer}
"""Of which only the layers differ from torch's."""


@dataclass
class FuseReport:
    """What runs fused after `fuse`, by module path within the model; `str` of it is for reading."""

    fused: dict[str, str] = field(default_factory=dict)
    """Path to the name of the class that runs there now."""
    left: dict[str, str] = field(default_factory=dict)
    """Path to the reason why a layer stays as it was ("" is the path of the model itself)."""
    padding: dict[str, str] = field(default_factory=dict)
    """Path of a fused encoder to the reason why it keeps padding although `padding` is "auto"."""

    def __str__(self) -> str:
        fused, left = (len(paths) or "nothing" for paths in (self.fused, self.left))
        lines = [f"fused: {fused}", *_grouped(self.fused), f"left as it was: {left}", *_grouped(self.left)]
        if self.padding:
            lines += [f"padding kept: {len(self.padding)}", *_grouped(self.padding)]
        return "\n".join(lines)


def fuse(model: nn.Module, *, strict: bool = False, padding: str = "auto", recompute: bool = False) -> FuseReport:
    """Run the layers inside `model` on the fused kernels, in place.

    Knows `nn.TransformerEncoder`, `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer`, an
    `nn.MultiheadAttention` that is no part of one and, of Hugging Face, BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA,
    DistilBERT, ALBERT, MPNet, ModernBERT, EuroBERT, Nomic BERT, ESM-2, ViT, DINOv2, CLIP, SigLIP, wav2vec 2.0, HuBERT,
    Whisper, T5's encoder, BART, Marian and GPT-2, wherever they are in the model: under a head, in a
    sentence-transformers model, under peft's adapters (docs/huggingface.md). Parameters, state_dict and
    `save_pretrained` are untouched.
    Encoders also leave padding out: tokens are packed once, run through all layers and are unpacked once, so hidden
    states at padded positions come back as 0 (unfused they hold values that nobody should use). On a GPU this waits for
    the device once in each call with a padding mask.

    Args:
        model: any module; it is searched through.
        strict: raise, and change nothing, if anything would be left.
        padding: "auto": encoders remove padding from batches where that saves time, unless they are inside a Hugging
            Face model whose results may depend on padded positions, such as one for question answering
            (`FuseReport.padding`). A module of another class around an encoder is trusted not to read padded
            positions. "remove": encoders remove padding wherever that can be done. "keep": never. It becomes the
            attribute `padding` of each fused encoder, which can be set later too.
        recompute: layers compute the feed-forward's activation again in the backward pass instead of keeping it, so a
            training step keeps 12 instead of 16 elements for each element of the hidden states, where the hidden layer
            is 4 times as wide. It becomes the attribute `recompute` of each fused encoder layer.

    Returns:
        What is fused, and what was left and why. A model without a known layer is unchanged.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: another `padding`; with `strict`, a layer that cannot run fused, or no layer at all; the message
            says which and why.

    Example:
        >>> import torch, fusenc
        >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), 2)
        >>> print(fusenc.fuse(model))
        fused: 3
          TransformerEncoder: the model
          TransformerEncoderLayer: layers.0, layers.1
        left as it was: nothing
        >>> fusenc.unfuse(model)
    """
    _require_module(model)
    require_setting(padding)
    huggingface, problem = _huggingface()
    replacements = {**_OF_TORCH, **(huggingface.REPLACEMENTS if huggingface else {})}
    known = replacements | {fused: fused for fused in replacements.values()}
    parts = {  # a layer computes these itself, fused or not
        part
        for layer in model.modules()
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        for part in layer.children()
    }
    report = FuseReport()
    if problem and any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        report.left[""] = problem
    changes = []
    for path, module in model.named_modules():
        if module in parts:
            continue
        fused = known.get(type(module))
        if fused is not None:
            reason = (huggingface.why_changed(fused) if huggingface else "") or fused.why_not_fused(module)
        elif isinstance(module, tuple(replacements)):
            reason = f"{type(module).__name__} is a subclass with a forward of its own"
        else:
            reason = huggingface.why_unknown(module) if huggingface else ""
        if reason:
            report.left[path] = reason
        elif fused is not None:
            report.fused[path] = fused.__qualname__
            changes.append((path, module, fused))
            decides = padding == "auto" and huggingface and hasattr(fused, "padding")
            if decides and (reason := huggingface.why_padding_matters(model, path)):
                report.padding[path] = reason
    if huggingface:
        report.left.update(huggingface.unknown_models(model, [*report.fused, *report.left]))
    if not report.fused and not report.left:
        report.left[""] = f"{type(model).__name__} holds no layer of a supported family"
    if strict and report.left:
        raise ValueError("\n".join(["model: expected that all layers can run fused, got", *_grouped(report.left)]))
    for path, module, fused in changes:
        module.__class__ = fused
        if huggingface:
            huggingface.lay_together(module)
        if hasattr(fused, "padding"):
            module.padding = "keep" if path in report.padding else padding
        if hasattr(fused, "recompute"):
            module.recompute = recompute
    return report


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every fused layer inside `model` runs the forward of the class it had before.

    What was built as a class of fusenc becomes torch's too.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _require_module(model)
    huggingface, _ = _huggingface()
    of_transformers = huggingface.REPLACEMENTS if huggingface else {}
    replaced = {fused: plain for plain, fused in (*_OF_TORCH.items(), *of_transformers.items())} | _STACKS
    for module in model.modules():
        plain = replaced.get(type(module))
        if plain is not None:
            for name in ("padding", "recompute"):
                if hasattr(type(module), name):
                    vars(module).pop(name, None)
            if huggingface:
                huggingface.let_go(module)
            module.__class__ = plain


def _huggingface() -> tuple[Any, str]:
    """What is known of Hugging Face's models, and why nothing is although transformers is loaded."""
    if "transformers" not in sys.modules:  # then no model can hold one of its layers
        return None, ""
    try:
        from . import huggingface
    except (ImportError, AttributeError) as error:
        return None, f"this version of transformers is not supported: {error}"
    return huggingface, ""


def _grouped(texts: dict[str, str]) -> list[str]:
    """A line for each text, with the paths it is said of."""
    paths: dict[str, list[str]] = {}
    for path, text in texts.items():
        paths.setdefault(text, []).append(path or "the model")
    return [
        f"  {text}: {', '.join(named[:3])}{f' and {len(named) - 3} more' * (len(named) > 3)}"
        for text, named in paths.items()
    ]


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
