"""Launches with the driver stubbed."""

from __future__ import annotations

import os

import fusenc
import pytest
import torch
from fusenc.bench import timing
from fusenc.bench.cases import host
from fusenc.bench.launches import count_call

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not launched"
)

from fusenc.bench.stub_driver import stubbed_driver  # noqa: E402


def test_every_public_function_has_its_launches_measured():
    known = {name for name in fusenc.kernels.__all__ if name.islower()}
    without_kernels = {
        "alibi_slopes", "get_backend", "last_backend", "rotary_tables", "sdpa_replacement", "set_backend",
        "sinusoidal_positions", "t5_relative_bias", "use_backend",
    }  # fmt: skip
    assert set(host.FUNCTIONS) == known - without_kernels


@pytest.mark.parametrize("name", host.FUNCTIONS)
def test_launches_reach_the_driver_through_the_real_launcher(name):
    of = host.FUNCTIONS[name]
    for direction in ("forward", "both") if of.gradients else ("forward",):
        case = host.launching(name, direction, timing.Cpu())
        with case.within() as driver:
            ours = case.providers["fusenc"]()(case.inputs())
            ours()
            before = driver.launches
            ours()
            counted = driver.launches - before
            assert fusenc.kernels.last_backend() != "eager" and counted > 0
            total = count_call(ours)  # with torch's own operators, of which the driver sees none
            assert counted <= total


def test_add_norm_launches_one_kernel_forward_and_two_backward():
    x, weight = torch.randn(8, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    with stubbed_driver() as driver:
        out = fusenc.kernels.add_norm(x, x, weight)
        assert driver.launches == 1
        out.backward(torch.ones(8, 64))
        assert driver.launches == 3


def test_afterwards_all_is_as_before():
    from fusenc.kernels.add_norm.forward import add_norm_forward_kernel
    from triton.runtime import driver

    x, weight = torch.randn(8, 64), torch.ones(64)
    before = driver._active
    with stubbed_driver():
        fusenc.kernels.add_norm(x, x, weight)
    assert driver._active is before and "stub" not in add_norm_forward_kernel.device_caches
    out = fusenc.kernels.add_norm(x, x, weight)
    assert fusenc.kernels.last_backend() == "eager"
    assert torch.allclose(out, torch.nn.functional.layer_norm(2 * x, (64,)), atol=1e-5)


def test_eager_code_beside_it_computes_as_ever():
    for case in host.cases({"direction": ("both",)}, timing.Cpu()):
        if case.name.startswith("launching add_norm"):
            inputs = case.inputs()
            with case.within():
                out, gradients = case.providers["eager"]()(inputs)()
            assert not out.isnan().any() and len(gradients) == 4
