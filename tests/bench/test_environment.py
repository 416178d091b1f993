"""`fusenc env`."""

from __future__ import annotations

import json

import fusenc
import torch
from fusenc.bench import commands, environment
from fusenc.kernels.common import tuned
from typer.testing import CliRunner


def test_the_report_names_versions_machine_and_settings(monkeypatch, tmp_path):
    table = tmp_path / "team.json"
    table.write_text("not a table")
    monkeypatch.setenv("FUSENC_TUNED", str(table))
    result = CliRunner().invoke(commands.app, ["env", "--json"])
    assert result.exit_code == 0
    sections = json.loads(result.output)
    assert sections["fusenc"]["version"] == fusenc.__version__ and sections["packages"]["torch"]
    assert "unreadable" in sections["fusenc"]["tables"] and str(table) in sections["fusenc"]["tables"]
    assert sections["environment"]["FUSENC_TUNED"] == str(table)
    assert sections["torch"]["threads"] == str(torch.get_num_threads())
    plain = CliRunner().invoke(commands.app, ["env"]).output
    assert all(f"{title}:" in plain for title in sections)


def test_a_gpu_is_named(monkeypatch):
    class Properties:
        name, total_memory = "Stub chip", 2**34

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(environment.gpu, "architecture", lambda index: "sm_90")
    assert environment.collect()["gpus"] == {"0": "Stub chip, sm_90, 16.0 GiB"}


def test_the_commit_is_that_of_this_files_own_checkout(monkeypatch, tmp_path):
    assert environment.commit() is None or len(environment.commit()) >= 12
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() is None
    assert environment.summary()["commit"] == "none"


def test_tuned_choices_are_counted(monkeypatch, tmp_path):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"fusenc_table": tuned.VERSION, "choices": {"a": {"x": "fused", "y": "unfused"}}}))
    monkeypatch.setattr(tuned, "cache_file", lambda: file)
    monkeypatch.delenv("FUSENC_TUNED", raising=False)
    assert environment.collect()["fusenc"]["tables"] == f"{file} (2 choices)"
