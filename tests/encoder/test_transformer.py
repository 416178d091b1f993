"""fusenc.Transformer and TransformerDecoder against torch's own."""

from __future__ import annotations

import copy
import pickle

import contract
import fusenc
import pytest
import torch
from contract import output_and_gradients
from tolerances import LOSS_CURVE, SAME_ALGORITHM_64
from torch import nn

CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
PADDING = torch.arange(5) >= torch.tensor([[5], [3], [1]])
TGT_PADDING = torch.arange(7) >= torch.tensor([[7], [2], [6]])
MASKS = {
    "none": {},
    "causal": {"tgt_mask": CAUSAL},
    "bool causal": {"tgt_mask": CAUSAL < 0},
    "a hint": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "no hint": {"tgt_mask": CAUSAL, "tgt_is_causal": False},
    "padding": {"tgt_mask": CAUSAL < 0, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING,
                "tgt_key_padding_mask": TGT_PADDING},
    "memory": {"memory_mask": torch.linspace(-1, 1, 35).view(7, 5), "src_mask": CAUSAL[:5, :5]},
}  # fmt: skip


def pair(dtype=torch.float64, **options):
    """Torch's model and ours with the same weights, no dropout."""
    options = {"dropout": 0.0, "dim_feedforward": 20, "batch_first": True, "dtype": dtype, **options}
    models = []
    for kind in (nn.Transformer, fusenc.Transformer):
        torch.manual_seed(0)
        models.append(kind(12, 2, 2, 2, **options))
    for (name, a), (other, b) in zip(*(model.state_dict().items() for model in models), strict=True):
        assert name == other and torch.equal(a, b), "same constructor, same seed, same weights"
    return models


def inputs(batch_first=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(3, n, 12, generator=generator, dtype=dtype) for n in (5, 7)]
    return tensors if batch_first else [t.transpose(0, 1) for t in tensors]


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_same_as_torch(mask, norm_first, batch_first):
    models = pair(norm_first=norm_first, batch_first=batch_first, activation="gelu")
    results = []
    for model in models:
        src, tgt = (t.requires_grad_() for t in inputs(batch_first))
        results.append(output_and_gradients(model(src, tgt, **MASKS[mask]), [src, tgt, *model.parameters()]))
    contract.assert_same(results[1], results[0], SAME_ALGORITHM_64)
    with torch.no_grad():
        expected, got = (model.eval()(*inputs(batch_first), **MASKS[mask]) for model in models)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_ALGORITHM_64)


def test_unbatched_input():
    theirs, ours = pair()
    src, tgt = (t[0] for t in inputs())
    torch.testing.assert_close(ours(src, tgt), theirs(src, tgt), rtol=0, atol=SAME_ALGORITHM_64)


def test_every_layer_is_fused():
    _, ours = pair()
    layers = [*ours.encoder.layers, *ours.decoder.layers]
    assert [type(layer) for layer in layers] == [fusenc.TransformerEncoderLayer] * 2 + [
        fusenc.TransformerDecoderLayer
    ] * 2
    assert all(layer.why_not_fused() == "" for layer in layers)
    assert type(ours.decoder) is fusenc.TransformerDecoder


def test_custom_encoders_and_decoders_stay_what_they_are():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 1)
    model = fusenc.Transformer(12, 2, 1, 1, custom_encoder=encoder, batch_first=True)
    assert model.encoder is encoder and type(encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0]) is fusenc.TransformerDecoderLayer
    decoder = fusenc.TransformerDecoder(fusenc.TransformerDecoderLayer(12, 2, 20, batch_first=True), 1)
    assert fusenc.Transformer(12, 2, 1, 1, custom_decoder=decoder, batch_first=True).decoder is decoder


@pytest.mark.parametrize(
    ("src", "tgt", "options"),
    [
        ((3, 5, 12), (2, 7, 12), {}),
        ((3, 5, 8), (3, 7, 12), {}),
        ((3, 5, 12), (3, 7, 12), {"tgt_mask": torch.zeros(5, 5)}),
        ((3, 5, 12), (3, 7, 12), {"tgt_is_causal": True}),
        ((3, 5, 12), (3, 7, 12), {"memory_key_padding_mask": torch.zeros(3, 7, dtype=torch.bool)}),
    ],
)
def test_bad_input_raises_what_torch_raises(src, tgt, options):
    theirs, ours = pair(torch.float32)
    with pytest.raises(Exception) as expected:
        theirs(torch.randn(src), torch.randn(tgt), **options)
    with pytest.raises(type(expected.value)) as got:
        ours(torch.randn(src), torch.randn(tgt), **options)
    assert str(got.value) == str(expected.value)


def test_pickle_deepcopy_and_checkpoints():
    theirs, ours = pair()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fusenc.Transformer
        assert torch.equal(other(*inputs()), ours(*inputs()))
    theirs.load_state_dict(ours.state_dict())


def test_trains_like_torch():
    curves = []
    for model in pair(torch.float32):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        (src, tgt), target = inputs(dtype=torch.float32), torch.randn(3, 7, 12)
        losses = []
        for _ in range(10):
            out = model(src, tgt, tgt_mask=CAUSAL, src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING)
            loss = (out - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(curves[1], curves[0], rtol=LOSS_CURVE, atol=0)
    assert curves[0][-1] < curves[0][0]


def test_fuse_and_unfuse():
    model = nn.ModuleDict({
        "model": nn.Transformer(12, 2, 1, 1, 20, 0.0, batch_first=True),
        "pool": nn.MultiheadAttention(12, 2, batch_first=True),
    })  # fmt: skip
    src, tgt = inputs(dtype=torch.float32)

    def run():
        out = model["model"](src, tgt, tgt_mask=CAUSAL)
        return model["pool"](out[:, :1], out, out)[0]

    expected = run()
    report = fusenc.fuse(model)
    fused = {
        "model.encoder": "TransformerEncoder",
        "model.encoder.layers.0": "TransformerEncoderLayer",
        "model.decoder.layers.0": "TransformerDecoderLayer",
        "pool": "MultiheadAttention",
    }
    assert not report.left and report.fused == fused
    assert type(model["model"].decoder.layers[0].self_attn) is nn.MultiheadAttention, "a part of a fused layer"
    torch.testing.assert_close(run(), expected)
    assert fusenc.fuse(model).fused == fused, "a second time"
    fusenc.unfuse(model)
    assert torch.equal(run(), expected)
    assert all(not type(module).__module__.startswith("fusenc") for module in model.modules())
    built = fusenc.Transformer(12, 2, 1, 1, 20)
    fusenc.unfuse(built)
    assert all(not type(module).__module__.startswith("fusenc") for module in built.modules())
