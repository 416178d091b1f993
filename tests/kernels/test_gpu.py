"""What only a real GPU can show: long sequences, addresses past 2**31 elements, CUDA graphs."""

from __future__ import annotations

import subprocess
import sys

import fusenc
import pytest
import torch
from fusenc.bench import timing
from fusenc.bench.cases import model
from fusenc.bench.cases.case import Point, flat
from fusenc.bench.checking import difference
from fusenc.kernels import add_norm, attention, ffn
from tolerances import HALF_PRECISION, SAME_ALGORITHM

pytestmark = pytest.mark.gpu


def test_long_sequences(device):
    q, k, v = (torch.randn(1, 4, 8192, 64, device=device, dtype=torch.float16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert (attention(q, k, v, is_causal=True).float() - expected).abs().max() < HALF_PRECISION


def test_more_than_2_to_the_31_elements(device):
    width = 1024
    x = torch.zeros(2**21 + 3, width, device=device, dtype=torch.float16)
    x[-1] = torch.arange(width, device=device)
    out = add_norm(x, None, None)
    expected = torch.nn.functional.layer_norm(x[-1].float(), (width,))
    assert (out[-1].float() - expected).abs().max() < HALF_PRECISION and (out[:-1] == 0).all()


def test_cuda_graph(device):
    layer = fusenc.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True).to(device).eval()
    x = torch.randn(2, 33, 64, device=device)
    with torch.inference_mode():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
    torch.testing.assert_close(out, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@pytest.mark.parametrize("fill", [0.5, 1.0], ids=["ragged", "full"])
@pytest.mark.parametrize(("direction", "autocast"), [("forward", False), ("both", True)], ids=["inference", "training"])
def test_a_captured_model_computes_what_its_calls_compute(device, fill, direction, autocast):
    pytest.importorskip("transformers")
    gpu = timing.Gpu()
    point = Point("bfloat16", 4, 128, 256, 4, fill, direction, gpu.kind, gpu.where)
    case = model.case(point, gpu, 2, autocast)
    inputs = case.inputs()
    expected, got = (case.views[name](flat(case.providers[name]()(inputs)())) for name in ("fusenc", "fusenc-graph"))
    assert not difference(got, expected, torch.bfloat16)


AFTER_A_FAILED_CAPTURE = """
import torch
from fusenc.bench.timing import Gpu
gpu, x = Gpu(), torch.ones(4, device="cuda")
for _ in range(2):
    try:
        gpu.captured(lambda: (x + x).sum().item())
        raise SystemExit("captured a wait")
    except RuntimeError as error:
        print(error)
gpu.release()
print(torch.randn(4, device="cuda").sum().item() < 9.0, torch.cuda.current_stream() == torch.cuda.default_stream())
"""


def test_a_capture_that_fails_harms_nothing_after_it(device):
    """In another process, since a failure would harm the tests after this one."""
    command = [sys.executable, "-P", "-c", AFTER_A_FAILED_CAPTURE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("an earlier capture failed\nTrue True\n"), done.stderr


def test_compiles_with_inductor(device):
    layer = fusenc.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True).to(device)
    x = torch.randn(2, 33, 64, device=device)
    expected, got = layer(x), torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=10 * SAME_ALGORITHM)
    assert fusenc.kernels.last_backend() == "triton"


def test_no_call_waits_for_the_gpu(device):
    x, w = torch.randn(64, 64, device=device), torch.ones(64, device=device)
    weight = torch.randn(64, 64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_norm(x, x, w, w, dropout_p=0.1)
        ffn(x, weight, w, weight, w, dropout_p=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
