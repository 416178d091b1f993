"""Every kernel compiles for every supported chip, fits it, and keeps its data in registers."""

from __future__ import annotations

import os

import pytest
import torch
from fusenc.kernels import add_norm, attention, ffn

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels cannot be compiled"
)
ARCHS = ["sm_80", "sm_90", "gfx942"]

# Kernels that spill, and why: (kernel, element size, head size or width).
SPILLS = {
    ("attention_dkdv_kernel", 4, 128): "float32 dot products run on FMA units and hold both operands in registers",
    ("attention_dkdv_kernel", 4, 256): "likewise",
    ("attention_dq_kernel", 4, 128): "likewise",
    ("attention_dq_kernel", 4, 256): "likewise",
    ("add_norm_backward_kernel", 2, 16384): "two float32 accumulators of 16,384 columns do not fit 512 threads",
    ("add_norm_backward_kernel", 4, 16384): "likewise",
}


def launches_of(call, *shapes, dtype):
    from fusenc.bench.ahead import record_launches

    inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    with record_launches() as launches:
        out = call(*inputs)
        out.backward(torch.empty_like(out))
    return launches


def check(launches, element_size, size):
    from fusenc.bench.ahead import SHARED_MEMORY, compile_ahead

    assert launches
    for launch in launches:
        for arch in ARCHS:
            needs = compile_ahead(launch, arch)
            name = launch.kernel.__name__
            assert needs.shared <= SHARED_MEMORY[arch], f"{name} on {arch}: {needs}"
            if (name, element_size, size) not in SPILLS:
                assert needs.spilled == 0, f"{name} on {arch}: {needs}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
def test_attention(dtype, head_dim):
    if dtype == torch.bfloat16 and head_dim != 64:
        pytest.skip("the same machine code as float16 but for the type of one instruction")
    launches = launches_of(attention, *[(2, 4, 512, head_dim)] * 3, dtype=dtype)
    assert [launch.kernel.__name__ for launch in launches] == [
        "attention_forward_kernel", "delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel",
    ]  # fmt: skip
    check(launches, torch.empty(0, dtype=dtype).element_size(), head_dim)


OPTIONS = {
    "causal": {"is_causal": True},
    "padding mask": {"attn_mask": torch.ones(2, 1, 1, 512, dtype=torch.bool)},
    "full mask": {"attn_mask": torch.zeros(2, 4, 512, 512)},
    "dropout": {"dropout_p": 0.1},
}


@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("head_dim", [64, 80])
def test_attention_options(option, head_dim):
    from fusenc.bench.ahead import SHARED_MEMORY, compile_ahead

    launches = launches_of(
        lambda q, k, v: attention(q, k, v, **OPTIONS[option]), *[(2, 4, 512, head_dim)] * 3, dtype=torch.float16
    )
    for launch in launches:
        for arch in ARCHS:
            assert compile_ahead(launch, arch).shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 384, 768, 1024, 4096, 8192, 16384])
def test_add_norm(dtype, width):
    launches = launches_of(add_norm, (512, width), (512, width), (width,), (width,), dtype=dtype)
    check(launches, torch.empty(0, dtype=dtype).element_size(), width)
    launches = launches_of(
        lambda *t: add_norm(*t, dropout_p=0.1), (512, width), (512, width), (width,), (width,), dtype=dtype
    )
    check(launches, torch.empty(0, dtype=dtype).element_size(), width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_ffn(dtype, activation):
    shapes = ((512, 768), (3072, 768), (3072,), (768, 3072), (768,))
    for dropout_p in (0.0, 0.1):
        launches = launches_of(
            lambda *t, p=dropout_p: ffn(*t, activation=activation, dropout_p=p), *shapes, dtype=dtype
        )
        check(launches, torch.empty(0, dtype=dtype).element_size(), 768)


def test_a_spilling_kernel_is_seen():
    """The control: a block far too large for the registers must be reported."""
    from fusenc.bench.ahead import compile_ahead

    launches = launches_of(add_norm, (512, 16384), (512, 16384), (16384,), (16384,), dtype=torch.float32)
    backward = next(launch for launch in launches if launch.kernel.__name__ == "add_norm_backward_kernel")
    assert compile_ahead(backward, "sm_80").spilled > 0


def test_an_unknown_arch_is_named():
    from fusenc.bench.ahead import compile_ahead

    launches = launches_of(add_norm, (4, 64), (4, 64), (64,), (64,), dtype=torch.float32)
    with pytest.raises(ValueError, match="sm_80"):
        compile_ahead(launches[0], "sm_1")
