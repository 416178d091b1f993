"""What importing and installing the package does and does not do. Each case in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from fusenc.kernels.common import compat

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {blocked!r} else find(name, *rest)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "blocked", [["triton"], ["transformers"], ["triton", "transformers", "typer", "rich"]], ids=str
)
def test_works_without(blocked):
    code = BLOCK.format(blocked=blocked) + (
        "import torch, fusenc\n"
        "layer = fusenc.TransformerEncoderLayer(16, 2, batch_first=True)\n"
        "layer(torch.randn(2, 3, 16)).sum().backward()\n"
        "fusenc.fuse(torch.nn.TransformerEncoderLayer(16, 2))\n"
        "print(fusenc.kernels.last_backend())"
    )
    assert run(code) == "eager"


def test_import_is_light():
    code = "import torch, sys; before = set(sys.modules); import fusenc; print(*(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in run(code).split()}
    assert not loaded & {"triton", "transformers", "typer", "rich", "tokenizers"}


def test_kernels_is_not_a_top_level_name():
    assert str(ROOT) not in sys.path
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))
    assert run("import transformers; from transformers import BertModel; print(BertModel.__name__)") == "BertModel"


def test_version():
    from importlib.metadata import version

    import fusenc

    assert fusenc.__version__ == version("fusenc")


def test_the_lower_bounds_are_the_versions_that_the_oldest_run_installs(monkeypatch):
    """setup.py states no version that `make test-oldest` does not run on."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    stated: dict[str, object] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", stated.update)
    runpy.run_path(str(ROOT / "setup.py"))
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = {r.name: Version(str(r.specifier)[2:]) for r in map(Requirement, (x for x in lines if x[:1] not in "#"))}
    needed = [Requirement(text) for text in stated["install_requires"] + stated["extras_require"]["test"]]
    floors = {r.name: Version(s.version) for r in needed for s in r.specifier if s.operator in (">=", "==")}
    assert floors == pins
    ours = {"torch": compat.OLDEST_TORCH, "triton": compat.OLDEST_TRITON}
    assert {name: f"{pins[name].major}.{pins[name].minor}" for name in ours} == ours


@pytest.mark.parametrize(("torch", "triton"), [("2.9.1", "3.6.0"), ("2.10.0", "3.5.1+git12ab")])
def test_versions_that_are_too_old_are_named(torch, triton):
    with pytest.raises(ImportError, match=re.escape(f"found torch {torch} and Triton {triton};")):
        compat.require_supported(torch, triton)
    compat.require_supported("2.10.0+cu128", "3.6.0")
    compat.require_supported("3.0.0", "4.0")


OLD_TRITON = """
import torch, triton, fusenc
triton.__version__ = "3.5.1"
x, ones = torch.randn(2, 8), torch.ones(8)
with fusenc.kernels.use_backend({backend!r}):
    try:
        fusenc.kernels.add_norm(x, x, ones, ones)
        print(fusenc.kernels.last_backend())
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("interpret", "backend", "said"),
    [("0", "auto", "eager"), ("1", "eager", "eager"), ("1", "auto", "Triton 3.6 or newer"), ("1", "triton", "newer")],
)
def test_an_old_triton_stops_the_triton_path_and_no_other(interpret, backend, said):
    assert said in run(OLD_TRITON.format(backend=backend), TRITON_INTERPRET=interpret)
