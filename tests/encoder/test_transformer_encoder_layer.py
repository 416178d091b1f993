"""fusenc.TransformerEncoderLayer against torch's own."""

from __future__ import annotations

import copy
import pickle
import re

import contract
import fusenc
import pytest
import torch
from contract import output_and_gradients
from tolerances import LOSS_CURVE, SAME_ALGORITHM, SAME_ALGORITHM_64
from torch import nn

KPM = torch.zeros(3, 7, dtype=torch.bool)
KPM[1, 4:] = True
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": KPM},
    "float padding": {"src_key_padding_mask": torch.zeros(3, 7).masked_fill(KPM, float("-inf"))},
    "float causal": {"src_mask": CAUSAL},
    "bool causal": {"src_mask": CAUSAL < 0},
    "causal hint": {"src_mask": CAUSAL, "is_causal": True},
    "both bool": {"src_mask": CAUSAL < 0, "src_key_padding_mask": KPM},
    "both float": {"src_mask": CAUSAL, "src_key_padding_mask": torch.zeros(3, 7).masked_fill(KPM, float("-inf"))},
    "hint and padding": {"src_mask": CAUSAL < 0, "src_key_padding_mask": KPM, "is_causal": True},
    "per head": {"src_mask": torch.randn(12, 7, 7, generator=torch.Generator().manual_seed(0))},
}


def pair(dtype=torch.float32, **options):
    """Torch's layer and ours with the same weights, no dropout."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "dim_feedforward": 100, **options}
    theirs = nn.TransformerEncoderLayer(48, 4, dtype=dtype, **options)
    torch.manual_seed(0)
    ours = fusenc.TransformerEncoderLayer(48, 4, dtype=dtype, **options)
    for (name, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), "same constructor, same seed, same weights"
    return theirs, ours


def assert_same(theirs, ours, *args, tolerance=SAME_ALGORITHM, keep=None, **kwargs):
    """Same output and same gradients of every parameter, on the positions in `keep`."""
    assert ours.why_not_fused() == ""
    results = []
    for layer in (theirs, ours):
        out = layer(*args, **kwargs)
        results.append(output_and_gradients(out if keep is None else out[keep], list(layer.parameters())))
    contract.assert_same(results[1], results[0], tolerance)


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_same_as_torch(mask, norm_first, batch_first, training):
    theirs, ours = pair(activation="gelu", norm_first=norm_first, batch_first=batch_first)
    theirs.train(training), ours.train(training)
    x = torch.randn(3, 7, 48)
    assert_same(theirs, ours, x if batch_first else x.transpose(0, 1), **MASKS[mask])


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"}, {"activation": nn.GELU(approximate="tanh")}, {"activation": torch.tanh},
        {"bias": False}, {"layer_norm_eps": 0.1}, {"dim_feedforward": 7},
    ],
    ids=["relu", "gelu by tanh", "another activation", "no bias", "eps", "odd hidden size"],
)  # fmt: skip
def test_options(options):
    theirs, ours = pair(batch_first=True, **options)
    assert_same(theirs, ours, torch.randn(3, 7, 48))


def test_float64():
    theirs, ours = pair(torch.float64, batch_first=True)
    assert_same(theirs, ours, torch.randn(3, 7, 48, dtype=torch.float64), tolerance=SAME_ALGORITHM_64)


def test_unbatched_input():
    theirs, ours = pair()
    assert_same(theirs, ours, torch.randn(7, 48), src_mask=CAUSAL, src_key_padding_mask=KPM[1])


def test_inference_takes_no_gradients_and_gives_torchs_result():
    theirs, ours = pair(batch_first=True, activation="gelu")
    theirs.eval(), ours.eval()
    x = torch.randn(3, 7, 48)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_a_sequence_of_nothing_but_padding_is_finite():
    _, ours = pair(batch_first=True)
    mask = KPM.clone()
    mask[2] = True
    out = ours(torch.randn(3, 7, 48), src_key_padding_mask=mask)
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("shape", [(0, 7, 48), (3, 0, 48)], ids=str)
def test_empty_input(shape):
    _, ours = pair(batch_first=True)
    assert ours(torch.randn(shape)).shape == shape


def test_dropout_is_drawn_from_the_generator():
    layer = fusenc.TransformerEncoderLayer(48, 4, 100, dropout=0.5, batch_first=True)
    x = torch.randn(3, 7, 48)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(layer(x))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("site", ["dropout", "dropout1", "dropout2", "self_attn"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_each_dropout_has_its_place(site, norm_first):
    """With one dropout at probability 1 and the others off, the result does not depend on the mask drawn."""
    theirs, ours = pair(batch_first=True, norm_first=norm_first)
    for layer in (theirs, ours):
        getattr(layer, site).__setattr__("dropout" if site == "self_attn" else "p", 1.0)
    x = torch.randn(3, 7, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer(torch.randn(3, 7, 40)),
        lambda layer: layer(torch.randn(2, 3, 7, 48)),
        lambda layer: layer(torch.randn(3, 7, 48), src_mask=torch.zeros(5, 7)),
        lambda layer: layer(torch.randn(3, 7, 48), src_mask=torch.zeros(7, 7, dtype=torch.int64)),
        lambda layer: layer(torch.randn(3, 7, 48), src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool)),
        lambda layer: layer(torch.randn(3, 7, 48), is_causal=True),
        lambda layer: layer(torch.randn(3, 7, 48, dtype=torch.float64)),
        lambda layer: layer(torch.zeros(3, 7, 48, dtype=torch.int64)),
    ],
)
def test_bad_input_raises_what_torch_raises(call):
    theirs, ours = pair(batch_first=True)
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(type(expected.value)) as got:
        call(ours)
    assert str(got.value) == str(expected.value)


def test_bad_construction_raises_what_torch_raises():
    with pytest.raises(AssertionError, match="divisible"):
        fusenc.TransformerEncoderLayer(48, 5)
    with pytest.raises(ValueError, match="greater than 0"):
        fusenc.TransformerEncoderLayer(48, 0)
    with pytest.raises(ValueError, match="probability"):
        fusenc.TransformerEncoderLayer(48, 4, dropout=1.5)


def test_hooks_and_replaced_parts_are_respected():
    theirs, ours = pair(batch_first=True)
    x = torch.randn(3, 7, 48)
    seen = []
    handle = ours.linear1.register_forward_hook(lambda *args: seen.append(1))
    assert "linear1 has hooks" in ours.why_not_fused()
    torch.testing.assert_close(ours(x), theirs(x))
    assert seen
    handle.remove()
    assert ours.why_not_fused() == ""
    ours.norm1 = nn.Identity()
    assert "norm1 is a Identity" in ours.why_not_fused()
    assert ours(x).shape == x.shape


def test_blocks_of_a_subclass_are_respected():
    class Doubled(fusenc.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    _, ours = pair(batch_first=True)
    x = torch.randn(3, 7, 48)
    before = ours(x)
    ours.__class__ = Doubled
    assert "_ff_block" in ours.why_not_fused() and not torch.allclose(ours(x), before)


def test_a_hint_without_a_mask_raises_in_inference_too():
    _, ours = pair(batch_first=True)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        ours.eval()(torch.randn(3, 7, 48), is_causal=True)


def test_inside_nn_transformer_encoder():
    theirs, ours = pair(batch_first=True, activation="gelu")
    x = torch.randn(3, 7, 48)
    stacks = [nn.TransformerEncoder(layer, 2) for layer in (theirs, ours)]
    expected, got = (stack(x, src_key_padding_mask=KPM) for stack in stacks)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_nn_transformer_encoder():
    theirs, ours = pair(batch_first=True, activation="gelu")
    x = torch.randn(3, 7, 48)
    nested = []
    stacks = [nn.TransformerEncoder(layer, 2).eval() for layer in (theirs, ours)]
    stacks[1].layers[0].register_forward_pre_hook(lambda module, args: nested.append(args[0].is_nested))
    with torch.inference_mode():
        expected, got = (stack(x, src_key_padding_mask=KPM) for stack in stacks)
    assert nested == [True], "torch hands our layer a nested tensor"
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_checkpoints_pickle_and_deepcopy():
    theirs, ours = pair(batch_first=True)
    x = torch.randn(3, 7, 48)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fusenc.TransformerEncoderLayer
        assert torch.equal(other(x), ours(x))
    theirs.load_state_dict(ours.state_dict())


def test_trains_like_torch():
    curves = []
    for layer in pair(batch_first=True, activation="gelu"):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        x, target = torch.randn(3, 7, 48), torch.randn(3, 7, 48)
        losses = []
        for _ in range(10):
            loss = (layer(x, src_key_padding_mask=KPM)[~KPM] - target[~KPM]).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(curves[1], curves[0], rtol=LOSS_CURVE, atol=0)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_compiles_whole(training, norm_first):
    torch._dynamo.reset()
    _, ours = pair(batch_first=True, activation="gelu", norm_first=norm_first)
    ours.train(training)
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(3, 7, 48)
    with torch.set_grad_enabled(training):
        got, expected = compiled(x, src_key_padding_mask=KPM), ours(x, src_key_padding_mask=KPM)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    if training:
        results = [output_and_gradients(out, list(ours.parameters())) for out in (got, expected)]
        contract.assert_same(*results, SAME_ALGORITHM)


@pytest.mark.kernel
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.essential
def test_whole_layer_on_the_gpu_path(device, backend, norm_first):
    theirs, ours = pair(batch_first=True, activation="gelu", norm_first=norm_first)
    ours.to(device), theirs.to(device)
    keep = ~KPM.to(device)
    assert_same(theirs, ours, torch.randn(3, 7, 48, device=device), src_key_padding_mask=~keep, keep=keep)
    assert fusenc.kernels.last_backend() == backend


@pytest.mark.kernel
@pytest.mark.essential
def test_dropout_on_the_gpu_path_is_that_of_the_eager_path(device):
    layer = fusenc.TransformerEncoderLayer(48, 4, 100, dropout=0.3, batch_first=True, activation="gelu").to(device)
    x = torch.randn(2, 7, 48, device=device)
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    with fusenc.kernels.use_backend("eager"):
        expected = layer(x)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_what_the_kernels_cannot_do_runs_torchs_own_forward():
    layer = fusenc.TransformerEncoderLayer(512, 1, 32, batch_first=True)
    assert "head size" in layer.why_not_fused()
    assert layer(torch.randn(2, 3, 512)).shape == (2, 3, 512)
    theirs, ours = pair(dtype=torch.bfloat16, batch_first=True)
    x = torch.randn(2, 3, 48, dtype=torch.bfloat16)
    for layer in (theirs, ours):
        layer.norm1.float(), layer.norm2.float()
    try:
        expected = theirs(x)
    except RuntimeError as error:  # on this device torch has no mixed norm either
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:20])):
            ours(x)
    else:
        torch.testing.assert_close(ours(x), expected)


def test_norms_without_weights():
    theirs, ours = pair(batch_first=True)
    for layer in (theirs, ours):
        layer.norm1 = torch.nn.LayerNorm(48, elementwise_affine=False)
    assert_same(theirs, ours, torch.randn(3, 7, 48))
