"""What only a real GPU can show: long sequences, addresses past 2**31 elements, CUDA graphs."""

from __future__ import annotations

import fusenc
import pytest
import torch
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
