"""`fusenc bench`: this library against torch and Hugging Face on the CPU, both sides taking turns in one process."""

from __future__ import annotations

import copy
import functools
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fusenc
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

Call = Callable[[], Any]
LARGEST_DIFFERENCE = 1e-4
"""Of any hidden state of a real token; above it no time is reported."""


@dataclass
class Case:
    """Two ways to do the same and what their ratio should be."""

    name: str
    theirs: Call
    ours: Call
    calls: int
    """Calls that one measurement averages over: enough to dwarf the clock's own cost."""
    target: float | None
    """The ratio to reach, theirs over ours; below 1 where a bounded cost is the target. None: for information."""
    theirs_is: str


@dataclass
class Figure:
    """One measured case. Times are medians in microseconds; the ratio is the median of the rounds' own ratios."""

    name: str
    theirs_is: str
    theirs_us: float
    ours_us: float
    speedup: float
    target: float | None
    reached: bool | None


def interleave(case: Case, rounds: int) -> Figure:
    """Measure both sides in turns, so that a slow moment of the machine hits both alike."""
    sides = {"theirs": case.theirs, "ours": case.ours}
    for call in sides.values():  # warm up
        for _ in range(max(3, case.calls // 10)):
            call()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for side in sorted(sides, reverse=bool(i % 2)):
                call = sides[side]
                start = time.perf_counter()
                for _ in range(case.calls):
                    call()
                seconds[side].append((time.perf_counter() - start) / case.calls)
    finally:
        if collecting:
            gc.enable()
    speedup = statistics.median(t / o for t, o in zip(seconds["theirs"], seconds["ours"], strict=True))
    theirs, ours = (1e6 * statistics.median(seconds[side]) for side in ("theirs", "ours"))
    reached = None if case.target is None else speedup >= case.target
    return Figure(case.name, case.theirs_is, theirs, ours, speedup, case.target, reached)


def host_cases() -> list[Case]:
    """Tiny inputs, where all that is measured is what a call costs before the work begins."""
    torch.manual_seed(0)
    x, residual, weight, bias = (torch.randn(s) for s in ((8, 64), (8, 64), (64,), (64,)))
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    upstream = torch.ones(8, 64)

    def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + residual, (64,), weight, bias)

    def without_gradients(call: Call) -> Call:
        def run() -> None:
            with torch.no_grad():
                call()

        return run

    add_norm: Any = fusenc.kernels.add_norm
    arguments = (x, residual, weight, bias)
    cases = [
        Case("add_norm 8x64, no gradients", lambda: eager(*arguments), lambda: add_norm(*arguments), 500, 1 / 1.3,
             "F.layer_norm(x + r)"),
        Case("add_norm 8x64, forward with gradients", lambda: eager(*leaves), lambda: add_norm(*leaves), 500, 1 / 1.8,
             "F.layer_norm(x + r)"),
        Case("add_norm 8x64, forward and backward", lambda: eager(*leaves).backward(upstream),
             lambda: add_norm(*leaves).backward(upstream), 100, 1 / 1.8, "F.layer_norm(x + r)"),
    ]  # fmt: skip
    source = torch.randn(1, 8, 64)
    for dropout in (0.0, 0.1):
        options: dict[str, Any] = {"dropout": dropout, "activation": "gelu", "batch_first": True}
        theirs = nn.TransformerEncoderLayer(64, 4, 128, **options)
        ours = fusenc.TransformerEncoderLayer(64, 4, 128, **options)
        ours.load_state_dict(theirs.state_dict())
        if dropout == 0.0:
            evaluated = copy.deepcopy(theirs).eval(), copy.deepcopy(ours).eval()
            cases.append(_layer_case("layer 1x8x64, inference", evaluated, source, without_gradients))
            cases.append(
                _layer_case("layer 1x8x64, inference, torch's plain path", evaluated, source, without_gradients, False)
            )
        name = f"layer 1x8x64, training, dropout {dropout}"
        cases.append(_layer_case(f"{name}, forward", (theirs, ours), source, lambda call: call))
        cases.append(
            Case(f"{name}, forward and backward", lambda t=theirs: t(source).sum().backward(),  # type: ignore[misc]
                 lambda o=ours: o(source).sum().backward(), 20, 1 / 1.2, "nn.TransformerEncoderLayer")  # type: ignore[misc]
        )  # fmt: skip
    return cases


def _layer_case(
    name: str,
    layers: tuple[nn.Module, nn.Module],
    source: torch.Tensor,
    wrap: Callable[[Call], Call],
    fast: bool = True,
) -> Case:
    def theirs() -> None:
        layers[0](source)

    def plain() -> None:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # part of what is timed, some 0.2 us
        layers[0](source)
        torch.backends.mha.set_fastpath_enabled(before)

    return Case(
        name,
        wrap(theirs if fast else plain),
        wrap(lambda: layers[1](source)),
        50,
        1 / 1.2,
        "nn.TransformerEncoderLayer",
    )


def norm_cases() -> list[Case]:
    """add_norm on many rows, against the same composition in eager PyTorch."""
    torch.manual_seed(0)
    shapes = ((4096, 768), (4096, 768), (768,), (768,))
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
    upstream = torch.ones(4096, 768)
    add_norm: Any = fusenc.kernels.add_norm

    def layer_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + residual, (768,), weight, bias)

    def rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x + residual, (768,), weight, 1e-5) + bias

    def forward(call: Callable[..., torch.Tensor]) -> Call:
        def run() -> None:
            with torch.no_grad():
                call(*leaves)

        return run

    def both(call: Callable[..., torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(call(*leaves), leaves, upstream)

    cases = []
    for norm, theirs in (("layer", layer_norm), ("rms", rms_norm)):
        ours = functools.partial(add_norm, norm=norm)
        for name, wrap in (("forward", forward), ("forward and backward", both)):
            against = f"F.{norm}_norm(x + r)"
            cases.append(Case(f"add_norm 4096x768, {norm}, {name}", wrap(theirs), wrap(ours), 3, 1.0, against))
    return cases


def attention_cases() -> list[Case]:
    """Attention alone: dense against torch's own, and packed against torch's with padding and a mask."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    attention: Any = fusenc.kernels.attention
    attention_varlen: Any = fusenc.kernels.attention_varlen
    sdpa: Any = F.scaled_dot_product_attention

    def both(name: str, theirs: Call, ours: Call, leaves: list[torch.Tensor], calls: int, target: float) -> None:
        # Packed outputs lack the padding, so each side has an upstream gradient of its own shape.
        ends = {
            "": lambda out: None,
            ", forward and backward": lambda out: torch.autograd.grad(out.sum(), leaves, allow_unused=True),
        }
        for end, finish in ends.items():
            sides = [lambda call=call, finish=finish: finish(call()) for call in (theirs, ours)]
            cases.append(Case(name + end, sides[0], sides[1], calls, target, "F.scaled_dot_product_attention"))

    q, k, v = (torch.randn(4, 8, 256, 64, generator=generator).requires_grad_() for _ in range(3))
    keep = (torch.arange(256) < torch.tensor([256, 200, 130, 90])[:, None])[:, None, None]
    options: dict[str, dict[str, Any]] = {"dense": {}, "causal": {"is_causal": True}, "bool mask": {"attn_mask": keep}}
    for name, chosen in options.items():
        theirs, ours = (lambda call=call, chosen=chosen: call(q, k, v, **chosen) for call in (sdpa, attention))
        both(f"attention 4x8x256x64, {name}", theirs, ours, [q, k, v], 5, 0.95)

    lengths = torch.randint(16, 257, (16,), generator=generator).sort().values.tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    fill = sum(lengths) / (16 * 256)
    packed = [torch.randn(int(starts[-1]), 8, 64, generator=generator).requires_grad_() for _ in range(3)]
    padded = [torch.randn(16, 8, 256, 64, generator=generator).requires_grad_() for _ in range(3)]
    real = (torch.arange(256) < torch.tensor(lengths)[:, None])[:, None, None]
    both(
        f"attention_varlen, 16 sequences up to 256, fill {fill:.2f}",
        lambda: sdpa(*padded, real),
        lambda: attention_varlen(*packed, starts, starts, 256, 256),
        [*padded, *packed], 2, 0.9 / fill,
    )  # fmt: skip
    return cases


def embed_cases() -> list[Case]:
    """Embeddings with their norm against BertEmbeddings' calls, rotary positions against Hugging Face's, and the host
    cost of both on tiny inputs."""
    generator = torch.Generator().manual_seed(0)
    embed_norm, rotary = fusenc.kernels.embed_norm, fusenc.kernels.rotary
    cases = []
    for shape, width, vocabulary in (((32, 128), 768, 30522), ((32, 128), 384, 30522), ((1, 8), 64, 100)):
        tiny = shape[0] == 1
        tables = [torch.randn(n, width, generator=generator) for n in (vocabulary, 512, 2)]
        norm = [torch.ones(width), torch.zeros(width)]
        leaves = [t.clone().requires_grad_() for t in (*tables, *norm)]
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        kinds, places = torch.randint(0, 2, shape, generator=generator), torch.arange(shape[1])[None]
        upstream = torch.randn(*shape, width, generator=generator)

        def theirs(tables: Any, ids: Any = ids, kinds: Any = kinds, places: Any = places) -> torch.Tensor:
            word, position, type_, weight, bias = tables
            total = F.embedding(ids, word) + F.embedding(kinds, type_) + F.embedding(places, position)
            return F.layer_norm(total, weight.shape, weight, bias, 1e-12)

        def ours(tables: Any, ids: Any = ids, kinds: Any = kinds) -> torch.Tensor:
            return embed_norm(ids, *tables, token_type_ids=kinds)

        name = f"embed_norm {shape[0]}x{shape[1]}x{width}"
        for kind, given, calls, target in (
            ("no gradients", [*tables, *norm], 500 if tiny else 5, 1 / 1.3 if tiny else 1.0),
            ("forward and backward", leaves, 200 if tiny else 2, 1 / 1.8 if tiny else 1.0),
        ):
            finish = (lambda out, u=upstream: out.backward(u)) if given is leaves else (lambda out: None)  # type: ignore[misc]
            sides = [lambda f=f, g=given, end=finish: end(f(g)) for f in (theirs, ours)]  # type: ignore[misc]
            cases.append(Case(f"{name}, {kind}", sides[0], sides[1], calls, target, "F.embedding, F.layer_norm"))
    sizes: list[tuple[int, ...]] = [(8, 12, 128, 64), (1, 1, 8, 64)]
    for size in sizes:
        tiny = size[0] == 1
        heads = [torch.randn(size, generator=generator) for _ in range(2)]
        heads = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in heads]
        leaves = [t.clone().requires_grad_() for t in heads]
        turns = fusenc.kernels.rotary_tables(size[2], size[3])
        doubled = [torch.cat((t, t), -1)[None] for t in turns]

        def turned(x: torch.Tensor) -> torch.Tensor:
            a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return torch.cat((-b, a), dim=-1)

        def composed(q: Any, k: Any, doubled: Any = doubled) -> list[torch.Tensor]:
            cos, sin = (t.unsqueeze(1) for t in doubled)
            return [(x * cos) + (turned(x) * sin) for x in (q, k)]

        def fused(q: Any, k: Any, turns: Any = turns) -> Any:
            return rotary(q, k, *turns)

        for kind, given, calls, target in (
            ("no gradients", heads, 500 if tiny else 10, 1 / 1.3 if tiny else 1.0),
            ("forward and backward", leaves, 200 if tiny else 5, 1 / 1.8 if tiny else 1.0),
        ):
            finish = (  # type: ignore[assignment]
                (lambda out, h=heads, g=given: torch.autograd.grad(list(out), g, h))
                if given is leaves
                else (lambda out: None)
            )
            sides = [lambda f=f, g=given, end=finish: end(f(*g)) for f in (composed, fused)]  # type: ignore[misc]
            name = f"rotary {'x'.join(map(str, size))}, {kind}"
            cases.append(Case(name, sides[0], sides[1], calls, target, "apply_rotary_pos_emb"))
    return cases


def model_cases() -> list[Case]:
    """The packaged sentence encoder on 32 real sentences, ragged and of equal length."""
    from .demo import load, tokenize
    from .text import documentation_sentences

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


def ffn_cases() -> list[Case]:
    """The feed-forward block against the same composition of PyTorch's own functions."""
    generator = torch.Generator().manual_seed(0)
    ffn: Any = fusenc.kernels.ffn
    cases = []

    def theirs(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, gated: bool, residual: bool) -> torch.Tensor:
        hidden = F.linear(x, w1, b1)
        if gated:
            gate, up = hidden.chunk(2, -1)
            out = F.linear(F.silu(gate) * up, w2, b2)
        else:
            out = F.linear(F.gelu(hidden), w2, b2)
        return out + x if residual else out

    def ours(*arguments: Any) -> torch.Tensor:
        *tensors, gated, residual = arguments
        activation = "silu" if gated else "gelu"
        return ffn(*tensors, activation=activation, gated=gated, residual=tensors[0] if residual else None)

    for rows, d_model, d_hidden in ((8, 64, 128), (4096, 384, 1536), (2048, 768, 3072)):
        tiny = rows == 8
        for gated, residual in ((False, False), (False, True), (True, False)):
            width = 2 * d_hidden if gated else d_hidden
            shapes = ((rows, d_model), (width, d_model), (width,), (d_model, d_hidden), (d_model,))
            plain = [torch.randn(shape, generator=generator) for shape in shapes]
            leaves = [t.clone().requires_grad_() for t in plain]
            upstream = torch.ones(rows, d_model)
            name = f"ffn {rows}x{d_model}x{d_hidden}{', gated' * gated}{', residual' * residual}"

            def train(call: Any, options: Any, leaves: Any = leaves, upstream: Any = upstream) -> None:
                torch.autograd.grad(call(*leaves, *options), leaves, upstream)

            options = (gated, residual)
            for kind, calls, target, pair in (
                ("no gradients", 500 if tiny else 1, 1 / 1.3 if tiny else 1.0,
                 [lambda call=call, p=plain, o=options: call(*p, *o) for call in (theirs, ours)]),
                ("forward and backward", 100 if tiny else 1, 1 / 1.8 if tiny else 1.0,
                 [lambda call=call, t=train, o=options: t(call, o) for call in (theirs, ours)]),
            ):  # fmt: skip
                cases.append(Case(f"{name}, {kind}", pair[0], pair[1], calls, target, "F.linear, F.gelu or F.silu"))
    return cases


SUITES: dict[str, Callable[[], list[Case]]] = {
    "host": host_cases,
    "norm": norm_cases,
    "embed": embed_cases,
    "attention": attention_cases,
    "ffn": ffn_cases,
    "model": model_cases,
}


def run(suites: list[str], file: Path | None, threads: int | None, rounds: int) -> list[Figure]:
    """Measure the suites, print a table and, if asked, write the figures as JSON."""
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    figures = []
    with Progress(console=console, transient=True) as progress:
        for suite in suites:
            cases = SUITES[suite]()
            for case in progress.track(cases, description=suite):
                figures.append(interleave(case, rounds))
    table = Table("case", "against", "theirs, us", "ours, us", "times as fast", "target", "")
    for f in figures:
        verdict = {True: "reached", False: "missed", None: ""}[f.reached]
        columns = (f.name, f.theirs_is, f"{f.theirs_us:,.1f}", f"{f.ours_us:,.1f}", f"{f.speedup:.2f}")
        table.add_row(*columns, "" if f.target is None else f"{f.target:.2f}", verdict)
    (console if console.is_terminal else Console(width=150)).print(table)
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "fusenc": fusenc.__version__,
    }
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if file is not None:
        file.write_text(json.dumps({"machine": machine, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")
        console.print(f"Written to {file}")
    return figures
