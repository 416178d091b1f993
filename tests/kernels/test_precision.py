"""float32 dot products follow torch's own TF32 switches, old and new."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

SWITCHES = {
    "": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}


@pytest.mark.parametrize("switch", list(SWITCHES), ids=lambda s: s or "default")
def test_switch(switch):
    code = f"import torch; {switch}\nfrom fusenc.kernels.common.device import input_precision"
    code += "\nprint(input_precision(torch.empty(1)), input_precision(torch.empty(1, dtype=torch.float16)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [SWITCHES[switch], "ieee"]


@pytest.mark.parametrize(("chip", "has"), [("gfx942:sramecc+", True), ("gfx90a", False), ("gfx1100", False)])
def test_amd_chips_without_tf32_stay_ieee(monkeypatch, chip, has):
    from fusenc.kernels.common import device as gpu

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(gcnArchName=chip))
    gpu.has_tf32.cache_clear()
    assert gpu.has_tf32(0) is has
    gpu.has_tf32.cache_clear()
