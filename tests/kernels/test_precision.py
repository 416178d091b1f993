"""float32 dot products follow torch's own TF32 switches, old and new."""

from __future__ import annotations

import subprocess
import sys

import pytest

SWITCHES = {
    "": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}


@pytest.mark.parametrize("switch", list(SWITCHES), ids=lambda s: s or "default")
def test_switch(switch):
    code = f"import torch; {switch}\nfrom fusenc.kernels.common.launch import input_precision; print(input_precision())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == SWITCHES[switch]
