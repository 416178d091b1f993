"""`recompute`: fused layers that compute the activation again in the backward pass."""

from __future__ import annotations

import contract
import families
import fusenc
import pytest
import torch
from contract import output_and_gradients
from fusenc.bench.kept import kept_bytes
from tolerances import SAME_ALGORITHM
from torch import nn

WIDTH, HIDDEN = 48, 192


def torch_encoder(dropout):
    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def bert(dropout):
    pytest.importorskip("transformers")
    return families.small_model("bert", dropout=dropout, num_hidden_layers=1).train().encoder


MODELS = {"torch.nn": torch_encoder, "bert": bert}


def run(model, inputs):
    """Output and gradients of a training step, and what it keeps."""
    torch.manual_seed(5)
    found = []

    def forward():
        out = model(inputs)
        found.append(out if isinstance(out, torch.Tensor) else out.last_hidden_state)

    kept = kept_bytes(forward)
    return output_and_gradients(found[0], [inputs, *model.parameters()]), kept


@pytest.mark.kernel
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("name", MODELS)
def test_same_values_and_gradients_and_less_kept(device, backend, name, dropout):
    torch.manual_seed(0)
    model = MODELS[name](dropout).to(device)
    inputs = torch.randn(2, 9, WIDTH).to(device).requires_grad_()
    found = []
    for recompute in (False, True):
        fusenc.fuse(model, recompute=recompute)
        found.append(run(model, inputs))
    (expected, whole), (got, less) = found
    contract.assert_same(got, expected, SAME_ALGORITHM)
    assert less < whole


def test_fuse_sets_it_and_unfuse_takes_it_away():
    model = torch_encoder(0.0)
    fusenc.fuse(model)
    assert [layer.recompute for layer in model.layers] == [False]
    fusenc.fuse(model, recompute=True)
    assert [layer.recompute for layer in model.layers] == [True] and "recompute" not in vars(model)
    fusenc.unfuse(model)
    assert not any("recompute" in vars(module) for module in model.modules())


def test_a_layer_has_it_as_an_attribute():
    layer = fusenc.TransformerEncoderLayer(8, 2, 16)
    assert layer.recompute is False
    layer.recompute = True
    assert "recompute" not in layer.state_dict()
