"""What layers keep in memory for their backward pass, in elements for each element of the hidden states."""

from __future__ import annotations

import os

import fusenc
import pytest
import torch
from fusenc.bench import measure, timing
from fusenc.bench.cases import layer as layer_cases
from fusenc.bench.cases.case import Point
from fusenc.bench.kept import kept_bytes
from torch import nn

TOKENS, WIDTH = (2, 8), 96
KEPT, RECOMPUTED = 16.1, 12.1
"""Two sums and two norms' results, query, key and value, attention's output, and a hidden layer 4 times as wide before
and after its activation; 0.1 for statistics of norms and softmax. A recomputed activation is not kept."""


def torch_layer(dropout, norm_first=False, kind=nn.TransformerEncoderLayer):
    return kind(WIDTH, 2, 4 * WIDTH, dropout, "gelu", batch_first=True, norm_first=norm_first)


def bert(dropout):
    modeling = pytest.importorskip("transformers.models.bert.modeling_bert")
    config = modeling.BertConfig(
        hidden_size=WIDTH, num_attention_heads=2, intermediate_size=4 * WIDTH, num_hidden_layers=1,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation="sdpa",
    )  # fmt: skip
    return modeling.BertEncoder(config).train()


LAYERS = {"torch.nn post-norm": torch_layer, "torch.nn pre-norm": lambda p: torch_layer(p, True), "BERT": bert}


def kept(layer, device):
    x = torch.randn(*TOKENS, WIDTH).to(device).requires_grad_()
    return kept_bytes(lambda: layer(x)) / (x.numel() * x.element_size())


@pytest.mark.kernel
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_fused_layer_keeps_as_little_with_dropout_and_less_with_recompute(device, backend, name, dropout):
    if backend == "eager":
        pytest.skip("eager PyTorch keeps what it likes")
    for recompute, most in ((False, KEPT), (True, RECOMPUTED)):
        layer = LAYERS[name](dropout).to(device)
        fusenc.fuse(layer, strict=True, recompute=recompute)
        found = kept(layer, device)
        assert fusenc.kernels.last_backend() == backend
        assert most - 0.1 <= found <= most


@pytest.mark.parametrize("name", LAYERS)
def test_a_stock_layer_keeps_no_less(name):
    assert KEPT - 0.1 <= kept(LAYERS[name](0.0), "cpu") <= KEPT
    assert kept(LAYERS[name](0.1), "cpu") >= KEPT + 2.0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not recorded")
def test_bench_layer_states_it_as_on_a_gpu():
    pytest.importorskip("triton")
    point = Point("float32", *TOKENS, WIDTH, 2, 1.0, "both", "cpu", "cpu")
    limits = measure.Limits(rounds=1, seconds=0.0, least=1)
    for dropout in (0.0, 0.1):
        found = measure.measure(layer_cases.case(point, dropout=dropout), timing.Cpu(), None, limits)
        kept = {name: found[name].kept for name in ("torch.nn", "fusenc", "fusenc-recompute")}
        assert KEPT - 0.1 <= kept["fusenc"] <= KEPT and RECOMPUTED - 0.1 <= kept["fusenc-recompute"] <= RECOMPUTED
        assert kept["torch.nn"] >= (KEPT if dropout else KEPT - 0.1)


def test_parameters_and_their_views_are_left_out_and_a_storage_counts_once():
    linear, x = nn.Linear(8, 4, bias=False), torch.randn(3, 8, requires_grad=True)
    assert kept_bytes(lambda: linear(x)) == x.nbytes
    assert kept_bytes(lambda: linear(x) + x[:, :4] * x[:, 4:]) == x.nbytes
    assert kept_bytes(lambda: linear(x.exp())) == x.nbytes
