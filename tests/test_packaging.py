"""What importing and installing the package does and does not do. Each case in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT)
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
