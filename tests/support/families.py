"""Small models of each Hugging Face family, with random weights and the quirks of its configuration."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import fusenc
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

TEXT = {"vocab_size": 100, "pad_token_id": 1}
BERT = {
    **TEXT, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


class Family(NamedTuple):
    """One entry of the table."""

    model_type: str
    """As `AutoConfig.for_model` knows it."""
    model: str
    """The model's class in transformers."""
    options: dict[str, Any]
    """Of the configuration, without dropout."""
    fused: int
    """How many modules `fuse` changes."""
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    """The configuration's names of its dropout rates; the tests set them."""
    left: frozenset[str] = frozenset()
    """Reasons that the report may give for what stays as it is."""
    by_distance: bool = False
    """Attention goes by the distance of two tokens, so padding between real tokens stays in."""
    implementations: tuple[str, ...] = ("sdpa", "eager")
    """Of attention."""
    float16: bool = True
    """Runs fused in float16."""
    least_layers: int = 1
    """With fewer it has no layer of some kind."""
    since: str = "5.2"
    """The oldest transformers whose classes fusenc knows; before, the family is left, and its tests are skipped."""
    first_position: int | None = None
    """Of a text, where positions are given with the ids."""
    encoder: bool = True
    """Its encoder is one of texts, which `fuse` changes."""
    variant: bool = False
    """Another configuration of a family that is in the table: not run on the GPU path, where launches are slow."""


DISTILBERT = {**TEXT, "dim": 48, "n_heads": 4, "hidden_dim": 64, "n_layers": 2, "max_position_embeddings": 64}
ALBERT = {**BERT, "embedding_size": 24, "num_hidden_layers": 4}

FAMILIES = {
    "bert": Family("bert", "BertModel", BERT, 4, first_position=0),
    "bert tanh gelu": Family(
        "bert", "BertModel", {**BERT, "hidden_act": "gelu_new", "layer_norm_eps": 1e-6}, 4, variant=True
    ),
    "bert relu": Family("bert", "BertModel", {**BERT, "hidden_act": "relu", "type_vocab_size": 1}, 4, variant=True),
    "roberta": Family("roberta", "RobertaModel", BERT, 3, first_position=2),
    "xlm-roberta": Family("xlm-roberta", "XLMRobertaModel", BERT, 3, first_position=2),
    "camembert": Family("camembert", "CamembertModel", BERT, 3, first_position=2),
    "electra": Family("electra", "ElectraModel", {**BERT, "embedding_size": 48}, 4, first_position=0),
    "electra narrow embeddings": Family("electra", "ElectraModel", {**BERT, "embedding_size": 24}, 4, variant=True),
    "distilbert": Family(
        "distilbert", "DistilBertModel", DISTILBERT, 4, ("dropout", "attention_dropout"), first_position=0
    ),
    "distilbert sinusoidal": Family(
        "distilbert", "DistilBertModel", {**DISTILBERT, "sinusoidal_pos_embds": True, "activation": "relu"}, 4,
        ("dropout", "attention_dropout"), variant=True,
    ),
    "albert": Family("albert", "AlbertModel", {**ALBERT, "hidden_act": "gelu_new"}, 3, first_position=0),
    "albert groups": Family(
        "albert", "AlbertModel", {**ALBERT, "num_hidden_groups": 2, "inner_group_num": 2}, 6, variant=True
    ),
    "mpnet": Family(
        "mpnet", "MPNetModel", {**BERT, "layer_norm_eps": 1e-5}, 4, by_distance=True, implementations=("eager",),
        first_position=2,
    ),
}  # fmt: skip

_PATCHES = {
    "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
_T5 = {
    **TEXT, "d_model": 48, "d_kv": 16, "num_heads": 4, "d_ff": 64, "num_layers": 2, "use_cache": False,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 8, "decoder_start_token_id": 1,
}  # fmt: skip
_GATED_T5 = {**_T5, "feed_forward_proj": "gated-gelu"}
_BART = {
    **TEXT, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
    "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
BART_DROPOUT = ("dropout", "attention_dropout", "activation_dropout")

FAMILIES |= {
    "vit": Family("vit", "ViTModel", _PATCHES, 2, since="5.9", encoder=False),
    "clip text": Family("clip_text_model", "CLIPTextModel", {**BERT, "bos_token_id": 0, "eos_token_id": 2}, 3,
                        ("attention_dropout",), first_position=0),
    "clip vision": Family("clip_vision_model", "CLIPVisionModel", _PATCHES, 3, ("attention_dropout",), encoder=False),
    "siglip text": Family(
        "siglip_text_model", "SiglipTextModel", BERT, 3, ("attention_dropout",), first_position=0, since="5.6"
    ),
    "siglip vision": Family(
        "siglip_vision_model", "SiglipVisionModel", {**_PATCHES, "image_size": 16}, 4, ("attention_dropout",),
        encoder=False, since="5.6",
    ),
    "modernbert": Family(
        "modernbert", "ModernBertModel",
        {**BERT, "num_hidden_layers": 3, "local_attention": 4, "global_attn_every_n_layers": 2, "norm_bias": True}, 4,
        ("attention_dropout", "mlp_dropout", "embedding_dropout"), by_distance=True, least_layers=2, first_position=0,
    ),
    "modernbert biases": Family(
        "modernbert", "ModernBertModel",
        {**BERT, "num_hidden_layers": 3, "local_attention": 4, "attention_bias": True, "mlp_bias": True,
         "hidden_activation": "silu"},
        4, ("attention_dropout", "mlp_dropout", "embedding_dropout"), by_distance=True, variant=True,
    ),
    "t5": Family("t5", "T5EncoderModel", _T5, 3, ("dropout_rate",), by_distance=True, float16=False, since="5.15"),
    "t5 gated": Family(
        "t5", "T5EncoderModel", _GATED_T5, 3, ("dropout_rate",), by_distance=True, float16=False, since="5.15"
    ),
    "t5 with decoder": Family(
        "t5", "T5Model", _T5, 3, ("dropout_rate",), frozenset({"a decoder", "a decoder block"}), True, float16=False,
        since="5.15", variant=True,
    ),
    "mt5": Family(
        "mt5", "MT5EncoderModel", _GATED_T5, 3, ("dropout_rate",), by_distance=True, float16=False, since="5.15"
    ),
    "bart": Family("bart", "BartModel", _BART, 5, BART_DROPOUT, since="5.4"),
    "marian": Family(
        "marian", "MarianModel", {**_BART, "activation_function": "swish", "scale_embedding": True}, 5, BART_DROPOUT,
        since="5.4",
    ),
}  # fmt: skip


_WAVES = {
    "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2, "conv_dim": (24,),
    "conv_kernel": (2,), "conv_stride": (2,), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "feat_proj_dropout": 0.0, "vocab_size": 20,
}  # fmt: skip
_WAVES_DROPOUT = ("hidden_dropout", "attention_dropout", "activation_dropout")
_STABLE = {**_WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
_ESM = {**BERT, "layer_norm_eps": 1e-5}
_DINO = {**_PATCHES, "layerscale_value": 0.7, "mlp_ratio": 2}
_EUROBERT = {**BERT, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2}
_GPT2 = {
    **TEXT, "n_embd": 48, "n_head": 4, "n_inner": 64, "n_layer": 2, "n_positions": 64, "use_cache": False,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_GPT2_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

FAMILIES |= {
    "esm": Family(
        "esm", "EsmModel", {**_ESM, "position_embedding_type": "rotary"}, 3, since="5.6", first_position=0
    ),
    "esm absolute": Family(
        "esm", "EsmModel", {**_ESM, "emb_layer_norm_before": True}, 3, since="5.6", first_position=2, variant=True
    ),
    "eurobert": Family(
        "eurobert", "EuroBertModel", _EUROBERT, 3, ("attention_dropout",), since="5.3", first_position=0
    ),
    "eurobert biases": Family(
        "eurobert", "EuroBertModel",
        {**_EUROBERT, "attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"}, 3,
        ("attention_dropout",), since="5.3", variant=True,
    ),
    "nomic bert": Family("nomic_bert", "NomicBertModel", BERT, 3, since="5.5", first_position=0),
    "gpt2": Family("gpt2", "GPT2Model", _GPT2, 3, _GPT2_DROPOUT, since="5.4", first_position=0),
    "gpt2 scaled by layer": Family(
        "gpt2", "GPT2Model", {**_GPT2, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}, 3,
        _GPT2_DROPOUT, since="5.4", variant=True,
    ),
    "dinov2": Family("dinov2", "Dinov2Model", _DINO, 2, since="5.18", encoder=False),
    "dinov2 gated": Family(
        "dinov2", "Dinov2Model", {**_DINO, "use_swiglu_ffn": True, "qkv_bias": False}, 2, since="5.18", encoder=False
    ),
    "dinov2 registers": Family(
        "dinov2_with_registers", "Dinov2WithRegistersModel", {**_DINO, "image_size": 8, "num_register_tokens": 4}, 2,
        since="5.18", encoder=False, variant=True,
    ),
    "wav2vec2": Family("wav2vec2", "Wav2Vec2Model", _WAVES, 3, _WAVES_DROPOUT, since="5.16", encoder=False),
    "wav2vec2 stable": Family("wav2vec2", "Wav2Vec2Model", _STABLE, 3, _WAVES_DROPOUT, since="5.16", encoder=False),
    "hubert": Family("hubert", "HubertModel", _WAVES, 3, _WAVES_DROPOUT, since="5.16", encoder=False, variant=True),
    "hubert stable": Family(
        "hubert", "HubertModel", _STABLE, 3, _WAVES_DROPOUT, since="5.16", encoder=False, variant=True
    ),
    "whisper": Family(
        "whisper", "WhisperModel",
        {**_BART, "num_mel_bins": 6, "max_source_positions": 9, "max_target_positions": 64, "eos_token_id": 0,
         "bos_token_id": 0},
        4, BART_DROPOUT, since="5.4", encoder=False,
    ),
}  # fmt: skip


def older_than(version: str) -> bool:
    import transformers

    return Version(transformers.__version__) < Version(version)


def small_model(name: str, *, implementation: str | None = None, dropout: float = 0.0, **options: Any) -> nn.Module:
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    rates = dict.fromkeys(family.dropout, dropout)
    left = older_than(family.since)
    if left and not hasattr(transformers, family.model):
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    # Of a family that is left the type may not be known yet.
    of_type = getattr(transformers, family.model).config_class if left else functools.partial(
        transformers.AutoConfig.for_model, family.model_type
    )  # fmt: skip
    config = of_type(**{**family.options, **rates, **options})
    if implementation is not None and not left:
        config._attn_implementation = implementation
    model = getattr(transformers, family.model)(config)
    if left:
        report = fusenc.fuse(model)
        assert set(report.fused.values()) <= {"MultiheadAttention"}, report
        assert all(text.startswith("transformers 5.") for text in report.left.values()), report
        pytest.skip(next(iter(report.left.values())))
    with (
        torch.no_grad()
    ):  # initial weights are so small that attention would hardly matter, biases and norms not at all
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in path:
                scale = 0.05 if path.endswith("Attention.q.weight") else 0.2  # T5 scales no scores but these weights
                parameter.mul_(scale / parameter.std())
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(kind: str = "padded", length: int = 9, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Inputs of a model, of one of texts by default."""
    generator = torch.Generator().manual_seed(0)
    main, inputs = getattr(model, "main_input_name", ""), {}
    if main == "pixel_values":
        size = model.config.image_size  # type: ignore[union-attr]
        return {"pixel_values": torch.randn(4, 3, size, size, generator=generator)}
    mask = torch.ones(4, length, dtype=torch.long)
    if kind != "dense":
        mask[1, 5:] = 0
        mask[2, :3] = 0  # padding on the left
    if kind == "gaps":
        mask[3, 1::2] = 0  # and in between
    if main == "input_features":
        features = torch.randn(4, 6, 2 * length, generator=generator)
        inputs = {"input_features": features.to(model.dtype)}  # type: ignore[union-attr]
    elif main == "input_values":  # two samples a frame; only how many are real counts
        samples = torch.randn(4, 2 * length, generator=generator)
        samples = samples.to(model.dtype)  # type: ignore[union-attr]
        return {"input_values": samples, "attention_mask": mask.repeat_interleave(2, 1)}
    else:
        ids = torch.randint(2, 100, mask.shape, generator=generator)
        inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    if hasattr(model, "decoder"):
        target = torch.ones(4, 7, dtype=torch.long)
        target[2, 5:] = 0
        ids = torch.randint(2, 100, target.shape, generator=generator)
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": target}
    return inputs


def encoded_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """Which positions of the encoder's last hidden state count; of images all."""
    if "pixel_values" in inputs:
        batch, _, size, _ = inputs["pixel_values"].shape  # with a class token, with registers too, without either
        return torch.ones(batch, {12: 10, 16: 16, 8: 9}[size], dtype=torch.bool)
    if "input_features" in inputs:
        batch, _, length = inputs["input_features"].shape
        return torch.ones(batch, length // 2, dtype=torch.bool)
    mask = inputs["attention_mask"]
    if "input_values" not in inputs:
        return mask.bool()
    return torch.arange(mask.shape[1] // 2, device=mask.device) < mask.sum(1, keepdim=True) // 2


def real_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """Which positions of the last hidden state count."""
    return inputs["decoder_attention_mask"].bool() if "decoder_attention_mask" in inputs else encoded_tokens(inputs)
