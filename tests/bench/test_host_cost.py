"""The host cost of a call up to the stubbed driver, as a ratio to what PyTorch's own takes in the same run."""

from __future__ import annotations

import gc
import os
import statistics

import pytest
import torch
from fusenc.bench import timing
from fusenc.bench.cases import host
from tolerances import HOST_COST

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not launched"
)
REACHED = {
    ("attention", "both"): 1.6, ("add_norm", "both"): 1.8, ("linear_act", "both"): 1.1, ("ffn", "forward"): 1.0,
    ("ffn", "both"): 1.0, ("embed_norm", "both"): 1.3, ("encoder_layer", "forward"): 1.0,
    ("encoder_layer", "both"): 0.95, ("nn.TransformerEncoderLayer", "forward"): 1.0,
    ("nn.TransformerEncoderLayer", "both"): 0.9,
}  # fmt: skip
"""What is held where the target of `bench/cases/host.py` is not reached."""
REACHED_BY_BERT = {"no gradients": 0.7, "with gradients": 0.9, "with gradients, autocast": 0.8}
"""The same of the layers of Hugging Face's BERT."""


def _ratio(case) -> float:
    """Our time over the yardstick's: the median of rounds, in each of which both take their turn."""
    device = timing.Cpu()
    with case.within():
        calls = [case.providers[name]()(case.inputs()) for name in ("fusenc", case.against[0])]
        for call in calls:
            device.seconds(call, 50)
        gc.collect()
        rounds = [[device.seconds(call, 40) for call in calls] for _ in range(25)]
    return statistics.median(ours / stock for ours, stock in rounds)


def _hold(case, held):
    torch.set_num_threads(1)
    ratios = []
    for _ in range(3):  # a busy moment of the machine does not count
        ratios.append(_ratio(case))
        if ratios[-1] <= HOST_COST * held:
            return
    pytest.fail(f"{case.name}: {min(ratios):.2f} times the yardstick's cost, held to {held} x {HOST_COST}")


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("name", list(host.LAUNCHING))
def test_ratio(name, direction):
    layer = name == "nn.TransformerEncoderLayer"
    case = host.launching_layer(direction, timing.Cpu()) if layer else host.launching(name, direction, timing.Cpu())
    _hold(case, REACHED.get((name, direction), host.LAUNCHING[name][direction == "both"]))


@pytest.mark.parametrize("how", list(host.BERT))
def test_ratio_of_bert_layers(how):
    pytest.importorskip("transformers")
    _hold(host.launching_bert(how, timing.Cpu()), REACHED_BY_BERT.get(how, host.BERT[how]))
