"""What a model is profiled on: batches of real text, dense and ragged."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..demo import DemoError, load, tokenize
from ..text import documentation_sentences, read_sentences
from .flops import Polynomial

BATCHES = 4
"""Ragged batches of the largest size; smaller sizes share the same sentences."""

KEPT = ("input_ids", "attention_mask")
"""What a model is given; types of tokens are then 0, as in any text that is no pair."""


class ProfileError(Exception):
    """What was asked for cannot be profiled; the message says why."""


@dataclass
class Case:
    """Batches that are run one after the other and timed as one."""

    order: str
    """``dense``: equal lengths; ``random``, ``sorted``: sentences as they come, or by length."""
    batch: int
    length: int | None
    """Tokens of each sequence of a dense case."""
    batches: list[dict[str, Tensor]]

    @property
    def name(self) -> str:
        """What messages call it."""
        if self.length is not None:
            return f"dense, {self.batch} x {self.length}"
        return f"ragged, batches of {self.batch}, {self.order} order"

    @property
    def lengths(self) -> list[list[int]]:
        """Real tokens of each sequence of each batch."""
        return [batch["attention_mask"].sum(1).tolist() for batch in self.batches]

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(map(sum, self.lengths))

    @property
    def positions(self) -> int:
        """Tokens and padding."""
        return sum(batch["attention_mask"].numel() for batch in self.batches)

    def useful_flops(self, flops: Callable[[int], float]) -> float:
        """Operations of the real tokens."""
        return sum(flops(length) for lengths in self.lengths for length in lengths)

    def padded_flops(self, flops: Callable[[int], float]) -> float:
        """Operations of a model that computes the padding too."""
        return sum(len(batch["input_ids"]) * flops(batch["input_ids"].shape[1]) for batch in self.batches)


def load_model(folder: Path | None) -> tuple[nn.Module, Any]:
    """A text encoder and its tokenizer; of an encoder-decoder the encoder.

    Raises:
        ProfileError: the folder holds none.
    """
    try:
        model, tokenizer = load(folder)
    except DemoError as error:
        raise ProfileError(str(error).replace("--model", "MODEL", 1).replace("the demo", "profile", 1)) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up for a folder without its files
        raise ProfileError(f"MODEL: {folder} holds no tokenizer")
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    encode = _of_length(model, 4)
    fault = _fault(encode)
    if fault:
        raise ProfileError(f"MODEL: {type(model).__name__} is no text encoder: {fault}")
    return model, tokenizer


def require_length(model: nn.Module, length: int) -> None:
    """Raises:
    ProfileError: the model does not take so many tokens.
    """
    fault = _fault(_of_length(model, length))
    if fault:
        raise ProfileError(f"--length: the model does not take {length} tokens ({fault})")


def _of_length(model: nn.Module, length: int) -> Callable[[], Any]:
    config: Any = model.config
    ids = torch.full((1, length), getattr(config, "vocab_size", 2) - 1)  # hardly the id of padding, which may not count

    @torch.inference_mode()
    def call() -> Any:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))

    return call


def _fault(call: Callable[[], Any]) -> str:
    """What is wrong with a model's answer, nothing if it gives hidden states."""
    try:
        hidden = call().last_hidden_state
    except Exception as error:  # whatever a model of another kind says of token ids
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return "" if hidden.dim() == 3 else f"its last hidden state has shape {tuple(hidden.shape)}"


def read_text(file: Path | None) -> tuple[list[str], str]:
    """Sentences in random order, always the same, and where they are from.

    Raises:
        ProfileError: the file cannot be used.
    """
    try:
        sentences = documentation_sentences() if file is None else read_sentences(file)
    except ValueError as error:
        raise ProfileError(str(error)) from None
    source = "the documentation of Python" if file is None else str(file)
    return random.Random(0).sample(sentences, len(sentences)), source


def dense_case(tokenizer: Any, sentences: Sequence[str], batch: int, length: int, device: str) -> Case:
    """One batch without padding: the text's tokens, one sentence after the other, cut into pieces of a length."""
    needed = batch * length
    ids: list[int] = []
    for i, sentence in enumerate(itertools.cycle(sentences)):
        ids += tokenizer(sentence)["input_ids"]
        if len(ids) >= needed:
            break
        if i == len(sentences) and not ids:
            raise ProfileError("--text: the tokenizer finds no tokens in it")
    tokens = torch.tensor(ids[:needed], device=device).view(batch, length)
    return Case("dense", batch, length, [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}])


def ragged_cases(
    tokenizer: Any, model: nn.Module, sentences: Sequence[str], batch: int, count: int, device: str
) -> list[Case]:
    """The first `count` sentences in batches, as they come and by length."""
    chosen = list(sentences[:count])
    tokens = tokenizer(chosen)["input_ids"]
    by_length = [sentence for _, sentence in sorted(zip(map(len, tokens), chosen, strict=True), key=lambda x: x[0])]
    cases = []
    for order, texts in (("random", chosen), ("sorted", by_length)):
        groups = [texts[i : i + batch] for i in range(0, len(texts), batch)]
        encoded = [tokenize(tokenizer, model, group, device) for group in groups]
        cases.append(Case(order, batch, None, [{name: e[name] for name in KEPT} for e in encoded]))
    return cases


def waste(case: Case, flops: Polynomial | None) -> tuple[float, float | None]:
    """Shares of the positions and of the operations that padding takes where it is computed."""
    of_flops = None if flops is None else 1 - case.useful_flops(flops) / case.padded_flops(flops)
    return 1 - case.tokens / case.positions, of_flops
