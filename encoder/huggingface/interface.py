"""``attn_implementation="fusenc"``: attention on the fused kernels in any model that lets one choose it.

``"fusenc_flash"`` is the same under a name with "flash" in it, for which sentence-transformers flattens its batches.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.integrations import hub_kernels
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .. import kernels
from .calls import FLATTENED, flattened_starts
from .stock import collected

NAME, FLASH_NAME = "fusenc", "fusenc_flash"
_NOT_SERVED = ("cache", "s_aux")
"""Arguments that would change the result: a paged cache, and sinks of attention."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`fusenc.kernels.attention` as transformers' `AttentionInterface` calls it, under the name ``"fusenc"``.

    The same as ``"sdpa"``, and it takes `softcap` and gives the attention weights to a call that asks for them
    (``output_attentions=True``; without dropout and gradient). Masks are those of sdpa: windows come in them.

    A flattened batch, texts one after the other in one row, is computed by `attention_varlen`, text by text. It needs
    the four arguments. Restarting position ids alone are not enough: BERT, RoBERTa and ModernBERT use them in their
    embeddings only. Llama and its like make a mask of them, which keeps the texts apart too.

    Args:
        module: the attention; its `is_causal` counts where the call says nothing.
        query: ``[B, H, Lq, D]``.
        key: ``[B, Hk, Lk, D]``; Hk divides H.
        value: ``[B, Hk, Lk, Dv]``.
        attention_mask: bool (True takes part) or added to the scores, broadcastable to ``[B, H, Lq, Lk]``, or None.
        dropout: as `dropout_p` of `attention`.
        scaling: as `scale` of `attention`.
        is_causal: without a mask, a query attends to keys up to its position.
        position_bias: added to the scores, broadcastable to ``[B, H, Lq, Lk]``; differentiable.
        softcap: as in `attention`.
        sliding_window: without a mask, a query sees fewer than this many keys before and after its position.
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, int32 or int64 ``[texts + 1]``: where each text of a flattened
            batch begins, and L at the end; `max_length_q` and `max_length_k`: the longest text or more, an int or a
            tensor, whose value on a GPU is not read. What else transformers passes is ignored.

    Returns:
        ``[B, Lq, H, Dv]``, and the attention weights ``[B, H, Lq, Lk]`` or None.

    Raises:
        ValueError: a paged cache or attention sinks; arguments of a flattened batch that are incomplete or disagree
            (values are checked on the CPU only), or come with a mask, a position bias or a request for weights; what
            `attention` raises.
    """
    for name in _NOT_SERVED:
        if kwargs.get(name) is not None:
            _fail(name, "None", kwargs[name])
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    asked = collected()
    wants_weights = kwargs.get("output_attentions") or "attentions" in asked or "cross_attentions" in asked
    is_flattened = any(kwargs.get(name) is not None for name in FLATTENED)
    if is_flattened and getattr(attention_mask, "of_positions", False):
        attention_mask = None
    length, window = query.shape[2], None
    if sliding_window is not None and attention_mask is None and length == key.shape[2] > sliding_window:
        window = (sliding_window - 1, sliding_window - 1)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "window": window}
    if is_flattened:
        others = {"attention_mask": attention_mask, "position_bias": position_bias, "output_attentions": wants_weights}
        for name, given in others.items():
            if given is not None and given is not False:
                _fail(name, "None with cu_seq_lens_q", given)
        starts = flattened_starts(kwargs, query[:, 0], key[:, 0])
        arguments: Any = [*(t[0].transpose(0, 1) for t in (query, key, value)), *starts]  # [L, H, D] the first three
        options.update(dropout_p=dropout, is_causal=bool(is_causal))
        return kernels.attention_varlen(*arguments, **options)[None], None
    causal = bool(is_causal) and attention_mask is None and length > 1
    if position_bias is not None and attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            position_bias = position_bias.masked_fill(~attention_mask, float("-inf"))
        else:
            position_bias = position_bias + attention_mask
    mask = attention_mask if position_bias is None else position_bias
    options["enable_gqa"] = key.shape[1] != query.shape[1]
    out = kernels.attention(query, key, value, mask, dropout, causal, **options)
    weights = None
    if wants_weights:
        weights = kernels.attention_weights(query, key, mask, causal, **options).to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected} with attn_implementation={NAME!r}, got {got!r:.80}")


def attention_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask of `attention_forward`: that of sdpa, for transformers' `AttentionMaskInterface`.

    A mask of causality, windows and restarting positions alone is marked, as a flattened batch does without it. Under
    ``"fusenc_flash"`` there is none unless positions restart: attention applies `is_causal` and `sliding_window`.

    Raises:
        ValueError: the model's attention is not one that can be chosen, and would misread this mask.
    """
    if config is not None and not torch.compiler.is_compiling() and not _can_choose_attention(config.__class__):
        raise ValueError(
            f"attn_implementation={NAME!r}: {type(config).__name__} is of a model that computes attention in its own "
            'way; load it with "eager" (fusenc.fuse may know it)'
        )
    of_positions = kwargs.get("attention_mask") is None and not kwargs.get("use_vmap")
    if of_positions and getattr(config, "_attn_implementation", None) == FLASH_NAME:
        plain = kwargs.get("allow_is_causal_skip") or kwargs.get("allow_is_bidirectional_skip")
        if plain and kwargs.get("q_length") == kwargs.get("kv_length"):
            return None
    mask = sdpa_mask(*args, config=config, **kwargs)
    if of_positions and mask is not None:
        mask.of_positions = True
    return mask


@functools.cache
def _can_choose_attention(kind: type) -> bool:
    """False for the configuration of a model whose attention does not look at `attn_implementation`."""
    if kind not in MODEL_MAPPING:
        return True
    models = MODEL_MAPPING[kind]
    return any(
        model._supports_sdpa or model._supports_attention_backend
        for model in (models if isinstance(models, (list, tuple)) else [models])
    )


def _load_kernel(load: Any, attn_implementation: str, *args: Any, **kwargs: Any) -> Any:
    """transformers loads the functions of flash-attn for any name with "flash" in it, before it uses the name."""

    def unavailable(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"attn_implementation={FLASH_NAME!r} serves no model that calls flash-attn's functions itself")

    if attn_implementation != FLASH_NAME:
        return load(attn_implementation, *args, **kwargs)
    names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    return types.SimpleNamespace(**dict.fromkeys(names, unavailable))


hub_kernels.load_and_register_attn_kernel = functools.partial(_load_kernel, hub_kernels.load_and_register_attn_kernel)
for _name in (NAME, FLASH_NAME):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, attention_mask)  # without it models would pass no mask at all
