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


@pytest.mark.parametrize(("chip", "has"), [("gfx942", True), ("gfx90a", False), ("gfx1100", False), ("sm_80", True)])
def test_amd_chips_without_tf32_stay_ieee(monkeypatch, chip, has):
    from fusenc.kernels.common import device as gpu

    monkeypatch.setattr(gpu, "architecture", lambda index: chip)
    assert gpu.has_tf32(0) is has


def test_an_amd_chip_is_named_without_its_features(monkeypatch):
    from fusenc.kernels.common import device as gpu

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = types.SimpleNamespace(gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert gpu.architecture.__wrapped__(0) == "gfx942"


@pytest.mark.parametrize(
    ("chip", "family"),
    [("sm_87", "ada"), ("sm_103", "hopper"), ("sm_121", "ada"), ("gfx950", "cdna"), ("gfx1201", ""), ("sm_75", "")],
)
def test_an_unknown_chip_takes_its_nearest_older_relatives_configurations(monkeypatch, caplog, chip, family):
    from fusenc.kernels.common import device as gpu

    monkeypatch.setattr(gpu, "architecture", lambda index: chip)
    gpu._family_of_relative.cache_clear()
    assert gpu.family(0) == gpu.family(0) == family
    assert len(caplog.records) == (family != "")
