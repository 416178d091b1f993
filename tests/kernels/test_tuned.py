"""Reading tables of measured choices."""

from __future__ import annotations

import json
import os
import sys
import timeit
import warnings

import pytest
import torch
from fusenc.kernels.common import tuned

SIZES = (4096, 3072, 768)
HALF = torch.float16


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU called "Chip" and a cache folder of its own."""
    monkeypatch.setattr(tuned.device, "name", lambda index: "Chip" if not index else "Other chip")
    monkeypatch.setattr(tuned, "cache_file", lambda: tmp_path / "tuned.json")
    monkeypatch.delenv(tuned.ENVIRONMENT, raising=False)
    tuned.forget()
    tuned._warn.cache_clear()
    yield tmp_path / "tuned.json"
    tuned.forget()


def write(file, choice, gpu="Chip", version=tuned.VERSION, sizes=SIZES):
    table = {tuned.section_of(gpu): {tuned.text_of("op", HALF, sizes): choice}}
    file.write_text(json.dumps({"fusenc_table": version, "choices": table}))


def test_what_was_measured_is_chosen_for_all_sizes_of_its_bucket(gpu):
    write(gpu, "unfused")
    assert tuned.choice("op", 0, HALF, SIZES) == "unfused"
    assert tuned.choice("op", None, HALF, (2049, 3000, 1000)) == "unfused"
    assert tuned.choice("op", 0, HALF, (2048, *SIZES[1:])) is None
    assert tuned.choice("op", 0, torch.float32, SIZES) is None
    assert tuned.choice("another", 0, HALF, SIZES) is None
    assert tuned.choice("op", 1, HALF, SIZES) is None, "another GPU in the same machine"


def test_nothing_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "cache_file", lambda: pytest.fail("looked for a table"))
    monkeypatch.setattr(tuned.device, "name", lambda index: None)
    tuned.forget()
    assert tuned.choice("op", None, HALF, SIZES) is None
    tuned.forget()


def test_a_named_table_wins_and_the_cache_fills_in(gpu, monkeypatch, tmp_path):
    named = tmp_path / "team.json"
    write(gpu, "from the cache")
    write(named, "from the team")
    assert tuned.choice("op", 0, HALF, SIZES) == "from the cache"
    monkeypatch.setenv(tuned.ENVIRONMENT, str(named))
    tuned.forget()
    assert tuned.choice("op", 0, HALF, SIZES) == "from the team"
    write(named, "from the team", sizes=(1, 1, 1))
    tuned.forget()
    assert tuned.choice("op", 0, HALF, SIZES) == "from the cache"


BAD = {
    "cut off": '{"fusenc_table": 1, "choices": {"Ch',
    "binary": "\x00\x01",
    "another program's": '{"a": 1}',
    "a list": "[]",
    "another version": json.dumps({"fusenc_table": tuned.VERSION + 1, "choices": {}}),
    "choices that are no names": '{"fusenc_table": 1, "choices": {"Chip": {"op": 3}}}',
    "sections that are none": '{"fusenc_table": 1, "choices": {"Chip": []}}',
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_a_bad_table_is_ignored_with_one_warning(gpu, text):
    gpu.write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tuned.choice("op", 0, HALF, SIZES) is None
        assert tuned.choice("op", 0, HALF, (1, 1, 1)) is None
        assert tuned.choice("op", 1, HALF, SIZES) is None
    (warning,) = caught
    assert warning.category is RuntimeWarning and str(gpu) in str(warning.message)


def test_a_named_table_that_is_not_there_warns(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.ENVIRONMENT, str(tmp_path / "nowhere.json"))
    with pytest.warns(RuntimeWarning, match=r"nowhere\.json"):
        assert tuned.choice("op", 0, HALF, SIZES) is None


def test_a_foreign_gpus_table_says_nothing_and_warns_of_nothing(gpu):
    write(gpu, "unfused", gpu="Another chip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.choice("op", 0, HALF, SIZES) is None


def test_another_tritons_choices_do_not_count(gpu, monkeypatch):
    write(gpu, "unfused")
    monkeypatch.setattr(tuned, "_triton_version", lambda: "2.0.0")
    assert tuned.choice("op", 0, HALF, SIZES) is None


def test_ever_new_sizes_do_not_fill_the_memory(gpu, monkeypatch):
    monkeypatch.setattr(tuned, "_MOST_ANSWERS", 8)
    for rows in range(100):
        tuned.choice("op", 0, HALF, (rows, 1, 1))
    assert len(tuned._answers) <= 8


def test_a_call_costs_well_below_a_microsecond(gpu):
    write(gpu, "unfused")
    tuned.choice("op", 0, HALF, SIZES)
    best = min(timeit.repeat(lambda: tuned.choice("op", 0, HALF, SIZES), number=2000, repeat=20)) / 2000
    assert best < 1e-6, f"{1e9 * best:.0f} ns"


def test_platformdirs_is_imported_only_when_asked():
    import subprocess

    code = "import sys, fusenc; from fusenc.kernels.common import tuned; import torch\n"
    code += "tuned.choice('op', None, torch.float16, (1,)); print('platformdirs' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before = "import torch, sys; print('platformdirs' in sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-P", "-c", c], capture_output=True, text=True, env=env) for c in (before, code)
    ]
    if torch.cuda.is_available() or runs[0].stdout.strip() == "True":
        pytest.skip("there is a GPU, or torch imports it itself")
    assert runs[1].stdout.strip() == "False", runs[1].stderr
