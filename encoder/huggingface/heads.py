"""Models around an encoder whose results do not depend on the hidden states at padded positions.

With `padding="auto"`, `fuse` removes padding inside these Hugging Face models alone. Hidden states and logits at padded
positions differ, and so does what pools the first token of a row whose first token is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

INDEPENDENT = {
    "hidden states of a token each": "EncoderModel",
    "hidden states of a token each, and of the first token": "Model",
    "the loss ignores the label -100 of padded tokens": "LMHeadModel ForCausalLM ForMaskedLM ForTokenClassification",
    "the loss ignores padded tokens, by their label or by the mask; the first token is pooled": "ForPreTraining",
    "the first token is pooled": "ForNextSentencePrediction",
    "the first token, the mean by the mask or the end of a decoder's sequence is pooled": "ForSequenceClassification",
    "the first token or the mean by the mask is pooled": "ForMultipleChoice",
    "the decoder masks the padding of its source": "ForConditionalGeneration MTModel",
    "the end of the text is pooled": "TextModel TextTransformer TextModelWithProjection",
    "images have no padding": "VisionModel VisionTransformer VisionModelWithProjection ForImageClassification",
}
"""Ends of class names, after that of the family, by why what such a model returns does not depend on padding."""

_PREFIXES = (
    "Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "Albert", "MPNet", "ModernBert", "T5", "MT5",
    "Bart", "Marian", "CLIP", "Esm", "EuroBert", "NomicBert", "GPT2",
)  # fmt: skip

_INDEPENDENT = {prefix + end for prefix in _PREFIXES for ends in INDEPENDENT.values() for end in ends.split()} | {
    "EncoderDecoderModel", "VisionTextDualEncoderModel", "SiglipVisionModel", "SiglipVisionTransformer",
    "SiglipForImageClassification",
    "DPRContextEncoder", "DPRQuestionEncoder", "DPREncoder",
    "Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForSequenceClassification",  # by lengths, and by the mask
    "HubertModel", "HubertForCTC", "HubertForSequenceClassification",
}  # fmt: skip

_UNLESS: dict[str, Callable[[Any], str]] = {
    "ElectraForMultipleChoice": lambda config: (
        "" if config.summary_type == "first" else f"its summary of type {config.summary_type!r} reads padded positions"
    ),
    "Wav2Vec2Model": lambda config: "its adapter reads padded positions" if config.add_adapter else "",
}
"""By class name: why a configuration's results do depend on padding, or ""."""


def why_padding_matters(model: nn.Module, path: str) -> str:
    """Why what a model around the encoder at `path` returns depends on padding, or may, or ""."""
    parents = ["", *(path[:i] for i, character in enumerate(path) if character == ".")] if path else []
    for parent in map(model.get_submodule, parents):
        if isinstance(parent, PreTrainedModel) and (reason := _why(parent)):
            return reason
    return ""


def _why(model: PreTrainedModel) -> str:
    # A subclass that keeps the forward of a known class returns what that returns.
    owner: Any = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    owner = vars(owner).get("stock_class", owner)
    name = owner.__name__
    if name.endswith("ForQuestionAnswering"):
        return f"{name} takes a softmax over padded positions too"
    if name not in _INDEPENDENT or not owner.__module__.startswith("transformers.models."):
        return f"{name} may use hidden states at padded positions"
    reason = _UNLESS[name](model.config) if name in _UNLESS else ""
    return f"{name}: {reason}" if reason else ""
