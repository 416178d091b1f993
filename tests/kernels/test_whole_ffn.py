"""The whole feed-forward block in one kernel, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import FLOOR, FORWARD_FACTOR

pytest.importorskip("triton")
from fusenc.kernels.ffn.whole import CONFIGS, WholeConfig, fills, serving, whole_ffn

SMALL = WholeConfig(32, 32, 16, 4, 2)
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@pytest.fixture(autouse=True)
def _kernels_run(request):
    if request.node.get_closest_marker("kernel") and request.config.getoption("--device") == "cpu":
        pytest.skip("a launcher, which has no eager side")


def tensors(rows, d_model, d_hidden, dtype, device):
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, d_model), (d_hidden, d_model), (d_hidden,), (d_model, d_hidden), (d_model,), (rows, d_model))
    x, w1, b1, w2, b2, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    scaled = (x, w1 / d_model**0.5, b1, w2 / d_hidden**0.5, b2, residual)
    return [t.to(dtype).to(device) for t in scaled]


def plain(x, w1, b1, w2, b2, residual, activation):
    out = F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)
    return out if residual is None else out + residual


def check(inputs, activation="gelu", config=SMALL):
    got = whole_ffn(*inputs, activation, config)(*inputs)
    truth = plain(*(None if t is None else t.double() for t in inputs), activation)
    eager = plain(*inputs, activation)
    assert got.shape == truth.shape and got.dtype == eager.dtype and not got.isnan().any()
    dtype = got.dtype
    allowed = FORWARD_FACTOR * (eager.double() - truth).abs().max()
    allowed += FLOOR[dtype] * torch.finfo(dtype).eps * truth.abs().max()
    assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_and_a_width_of_three_blocks(device, dtype, activation):
    check(tensors(70, 48, 192, dtype, device), activation)


@pytest.mark.kernel
@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [1, 31, 32, 65])
@pytest.mark.parametrize("absent", [(), (2,), (4,), (5,), (2, 4, 5)], ids=str)
def test_rows_and_absent_arguments(device, rows, absent):
    inputs = tensors(rows, 32, 64, torch.float16, device)
    check([None if i in absent else t for i, t in enumerate(inputs)])


@pytest.mark.kernel
@pytest.mark.parametrize("chip", list(CONFIGS), ids=str)
def test_shipped_configurations(device, chip):
    check(tensors(150, chip[1], 2 * chip[1], torch.float16, device), config=CONFIGS[chip])


@pytest.mark.kernel
def test_strides(device):
    x, w1, b1, w2, b2, residual = tensors(60, 32, 64, torch.float16, device)
    w1, w2 = torch.cat([w1, w1], 1)[:, :32], torch.cat([w2, w2], 1)[:, 64:]
    wide = torch.cat([residual, x], 1)
    check([wide[:, 32:], w1, b1, w2, b2, wide[:, :32]])
    check([x.view(3, 20, 32).transpose(0, 1), w1, b1, w2, b2, residual.view(3, 20, 32).transpose(0, 1)])
    check([x.t().contiguous().t(), w1, b1, w2, b2, residual.t().contiguous().t()])


@pytest.mark.kernel
def test_empty_batch(device):
    x, *rest = tensors(0, 32, 64, torch.float16, device)
    inputs = (x.view(2, 0, 32), *rest[:-1], None)
    assert whole_ffn(*inputs, "gelu", SMALL)(*inputs).shape == (2, 0, 32)


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_it_serves_only_what_the_table_says():
    x, w1, w2 = meta(8, 2048, 256), meta(1024, 256), meta(256, 1024)
    assert serving(x, w1, w2, "sm_90") == CONFIGS["sm_90", 256]
    for arch in ("sm_80", "sm_86", "gfx942", ""):
        assert not serving(x, w1, w2, arch)
    assert not serving(meta(8, 2048, 256, dtype=torch.float32), w1, w2, "sm_90")
    assert not serving(x, w1, meta(128, 1024), "sm_90"), "d_out is not d_model"
    assert not serving(x, meta(1000, 256), meta(256, 1000), "sm_90"), "hidden blocks are not checked against an edge"
    assert not serving(x, meta(256, 1024).t(), w2, "sm_90"), "columns are read with unit stride"
    assert not serving(meta(8, 2048, 384), meta(1536, 384), meta(384, 1536), "sm_90")


def test_it_serves_rows_that_fill_the_chip():
    config = CONFIGS["sm_90", 256]
    assert fills(8 * 2048, config, 132)
    assert not fills(7 * 2048, config, 132), "too few rows for the chip"
    assert not fills(20_000, config, 132), "the second round of programs would be nearly empty"


@pytest.mark.kernel
@pytest.mark.interpreter
def test_traffic_is_the_weights_once_a_program_and_rows_once(request, device):
    if request.config.getoption("--device") != "interpreter":
        pytest.skip("counts accesses of the interpreter")
    from fusenc.bench.traffic import count_traffic

    inputs = tensors(64, 32, 128, torch.float16, device)
    with count_traffic() as (launches):
        whole_ffn(*inputs, "gelu", SMALL)(*inputs)
    (one,) = launches
    for name, a in one.arguments.items():
        again = 1 if name in ("x_ptr", "residual_ptr") else 2  # two programs of 32 rows
        assert a.loaded == again * a.loaded_once and a.stored == a.stored_once, name
    assert sum(a.stored for a in one.arguments.values()) == 64 * 32 * 2, "no hidden activation"
    assert one.dot_flops == 4 * 64 * 32 * 128
