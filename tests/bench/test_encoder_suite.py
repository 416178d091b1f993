"""The benchmark of whole encoders: the batches it makes of real text, and that nothing wrong gets a time."""

from __future__ import annotations

import fusenc
import pytest
import torch
from fusenc.bench import cases, measure, timing
from fusenc.bench.cases import encoder, model

TINY = {"batch": (3,), "length": (4,), "width": (32,), "heads": (2,), "fill": (0.5,), "direction": ("both",)}


@pytest.mark.parametrize("wrong", ["weight", "gradient"])
def test_an_encoder_with_wrong_values_is_not_timed(monkeypatch, wrong):
    right = fusenc.fuse

    def fuse(model):
        right(model)
        parameter = model.layers[0].linear1.bias
        if wrong == "weight":
            with torch.no_grad():
                parameter += 0.01
        else:
            parameter.register_hook(lambda gradient: 1.01 * gradient)

    monkeypatch.setattr(fusenc, "fuse", fuse)
    case = cases.cases(["encoder"], TINY, timing.Cpu())[0]
    outcomes = measure.measure(case, timing.Cpu(), ["torch.nn", "fusenc"], measure.Limits(3, 0.0))
    assert outcomes["fusenc"].status == measure.WRONG and not outcomes["fusenc"].seconds
    assert outcomes["torch.nn"].status == measure.MEASURED and len(outcomes["torch.nn"].seconds) == 3


def test_targets_are_those_of_the_encoder():
    found = cases.cases(["encoder"], TINY | {"fill": (1.0, 0.5), "direction": ("forward", "both")}, timing.Cpu())
    targets = {(c.sizes["fill"], c.direction): set(c.targets.values()) for c in found if c.sizes}
    assert targets == {(1.0, "forward"): {0.97}, (1.0, "both"): set(), (0.5, "forward"): {1.1}, (0.5, "both"): {1.6}}
    assert model.TARGETS["half full"] == {"forward": 1.8, "both": 1.6}


def test_batches_of_sentences_are_half_full_and_full():
    lengths = [5 + (7 * i) % 40 for i in range(400)]
    chosen = [lengths[i] for i in model._half_full(lengths)]
    assert len(chosen) == 32 and abs(sum(chosen) / (32 * max(chosen)) - 0.5) < 0.1
    with_enough = [*lengths[:-40], *[9] * 40]
    equal = model._full(with_enough)
    assert len(equal) == 32 and {with_enough[i] for i in equal} == {9}


def test_shares_of_sentences_hold_the_batches_of_one_call():
    sentences = ["x" * (1 + (37 * i) % 211) for i in range(2000)]
    ordered = sorted(sentences, key=len, reverse=True)
    shares = encoder._shares(sentences)
    assert max(len(share) for share in shares) == encoder.AT_ONCE * 32
    batches = [share[i : i + 32] for share in shares for i in range(0, len(share), 32)]
    assert sorted(batches) == sorted(ordered[i : i + 32] for i in range(0, 2000, 32))
