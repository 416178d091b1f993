"""`fusenc verify` on shipped functions and on a script of one's own."""

from __future__ import annotations

import os

import pytest
import torch
from fusenc.bench.commands import app
from typer.testing import CliRunner

pytest.importorskip("ttsem")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="ttsem compiles kernels")

SCRIPT = """
import torch, triton, triton.language as tl

@triton.jit
def fill(out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, 1.0, mask=offsets < n{bug})

out = torch.empty(100, device="cuda")
fill[(2,)](out, 100, 64)
assert out.sum() == 100
"""


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments])


def test_a_script_without_and_with_an_overrun(tmp_path, capfd):
    script = tmp_path / "program.py"
    script.write_text(SCRIPT.format(bug=""))
    assert run(str(script)).exit_code == 0
    script.write_text(SCRIPT.format(bug=" + 1"))
    assert run(str(script)).exit_code == 1
    assert "1 element(s) past the end" in capfd.readouterr().out


def test_bad_targets():
    unknown = run("nope")
    assert unknown.exit_code == 2 and "attention, add_norm, ffn, linear_act, embed_norm" in unknown.output
    assert run("missing.py").exit_code == 2


def test_without_ttsem_it_says_what_to_install(monkeypatch):
    from fusenc.bench import verify

    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    failed = run("add_norm")
    assert failed.exit_code == 2 and "pip install" in failed.output


def test_shipped_functions_are_clean_and_wrong_values_are_seen(monkeypatch, tmp_path):
    from fusenc.bench import verify

    before = torch.cuda.is_available
    options = [o for o in verify._options() if o[0] == "add_norm"][:2]
    monkeypatch.setattr(verify, "_options", lambda: iter(options))
    table = tmp_path / "table.md"
    clean = run("--markdown", str(table))
    assert clean.exit_code == 0 and "6 launches: no overrun" in " ".join(clean.output.split())
    assert "| add_norm | float32 | 3 | 0 |" in table.read_text()

    from fusenc.kernels.add_norm import forward

    real = forward.add_norm_forward

    def another_eps(like, options, needs):
        return real(like, options._replace(eps=0.1), needs)

    monkeypatch.setattr(forward, "add_norm_forward", another_eps)
    rows = verify.verify([])
    assert all("values" in row.fault for row in rows)
    assert torch.cuda.is_available is before  # the pretence of a GPU ends with the search
