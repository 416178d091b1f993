"""The packaged sentence encoder on 32 real sentences, ragged and of equal length."""

from __future__ import annotations

import copy
import random
import statistics
from typing import Any

import fusenc
import torch
from torch import nn

from ..demo import load, tokenize
from ..text import documentation_sentences
from .case import Case

LARGEST_DIFFERENCE = 1e-4
"""Of any hidden state of a real token; above it no time is reported."""


def cases() -> list[Case]:
    plain, tokenizer = load(None)
    fused = copy.deepcopy(plain)
    fusenc.fuse(fused)
    sentences = random.Random(0).sample(documentation_sentences(), 512)
    lengths = [len(ids) for ids in tokenizer(sentences)["input_ids"]]
    common = statistics.mode(lengths)
    equal = [s for s, n in zip(sentences, lengths, strict=True) if n == common]
    equal = (equal * 32)[:32]
    cases = []
    for name, texts in (("ragged", sentences[:32]), ("equal length", equal)):
        inputs = tokenize(tokenizer, plain, texts, "cpu")
        real = inputs["attention_mask"].bool()
        fill = float(real.float().mean())
        with torch.inference_mode():
            difference = (plain(**inputs).last_hidden_state - fused(**inputs).last_hidden_state)[real].abs().max()
        if difference > LARGEST_DIFFERENCE:
            raise RuntimeError(f"{name}: hidden states differ by {float(difference):.1e}; no time is measured")
        shape = "x".join(map(str, real.shape))
        target = 0.9 / fill if fill < 1 else 0.95
        for training in (False, True):
            sides = (plain, fused)

            def call(model: nn.Module, inputs: Any = inputs, real: Any = real, training: bool = training) -> None:
                if training:
                    model(**inputs).last_hidden_state[real].sum().backward()
                    return
                with torch.inference_mode():
                    model(**inputs)

            # Only inference has a target; the models stay in evaluation mode, so training is without dropout.
            kind = "forward and backward" if training else "inference"
            cases.append(
                Case(f"MiniLM {shape}, {name}, fill {fill:.2f}, {kind}", lambda c=call, s=sides: c(s[0]),  # type: ignore[misc]
                     lambda c=call, s=sides: c(s[1]), 1, None if training else target, "Hugging Face, sdpa")  # type: ignore[misc]
            )  # fmt: skip
    return cases
