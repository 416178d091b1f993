"""Models around an encoder whose results do not depend on the hidden states at padded positions.

With `padding="auto"`, `fuse` removes padding inside these Hugging Face models alone. Hidden states and logits at padded
positions differ, and so does what pools the first token of a row whose first token is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_TOKENS = "the loss ignores the label -100 of padded tokens"
_FIRST = "the first token is pooled"
_MASKED = "the decoder masks the padding of its source"

INDEPENDENT: dict[str, str] = {
    "Model": "hidden states of a token each, and of the first token",
    "EncoderModel": "hidden states of a token each",
    "LMHeadModel": _TOKENS,
    "ForCausalLM": _TOKENS,
    "ForMaskedLM": _TOKENS,
    "ForTokenClassification": _TOKENS,
    "ForPreTraining": "the loss ignores padded tokens, by their label or by the mask; the first token is pooled",
    "ForNextSentencePrediction": _FIRST,
    "ForSequenceClassification": "the first token, the mean by the mask or the end of a decoder's sequence is pooled",
    "ForMultipleChoice": "the first token or the mean by the mask is pooled",
    "ForConditionalGeneration": _MASKED,
    "MTModel": _MASKED,
    "TextModel": "the end of the text is pooled",
    "TextTransformer": "the end of the text is pooled",
    "TextModelWithProjection": "the end of the text is pooled",
    "VisionModel": "images have no padding",
    "VisionTransformer": "images have no padding",
    "VisionModelWithProjection": "images have no padding",
    "ForImageClassification": "images have no padding",
}
"""Why what a model returns does not depend on padding, by the end of its class's name after that of its family."""

_PREFIXES = (
    "Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "Albert", "MPNet", "ModernBert", "T5", "MT5",
    "Bart", "Marian", "CLIP", "Esm", "EuroBert", "NomicBert", "GPT2",
)  # fmt: skip

_INDEPENDENT = {prefix + ending for prefix in _PREFIXES for ending in INDEPENDENT} | {
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
