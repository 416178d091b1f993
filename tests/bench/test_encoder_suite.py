"""The benchmark of encoders: what it compares, and that it times nothing whose values are wrong."""

from __future__ import annotations

import fusenc
import pytest
import torch
from fusenc.bench.cases import encoder
from fusenc.bench.commands import app
from typer.testing import CliRunner

REAL = torch.arange(4) < torch.tensor([[4], [1], [2]])


def test_torch_encoders_are_compared_in_inference_and_training():
    cases = encoder._torch_nn(REAL, "half full")
    assert [case.target for case in cases] == [1.1, 1.6, 1.6]
    assert [case.name.split(", ", 2)[2] for case in cases] == ["inference", "training", "training, dropout 0.1"]
    assert cases[0].theirs_is.endswith(("fast path", "plain path"))
    for case in cases:
        case.theirs(), case.ours()


@pytest.mark.parametrize("wrong", ["weight", "gradient"])
def test_wrong_values_are_not_timed(monkeypatch, wrong):
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
    with pytest.raises(encoder.WrongValuesError, match=r"TransformerEncoder 3x4, .*no time is measured"):
        encoder._torch_nn(REAL, "half full")


@pytest.mark.parametrize("difference", [1e-3, float("nan")], ids=str)
def test_agree_finds_one_element(difference):
    expected = [torch.zeros(2), torch.full((3, 4), 5.0)]
    given = [t.clone() for t in expected]
    encoder.agree("same", expected, given)
    given[1][2, 3] += difference
    with pytest.raises(encoder.WrongValuesError, match="a name: values differ by"):
        encoder.agree("a name", expected, given)


def test_batches_are_half_full_and_full():
    lengths = [5 + (7 * i) % 40 for i in range(400)]
    sentences = [f"{i}" for i in range(400)]
    by_sentence = dict(zip(sentences, lengths, strict=True))
    chosen = [by_sentence[s] for s in encoder.half_full(sentences, lengths)]
    assert len(chosen) == 32 and abs(sum(chosen) / (32 * max(chosen)) - 0.5) < 0.1
    with_enough = [*lengths[:-40], *[9] * 40]
    equal = encoder.full(sentences, with_enough)
    assert len(equal) == 32 and {with_enough[int(s)] for s in equal} == {9}


def test_the_command_refuses(monkeypatch):
    from fusenc.bench import measure

    def cases():
        encoder.agree("a case", [torch.zeros(1)], [torch.ones(1)])

    monkeypatch.setattr(measure, "SUITES", {"encoder": cases})
    result = CliRunner().invoke(app, ["bench", "encoder"])
    assert result.exit_code == 1 and "a case: values differ by 1.0e+00" in result.output
    assert "times as fast" not in result.output
