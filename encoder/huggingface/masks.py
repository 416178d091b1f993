"""One look at a mask: to see whether it hides anything, transformers' mask code waits for a GPU. For a fused model it
counts the real tokens of each row in that wait, so that the encoder need not wait again."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)

from ..padding import RealTokens, may_remove

_stock: Any = AttentionMaskInterface()["sdpa"]
_configs: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The configurations of fused models, by their ids."""


def count_for(config: Any) -> None:
    """Let the masks of models with this configuration be counted."""
    if config is not None:
        _configs[id(config)] = config


def counted(mask: Tensor, is_causal: bool) -> RealTokens | None:
    """The tokens that a mask of `sdpa_mask` calls real, if it has counted them and is causal or not, as asked."""
    tokens, causal, version = getattr(mask, "_fusenc_tokens", (None, None, None))
    return tokens if tokens is not None and causal is is_causal and version == mask._version else None


def sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers makes for sdpa."""
    keep, config = kwargs.get("attention_mask"), kwargs.get("config")
    if torch.compiler.is_compiling() or keep is None or config is None or _configs.get(id(config)) is not config:
        return _stock(*args, **kwargs)  # type: ignore[no-any-return]
    causal = kwargs.get("mask_function") is causal_mask_function
    skips = [name for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip") if kwargs.get(name)]
    known = skips and (causal or kwargs.get("mask_function") is bidirectional_mask_function)
    square = kwargs.get("q_length") == kwargs.get("kv_length") and keep.shape[1:] == (kwargs.get("kv_length"),)
    if not (known and square and keep.is_cuda and kwargs.get("local_size") is None and may_remove("remove", keep)):
        return _stock(*args, **kwargs)  # type: ignore[no-any-return]
    tokens: Any = RealTokens.read(keep.bool())
    if not tokens.hidden:
        return _stock(*args, **{**kwargs, "attention_mask": None})  # type: ignore[no-any-return]
    with torch.inference_mode(False):  # else nobody counts its changes
        mask: Any = _stock(*args, **{**kwargs, **dict.fromkeys(skips, False)})
    if not mask.is_inference():
        mask._fusenc_tokens = tokens, causal, mask._version
    return mask  # type: ignore[no-any-return]


AttentionMaskInterface.register("sdpa", sdpa_mask)
