"""The roofline model."""

from __future__ import annotations

import pytest
from fusenc.bench.commands import app
from fusenc.bench.machine_code.chips import chips
from fusenc.bench.roofline import MODELS, WAYS, layer
from typer.testing import CliRunner

BASE = MODELS["bert-base"]


def test_flops_of_a_layer_are_those_of_the_textbook():
    """Forward 24 T d^2 + 4 T L d with f = 4 d; backward twice that, and flash attention computes the scores again."""
    t, d, length = 32 * 512, 768, 512
    for way in WAYS:
        forward, backward = layer(BASE, 32, length, way)
        flops = sum(k.times * k.flops for k in forward)
        assert flops == pytest.approx(24 * t * d * d + 4 * t * length * d)
        matrix = 2 * t * length * d
        again = {"eager": 0, "sdpa": 1, "compiled": 1, "fused": 3}[way]
        assert sum(k.times * k.flops for k in backward) == pytest.approx(48 * t * d * d + (4 + again) * matrix)


def test_each_step_of_fusion_moves_less():
    chip = chips()["sm_90"]
    forward, backward = zip(*(layer(BASE, 32, 512, way) for way in WAYS), strict=True)
    for side in (forward, backward):
        moved = [sum(k.times * k.bytes for k in kernels) for kernels in side]
        assert moved == sorted(moved, reverse=True)
    assert [len(forward[-1]), len(backward[-1])] == [7, 12]  # as `fusenc inspect --launches` counts them
    bounds = [sum(k.seconds(chip) for k in kernels) for kernels in forward]
    assert bounds == sorted(bounds, reverse=True)


def test_a_kernel_takes_the_longer_of_its_two_times():
    from fusenc.bench.roofline import Kernel

    a100 = chips()["sm_80"]
    assert Kernel("k", 312e12, 0.0).seconds(a100) == pytest.approx(1.0)
    assert Kernel("k", 1.0, 2.039e12).seconds(a100) == pytest.approx(1.0)


def test_command():
    def run(*arguments):
        return CliRunner().invoke(app, ["roofline", *arguments])

    shown = run("--model", "bert-base", "--batch", "32", "--seq", "512", "--gpu", "a100,h100", "--details")
    assert shown.exit_code == 0 and all(word in shown.output for word in ("A100", "H100", "tensor cores"))
    wrong = {"--gpu": ("abacus", "a100"), "--model": ("gpt", "bert-base"), "--batch": ("0", "--batch"),
             "--nhead": ("7", "--nhead"), "--seq": ("-1", "--seq")}  # fmt: skip
    for option, (value, named) in wrong.items():
        failed = run(option, value)
        assert failed.exit_code == 2 and named in failed.output, option
