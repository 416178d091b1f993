"""fuse on Hugging Face's pre-norm and encoder-decoder families."""

from __future__ import annotations

import fusenc
import pytest
import torch
from contract import assert_same, output_and_gradients
from tolerances import SAME_ALGORITHM

TEXT = {"vocab_size": 100, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT_SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
BART = {
    **TEXT, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2,
    "max_position_embeddings": 64, "activation_function": "gelu", "dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "use_cache": False,
}  # fmt: skip
T5 = {
    **TEXT, "d_model": 48, "d_kv": 16, "num_heads": 4, "d_ff": 64, "num_layers": 2, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "decoder_start_token_id": 1,
    "use_cache": False,
}  # fmt: skip

FAMILIES = {
    # name: (model type, class of the model, options, expected number of fused modules, name of the dropout options)
    "vit": ("vit", "ViTModel", {**BERT_SIZES, "image_size": 12, "patch_size": 4}, 2),
    "clip text": ("clip_text_model", "CLIPTextModel", {**TEXT, **BERT_SIZES, "max_position_embeddings": 64}, 3),
    "clip vision": ("clip_vision_model", "CLIPVisionModel", {**BERT_SIZES, "image_size": 12, "patch_size": 4}, 3),
    "modernbert": (
        "modernbert", "ModernBertModel",
        {**TEXT, **BERT_SIZES, "num_hidden_layers": 3, "local_attention": 4, "global_attn_every_n_layers": 2,
         "cls_token_id": 0, "sep_token_id": 2}, 4,
    ),
    "t5": ("t5", "T5EncoderModel", T5, 3),
    "t5 gated": ("t5", "T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}, 3),
    "mt5": ("mt5", "MT5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}, 3),
    "t5 decoder": ("t5", "T5Model", T5, 3),
    "bart": ("bart", "BartModel", BART, 5),
    "marian": ("marian", "MarianModel", {**BART, "activation_function": "swish", "scale_embedding": True}, 5),
}  # fmt: skip
DROPOUT = {
    "vit": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "clip": {"attention_dropout": 0.1},
    "modernbert": {"attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1},
    "t5": {"dropout_rate": 0.1},
    "mt5": {"dropout_rate": 0.1},
    "bart": {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1},
    "marian": {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1},
}
PACKED = ["clip text", "modernbert", "t5", "t5 gated", "mt5", "bart", "marian"]


def small_model(family, implementation="sdpa", **options):
    import transformers

    kind, name, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    off = dict.fromkeys(DROPOUT[family.split()[0]], 0.0)
    config = transformers.AutoConfig.for_model(kind, **{**own, **off, **options})
    config._attn_implementation = implementation
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # small weights would hide what attention does
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "emb" not in parameter_name:
                parameter.mul_(0.2 / parameter.std().clamp(min=1e-6))
            elif "norm" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padding(kind, length=9):
    """Which tokens are real, ``[4, length]``."""
    mask = torch.ones(4, length, dtype=torch.long)
    if kind != "dense":
        mask[1, 5:] = 0
        mask[2, :3] = 0  # padding on the left
    if kind == "gaps":
        mask[3, 1::2] = 0  # and in between
    return mask


def batch(model, kind="padded"):
    """Inputs, and which positions of the last hidden state count."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(4, 3, 12, 12, generator=generator)
        return {"pixel_values": pixels}, torch.ones(4, 10, dtype=torch.bool)
    mask = padding(kind)
    ids = torch.randint(3, 100, mask.shape, generator=generator)
    inputs = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    if getattr(model, "decoder", None) is None:
        return inputs, mask.bool()
    target = torch.ones(4, 7, dtype=torch.long)
    target[2, 4:] = 0
    inputs["decoder_input_ids"] = torch.randint(3, 100, target.shape, generator=generator)
    return {**inputs, "decoder_attention_mask": target}, target.bool()


def used_parameters(model):
    """Those that the last hidden state depends on."""
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and "pooler" not in name and "post_layernorm" not in name
    ]


def outcome(model, kind="padded", **options):
    inputs, real = batch(model, kind)
    return output_and_gradients(model(**inputs, **options).last_hidden_state[real], used_parameters(model))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dense", "padded", "gaps"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, kind, implementation):
    model = small_model(family, implementation)
    expected = outcome(model, kind)
    keys = list(model.state_dict())
    report = fusenc.fuse(model)
    assert len(report.fused) == FAMILIES[family][3]
    assert set(report.left.values()) <= {"a decoder", "a decoder block"}
    assert_same(outcome(model, kind), expected, SAME_ALGORITHM)
    model.eval()
    inputs, real = batch(model, kind)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    torch.testing.assert_close(hidden[real], expected[0], rtol=0, atol=SAME_ALGORITHM * expected[0].abs().max().item())
    assert list(model.state_dict()) == keys
    fusenc.unfuse(model.train())
    for got, want in zip(outcome(model, kind), expected, strict=True):
        assert torch.equal(got, want)
    assert not any(type(module).__module__.startswith("fusenc") for module in model.modules())
