"""Hugging Face models: the packaged sentence encoder on real sentences, or BERT of any size with random weights."""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import fusenc
import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from ..checking import DTYPES, LARGEST_DIFFERENCE_OF_A_MODEL
from ..demo import DemoError, load, tokenize
from ..text import docstring_sentences, documentation_sentences
from ..timing import Device
from .attention import BACKENDS
from .case import (
    DROPOUT,
    AbsentError,
    Call,
    Case,
    Given,
    Grid,
    Inputs,
    Maker,
    Point,
    Provider,
    View,
    directed,
    optimized,
    package,
    points,
)
from .layer import work

GRIDS = {
    "cpu": [Grid(("float32",), (16,), (64,), (384,), (12,), (1.0, 0.58))],
    "cuda": [Grid(("float16", "bfloat16"), (32,), (128, 512), (768,), (12,), (1.0, 0.58))],
}
LAYERS = 6
SENTENCES = 32
TARGETS = {"half full": {"forward": 1.8, "both": 1.6}, "full": {"forward": 0.97, "both": 0.97}}


def cases(given: Given, device: Device) -> list[Case]:
    """The packaged encoder on real sentences; where a size is asked for, and on a GPU, random weights of that size."""
    if device.kind == "cpu" and not set(given) - {"direction", "dtype"}:
        directions, dtypes = given.get("direction", ("forward", "both")), given.get("dtype", ("float32",))
        return [
            _packaged(fill, dtype, d, dropout, device)
            for dtype in dtypes
            for fill in TARGETS
            for d in directions
            for dropout in ((False, True) if d == "both" and fill == "half full" else (False,))
        ]
    return [case(point, device) for point in points(GRIDS, given, device)]


def case(point: Point, device: Device, layers: int = LAYERS, autocast: bool = False) -> Case:
    """BERT with random weights at one point; under autocast its parameters are float32."""
    ids = functools.partial(_random_ids, point.real())
    name = point.describe(f"BERT, {layers} layers, {point.batch}x{point.length}x{point.width}, {point.heads} heads")
    build = functools.partial(_random, device.where, point.width, point.heads, max(point.length, 512), layers)
    made = _case(name, point.dtype, point.direction, device, build, ids, point.lengths, point.sizes(), layers, autocast)
    if autocast:
        made.name += ", autocast"
    return made


def _config(width: int, heads: int, length: int, layers: int) -> Any:
    return package("transformers", "transformers").BertConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_hidden_layers=layers,
        max_position_embeddings=length, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.02 * (768 / width) ** 0.5,  # in narrow models too attention then changes the values
    )  # fmt: skip


def _random(where: str, *sizes: int) -> nn.Module:
    return copy.deepcopy(_built(where, *sizes))


@functools.lru_cache(maxsize=1)
def _built(where: str, *sizes: int) -> nn.Module:
    """Kept, because drawing the weights of a large model takes seconds."""
    torch.manual_seed(0)
    return package("transformers", "transformers").BertModel(_config(*sizes), add_pooling_layer=False).to(where).eval()


def _random_ids(real: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, tuple(real.shape), generator=generator).to(real.device)
    return ids, real.long()


@functools.cache
def packaged() -> tuple[Any, Any]:
    """The packaged sentence encoder and its tokenizer.

    Raises:
        AbsentError: it is not installed.
    """
    try:
        return load(None)
    except DemoError as error:
        raise AbsentError(str(error)) from None


@functools.cache
def sentences() -> list[str]:
    """Real sentences in a random order that is the same each time."""
    found = [*documentation_sentences(), *docstring_sentences()]
    random.Random(0).shuffle(found)
    return found


@functools.cache
def batch(fill: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch of real sentences, half full or full."""
    model, tokenizer = packaged()
    lengths = [len(ids) for ids in tokenizer(sentences())["input_ids"]]
    chosen = (_half_full if fill == "half full" else _full)(lengths)
    inputs = tokenize(tokenizer, model, [sentences()[i] for i in chosen], "cpu")
    return inputs["input_ids"], inputs["attention_mask"]


def _half_full(lengths: Sequence[int]) -> Sequence[int]:
    """The sentences in a row that come nearest to a batch half of which is padding, as random batches do."""

    def off(start: int) -> float:
        found = lengths[start : start + SENTENCES]
        return abs(sum(found) / (SENTENCES * max(found)) - 0.5)

    start = min(range(0, len(lengths) - SENTENCES, SENTENCES), key=off)
    return range(start, start + SENTENCES)


def _full(lengths: Sequence[int]) -> Sequence[int]:
    """Sentences of one length, the longest of which there are enough."""
    length = max(n for n in set(lengths) if lengths.count(n) >= SENTENCES)
    return [i for i, n in enumerate(lengths) if n == length][:SENTENCES]


def _packaged(fill: str, dtype: str, direction: str, dropout: bool, device: Device) -> Case:
    drop = "dropout 0.1, " if dropout else ""
    try:
        ids, mask = batch(fill)
    except AbsentError as absent:
        return missing("model", f"MiniLM, {fill}, {drop}{dtype}, {direction}", dtype, direction, absent)
    model, _ = packaged()
    lengths, (rows, longest) = mask.sum(1).tolist(), mask.shape
    width = int(model.config.hidden_size)
    sizes = {"kind": fill, "batch": rows, "length": longest, "width": width, "fill": sum(lengths) / mask.numel()}
    name = f"MiniLM, {rows}x{longest}, fill {sizes['fill']:.2f}, {drop}{dtype}, {direction}"

    def tokens() -> tuple[Tensor, Tensor]:
        return ids.to(device.where), mask.to(device.where)

    def build() -> nn.Module:
        made = copy.deepcopy(model)
        return made.train(dropout)  # without, gradients are those of evaluation mode

    case = _case(name, dtype, direction, device, build, tokens, lengths, sizes)
    if dropout:
        case.reference, case.unchecked = None, DROPOUT
    if direction in TARGETS[fill] and dtype == "float32" and device.kind == "cpu":
        case.targets = {"fusenc": TARGETS[fill][direction]}
    return case


def missing(op: str, name: str, dtype: str, direction: str, absent: AbsentError) -> Case:
    """A case that cannot even be made here."""

    def refuse() -> Maker:
        raise absent

    return Case(op, name, dtype, direction, lambda: Inputs([]), {"fusenc": refuse}, unchecked="nothing runs")


def _case(
    name: str, dtype: str, direction: str, device: Device, build: Callable[[], nn.Module],
    ids: Callable[[], tuple[Tensor, Tensor]], lengths: list[int], sizes: dict[str, Any], layers: int = LAYERS,
    autocast: bool = False,
) -> Case:  # fmt: skip
    width, of = sizes["width"], torch.float32 if autocast else DTYPES[dtype]
    rows, ragged = (len(lengths), sizes["length"], width), min(lengths) < max(lengths)

    def inputs() -> Inputs:
        generator = torch.Generator(device=device.where).manual_seed(0)
        upstream = torch.randn(rows, generator=generator, device=device.where).to(of)
        tokens, mask = ids()
        return Inputs([], [tokens, mask], [upstream * mask[:, :, None]])

    def made(attention: str) -> nn.Module:
        model: Any = build()
        model.set_attn_implementation(attention)
        return model.to(device.where, of)

    def run(model: nn.Module, call: Callable[..., Any] | None = None, wide: bool = False) -> Maker:
        forward = model if call is None else call
        return of_hidden(model, lambda ids, mask: forward(input_ids=ids, attention_mask=mask).last_hidden_state, wide)

    def of_hidden(model: nn.Module, hidden: Callable[..., Any], wide: bool = False) -> Maker:
        """Of a function from ids and mask to hidden states; `wide`: not under autocast."""
        called = torch.autocast(device.where, DTYPES[dtype])(hidden) if autocast and not wide else hidden
        parameters = list(model.parameters())
        return lambda inputs: directed(called, inputs, direction, parameters)

    def flash() -> Maker:
        package("flash_attn", "flash-attn")
        return run(made("flash_attention_2"))

    def compiled() -> Maker:
        model = made("sdpa")
        return run(model, optimized(model))

    def through(backend: str) -> Maker:
        model = made("sdpa")

        def call(**inputs: Any) -> Any:
            with sdpa_kernel(BACKENDS[backend]):
                return model(**inputs)

        return run(model, call)

    def fused_model() -> nn.Module:
        model = made("sdpa")
        fusenc.fuse(model)
        return model

    def captured() -> Maker:
        """With the mask made before: transformers makes another one during a capture than in the calls before it."""
        model: Any = fused_model()

        def hidden(tokens: Tensor, mask: Tensor) -> Tensor:
            x = model.embeddings(input_ids=tokens)
            return model.encoder(x, attention_mask=mask if ragged else None).last_hidden_state

        def make(inputs: Inputs) -> Call:
            tokens, mask = inputs.others
            whole = mask.bool()[:, None, None].expand(-1, -1, mask.shape[1], -1)
            return device.captured(of_hidden(model, hidden)(Inputs([], [tokens, whole], inputs.upstream)))

        return make

    def packed() -> Maker:
        model, real = made("sdpa"), ids()[1].bool()
        make = of_hidden(model, _packed(model, lengths, real, direction == "forward"))
        return lambda inputs: make(Inputs([], inputs.others, [t[real] for t in inputs.upstream]))

    def flattened() -> Maker:
        model, real = fused_model(), ids()[1].bool()
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=real.device)
        places = real.flatten().nonzero()[:, 0]
        positions = torch.cat([torch.arange(n, device=real.device) for n in lengths])[None]
        longest = max(lengths)
        texts: dict[str, Any] = {
            "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip

        def hidden(tokens: Tensor, mask: Tensor) -> Tensor:
            flat = tokens.flatten()[places][None]
            return model(input_ids=flat, position_ids=positions, **texts).last_hidden_state[0]  # type: ignore[no-any-return]

        make = of_hidden(model, hidden)
        return lambda inputs: make(Inputs([], inputs.others, [t[real] for t in inputs.upstream]))

    def reference() -> Maker:
        model = made("eager")
        return lambda inputs: run(model.to(inputs.upstream[0].dtype), wide=True)(inputs)

    def real_tokens(results: list[Tensor | None]) -> list[Tensor | None]:
        real = ids()[1].bool()
        return [t[real.to(t.device)] if t is not None and t.shape == rows else t for t in results]

    providers: dict[str, Provider] = {
        "hf-eager": lambda: run(made("eager")), "hf-sdpa": lambda: run(made("sdpa")), "hf-flash": flash,
        "compile": compiled, "fusenc": lambda: run(fused_model()),
    }  # fmt: skip
    if device.kind == "cuda":
        providers |= {f"hf-{name}": functools.partial(through, name) for name in ("sdpa-flash", "sdpa-cudnn")}
        providers["fusenc-graph"] = captured
        if ragged:
            providers |= {"fusenc-packed": packed, "fusenc-flattened": flattened}
    views: dict[str, View] = dict.fromkeys((*providers, "reference"), real_tokens)
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    flops, moved = work(tokens, pairs, width, 12 * width * width, direction)
    return Case(
        "model", name, dtype, direction, inputs, providers, ("hf-sdpa",), {}, reference, "", views,
        LARGEST_DIFFERENCE_OF_A_MODEL, layers * flops, layers * moved * DTYPES[dtype].itemsize, tokens, sizes,
        judge=None if dtype == "float32" else lambda: run(made("eager")),
    )  # fmt: skip


def _packed(model: Any, lengths: list[int], real: Tensor, constant: bool) -> Callable[..., Tensor]:
    """A BERT's hidden states of the real tokens ``[T, width]``, its layers on packed tokens.

    Args:
        model: a stock BertModel.
        lengths: real tokens of each sequence.
        real: the same as bool ``[B, L]``.
        constant: whether the parameters stay, so that the three projections are put together once.
    """
    encoder_layer: Any = fusenc.kernels.encoder_layer
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=real.device)
    places = real.flatten().nonzero()[:, 0]
    eps, heads = model.config.layer_norm_eps, model.config.num_attention_heads

    def weights(layer: Any) -> Any:
        attention, out = layer.attention.self, layer.attention.output
        projections = [attention.query, attention.key, attention.value]
        modules = (out.dense, out.LayerNorm, layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)
        return fusenc.kernels.LayerWeights(
            *(torch.cat([getattr(p, name) for p in projections]) for name in ("weight", "bias")),
            *(getattr(module, name) for module in modules for name in ("weight", "bias")),
        )

    layers = model.encoder.layer
    with torch.no_grad():
        kept = [weights(layer) for layer in layers] if constant else None

    def hidden(tokens: Tensor, mask: Tensor) -> Tensor:
        x = model.embeddings(tokens).flatten(0, 1).index_select(0, places)
        options = {"cu_seqlens": starts, "max_seqlen": max(lengths), "eps1": eps, "eps2": eps}
        for of in kept or map(weights, layers):
            x = encoder_layer(x, of, heads, **options)
        return x

    return hidden
