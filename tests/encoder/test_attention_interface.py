"""attn_implementation="fusenc": attention alone, in any model whose attention can be chosen."""

from __future__ import annotations

import subprocess
import sys

import fusenc.huggingface
import pytest
import torch
import transformers
from contract import assert_same, output_and_gradients
from packaging.version import Version
from tolerances import SAME_ALGORITHM

TEXT = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA = {**TEXT, **BERT, "num_key_value_heads": 2, "use_cache": False}
SEQ2SEQ = {**TEXT, "d_model": 48, "decoder_start_token_id": 2, "use_cache": False}
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout", "attention_dropout")

MODELS = {
    "bert": ("bert", "BertModel", {**TEXT, **BERT}),
    "bert decoder": ("bert", "BertModel", {**TEXT, **BERT, "is_decoder": True, "use_cache": False}),
    "t5": ("t5", "T5Model", {**SEQ2SEQ, "d_kv": 16, "num_heads": 4, "d_ff": 64, "num_layers": 2}),
    "bart": (
        "bart", "BartModel",
        {**SEQ2SEQ, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
    ),
    "modernbert": (
        "modernbert", "ModernBertModel",
        {**TEXT, **BERT, "num_hidden_layers": 3, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "vit": ("vit", "ViTModel", {**BERT, "image_size": 12, "patch_size": 4}),
    "llama": ("llama", "LlamaModel", LLAMA),
    "mistral": ("mistral", "MistralModel", {**LLAMA, "sliding_window": 3, "head_dim": 12}),
}  # fmt: skip


def older_than(version):
    return Version(transformers.__version__) < Version(version)


def small_model(name, implementation="fusenc", **options):
    kind, model, own = MODELS[name]
    if name == "t5" and older_than("5.15"):
        pytest.skip("T5 computes attention in its own way")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**own, **options})
    for rate in DROPOUT:
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    config._attn_implementation = implementation
    return with_large_weights(getattr(transformers, model)(config))


def with_large_weights(model):
    """Initial weights are so small that attention would hardly matter."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and "emb" not in path:
                parameter.mul_(0.2 / parameter.std())
    return model


def batch(model, padded):
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator)}, ...
    mask = torch.ones(3, 8, dtype=torch.long)
    if padded:
        mask[1, 5:] = 0
        mask[2, :3] = 0
    inputs = {"input_ids": torch.randint(3, 100, mask.shape, generator=generator), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        return {**inputs, "decoder_input_ids": torch.randint(3, 100, (3, 6), generator=generator)}, ...
    return inputs, mask.bool()


def outcome(model, padded):
    inputs, real = batch(model, padded)
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name]
    return output_and_gradients(model(**inputs).last_hidden_state[real], parameters)


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_as_sdpa(name, padded):
    model, calls = small_model(name), []
    with pytest.MonkeyPatch.context() as patch:
        attention = fusenc.kernels.attention
        patch.setattr(fusenc.kernels, "attention", lambda *a, **k: calls.append(a) or attention(*a, **k))
        got = outcome(model, padded)
    layers = {"t5": 6, "bart": 6, "modernbert": 3}.get(name, 2)  # with those of the decoder and between the two
    assert len(calls) == layers
    assert_same(got, outcome(small_model(name, "sdpa"), padded), SAME_ALGORITHM)


def test_softcap_as_eager():
    """Gemma 2 limits its scores; sdpa cannot do that."""
    outcomes = []
    for implementation in ("fusenc", "eager"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            "gemma2", **LLAMA, head_dim=12, attn_logit_softcapping=0.5, sliding_window=4
        )
        config._attn_implementation = implementation
        outcomes.append(outcome(with_large_weights(transformers.Gemma2Model(config)), True))
    assert_same(outcomes[0], outcomes[1], SAME_ALGORITHM)


@pytest.mark.parametrize("name", ["bert", "bart", "llama"])
def test_attention_weights_as_eager(name):
    model = small_model(name).eval()
    inputs, _ = batch(model, True)
    got = model(**inputs, output_attentions=True)
    expected = small_model(name, "eager").eval()(**inputs, output_attentions=True)
    keys = [key for key in expected if key.endswith("attentions")]
    assert sum(bool(expected[key]) for key in keys) == (3 if name == "bart" else 1)
    real = batch(model, True)[1]
    for key in keys:
        for g, e in zip(got[key], expected[key], strict=True):
            if name == "llama":  # a query without a key has weights 0 here
                g, e = (t.transpose(1, 2)[real] for t in (g, e))
            torch.testing.assert_close(g, e, rtol=0, atol=SAME_ALGORITHM)


def test_dropout_is_applied():
    model = small_model("bert").train()
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 1.0
    dropped = outcome(model, False)
    other = small_model("bert", "eager").train()
    for layer in other.encoder.layer:
        layer.attention.self.dropout.p = 1.0
    assert_same(dropped, outcome(other, False), SAME_ALGORITHM)


def test_from_config_and_set():
    config = transformers.AutoConfig.for_model("bert", **TEXT, **BERT)
    model = transformers.AutoModel.from_config(config, attn_implementation="fusenc")
    assert model.config._attn_implementation == "fusenc"
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("fusenc")
    report = fusenc.fuse(model)
    assert len(report.fused) == 4 and not report.left


@pytest.mark.parametrize("padding", [0, 2], ids=["", "padded"])
def test_generation_with_a_cache(padding):
    config = transformers.AutoConfig.for_model("llama", **{**LLAMA, "use_cache": True})
    steps = []
    for implementation in ("fusenc", "sdpa"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        with_large_weights(model)
        ids = torch.tensor([[5, 6, 7, 8], [7, 8, 9, 10]])
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        steps.append(torch.stack(out.logits))
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=SAME_ALGORITHM * steps[1].abs().max().item())


def test_weights_of_a_call_that_says_so():
    """Some models hand `output_attentions` on."""
    query = torch.randn(2, 2, 3, 4)
    call = fusenc.huggingface.attention_forward
    out, weights = call(torch.nn.Identity(), query, query, query, None, is_causal=False, output_attentions=True)
    torch.testing.assert_close((weights @ query).transpose(1, 2), out)
    assert call(torch.nn.Identity(), query, query, query, None)[1] is None


@pytest.mark.skipif(older_than("5.9"), reason="MPNet makes its mask itself")
def test_a_model_that_would_misread_the_mask_raises():
    config = transformers.AutoConfig.for_model("mpnet", **TEXT, **BERT)
    config._attn_implementation = "fusenc"
    model = transformers.MPNetModel(config)
    with pytest.raises(ValueError, match="attn_implementation='fusenc': MPNetConfig is of a model that computes"):
        model(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("name", ["cache", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"])
def test_arguments_that_would_be_ignored_raise(name):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"^{name}: expected None"):
        fusenc.huggingface.attention_forward(torch.nn.Identity(), q, q, q, None, **{name: torch.ones(2)})


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_a_position_bias_and_a_mask_both_count(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    bias = torch.randn(1, 4, 5, 5)
    allowed = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    allowed[1, ..., 3:] = False
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = {"bool": allowed, "float": added, "none": None}[kind]
    attend = fusenc.huggingface.attention_forward
    got, _ = attend(torch.nn.Identity(), q, k, v, mask, is_causal=False, position_bias=bias)
    both = bias if mask is None else bias + added
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, both).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)


def test_importing_fusenc_alone_registers_nothing():
    code = (
        "import fusenc, sys; assert 'transformers' not in sys.modules\n"
        "from transformers.modeling_utils import AttentionInterface as I; assert 'fusenc' not in I()\n"
        "import fusenc.huggingface; assert 'fusenc' in I()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_on_the_gpu_path(name, device, backend):
    model = small_model(name, **{"num_layers" if name == "t5" else "num_hidden_layers": 1}).to(device)
    inputs = {key: value[1:].to(device) for key, value in batch(model, True)[0].items()}
    parameters = [p for key, p in model.named_parameters() if "pooler" not in key]
    results = []
    for implementation in ("sdpa", "fusenc"):
        model.set_attn_implementation(implementation)
        hidden = model(**inputs).last_hidden_state
        if name == "bert":
            hidden = hidden[inputs["attention_mask"].bool()]
        results.append(output_and_gradients(hidden, parameters))
    assert fusenc.kernels.last_backend() == backend
    assert_same(results[1], results[0], SAME_ALGORITHM)
