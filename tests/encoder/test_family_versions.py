"""A transformers whose classes are not those that fusenc was written for: that family is left, and no other notices."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import types

import fusenc
import pytest
import torch
import transformers
from packaging.version import Version
from tolerances import SAME_ALGORITHM
from torch import nn

SINCE = {
    "vit": "5.9", "t5": "5.15", "mt5": "5.15", "bart": "5.4", "marian": "5.4", "esm": "5.6", "dinov2": "5.18",
    "dinov2_with_registers": "5.18", "wav2vec2": "5.16", "hubert": "5.16", "whisper": "5.4", "gpt2": "5.4",
    "eurobert": "5.3", "nomic_bert": "5.5", "siglip": "5.6",
}  # fmt: skip
"""The oldest transformers with the classes that fusenc knows; 5.2 where nothing is said."""

SIZES = {
    "vocab_size": 50, "pad_token_id": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48,
    "num_hidden_layers": 1, "image_size": 8, "patch_size": 4, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 16, "decoder_start_token_id": 2,
}  # fmt: skip


def small_model(kind: str) -> nn.Module:
    if is_left(kind):
        pytest.skip(f"transformers {transformers.__version__} has other classes of {kind}")
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **SIZES)).eval()


def is_left(kind: str) -> bool:
    return Version(transformers.__version__) < Version(SINCE.get(kind, "5.2"))


def modeling(kind: str) -> object:
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def test_the_installed_transformers_is_known():
    """Each family of this version; a newer version in which one is left fails here, and says why."""
    from fusenc import huggingface

    left = set(huggingface.MISSING)
    for plain, fused in huggingface.REPLACEMENTS.items():
        if reason := huggingface.why_changed(fused):
            kind = plain.__module__.split(".")[2]
            assert is_left(kind), reason
            left.add(kind)
    assert left == {kind for kind in SINCE if is_left(kind)}, huggingface.MISSING


def test_a_family_with_a_missing_class_or_module_is_left():
    """In a process of its own, since families are loaded once."""
    code = """
import sys
from transformers.models.distilbert import modeling_distilbert as modeling
sys.modules["transformers.models.camembert.modeling_camembert"] = None
ffn = modeling.FFN
del modeling.FFN
import fusenc.huggingface, torch, transformers
modeling.FFN = ffn  # which the model needs
distilbert = transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=50, dim=32, n_heads=2, n_layers=1))
bert = transformers.BertModel(
    transformers.BertConfig(vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
)
report = fusenc.fuse(torch.nn.ModuleDict({"a": distilbert, "b": bert}))
assert report.left == {"a.transformer.layer.0": f"transformers {transformers.__version__} has no FFN"}, report
assert sorted(report.fused) == ["b.embeddings", "b.encoder", "b.encoder.layer.0"], report
assert "camembert" in fusenc.huggingface.MISSING["camembert"]
try:
    fusenc.fuse(distilbert, strict=True)
except ValueError as error:
    assert "has no FFN" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def takes_more(self, hidden_states, input_tensor, scale=1.0):
    return self.LayerNorm(self.dropout(self.dense(hidden_states)) * scale + input_tensor)


def takes_less(self, hidden_states):
    return self.LayerNorm(self.dropout(self.dense(hidden_states)))


def renamed(self, hidden_states, residual):
    return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


def clamps(self, hidden_states, input_tensor):
    return self.LayerNorm(self.dropout(self.dense(hidden_states)).clamp(-1, 1) + input_tensor)


def has_another_norm(self, hidden_states, input_tensor):
    return self.norm(self.dropout(self.dense(hidden_states)) + input_tensor)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (takes_more, "takes scale"),
        (takes_less, "takes no input_tensor"),
        (renamed, "takes residual and takes no input_tensor"),
        (clamps, "uses clamp"),
        (has_another_norm, "uses norm and uses no LayerNorm"),
    ],
)
def test_a_part_that_changed_is_left_with_the_reason(monkeypatch, forward, reason):
    """Layers and their encoder are left; embeddings, which do not contain the part, and other families are fused."""
    models = nn.ModuleDict({"bert": small_model("bert"), "roberta": small_model("roberta")})
    monkeypatch.setattr(modeling("bert").BertOutput, "forward", forward)
    report = fusenc.fuse(models)
    assert set(report.left) == {"bert.encoder", "bert.encoder.layer.0"}
    assert set(report.fused) == {"bert.embeddings", "roberta.encoder", "roberta.encoder.layer.0"}
    reason = f"transformers {transformers.__version__}: BertOutput.forward {reason}, unlike the one that fusenc was"
    with pytest.raises(ValueError, match=re.escape(reason)):
        fusenc.fuse(models["bert"], strict=True)


def test_an_encoder_that_hands_nothing_on_is_left(monkeypatch):
    """Its layers run fused, with the padding."""

    def forward(self, hidden_states, attention_mask=None):
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask)
        return hidden_states

    model = small_model("distilbert")
    monkeypatch.setattr(modeling("distilbert").Transformer, "forward", forward)
    report = fusenc.fuse(model)
    assert (
        set(report.left) == {"transformer"}
        and "Transformer.forward takes no **kwargs, unlike" in report.left["transformer"]
    )
    assert "transformer.layer.0" in report.fused


@pytest.mark.parametrize("by_position", [True, False], ids=["by position", "by name"])
def test_the_order_of_arguments_is_that_of_the_stock_forward(monkeypatch, by_position):
    """A decoder layer whose second and third arguments changed places, fused and where its stock forward runs."""
    from fusenc.huggingface import bart, layers, stock

    layer = small_model("bart").decoder.layers[0]
    module, original = modeling("bart"), type(layer).forward

    class Reordered(module.BartDecoderLayer):
        def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
            return original(self, hidden_states, attention_mask, encoder_hidden_states, **kwargs)

    x, source = torch.randn(2, 2, 5, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    expected = layer(x, attention_mask=mask, encoder_hidden_states=source)
    monkeypatch.setattr(module, "BartDecoderLayer", Reordered)
    monkeypatch.setattr(layers, "FusedReordered", None, raising=False)
    of_bart = stock.Stock("bart", "Bart")
    adapter = bart.DecoderAdapter(of_bart, bart._DECODER_LAYER)
    layer.__class__ = of_bart.fused(layers.FusedLayer, "DecoderLayer", {}, adapter=adapter)
    calls, kernel = [], fusenc.kernels.decoder_layer
    monkeypatch.setattr(fusenc.kernels, "decoder_layer", lambda *a, **k: calls.append(0) or kernel(*a, **k))
    for more in ({}, {"output_attentions": True}):  # the second is not served
        args, kwargs = (source, mask), {"attention_mask": mask, "encoder_hidden_states": source}
        got = layer(x, *args, **more) if by_position else layer(x, **kwargs, **more)
        assert len(calls) == 1
        torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=10 * SAME_ALGORITHM)


@pytest.mark.parametrize("name", ["_active_collector", "_CAN_RECORD_REGISTRY"])
@pytest.mark.parametrize("change", ["missing", "another"])
def test_private_parts_of_transformers_are_checked(monkeypatch, name, change):
    """`fuse` then leaves all of transformers' layers; see test_fuse.py."""
    from fusenc.huggingface import stock
    from transformers.utils import output_capturing

    if change == "missing":
        monkeypatch.delattr(output_capturing, name)
    else:
        monkeypatch.setattr(output_capturing, name, types.SimpleNamespace(get=lambda: ()))
    spec = importlib.util.spec_from_file_location("again", stock.__file__)
    with pytest.raises(ImportError, match=f"^transformers {transformers.__version__}: "):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_too_many_arguments_raise():
    layer = small_model("distilbert").transformer.layer[0]
    fusenc.fuse(layer)
    x = torch.randn(1, 3, 32)
    for args, kwargs in (((x, None, None), {}), ((x,), {"hidden_states": x})):
        with pytest.raises(TypeError, match="an argument is given twice, or there are too many"):
            layer(*args, **kwargs)
