"""The encoders of T5 and mT5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.common.backend import would_use_triton
from ..modules import why_not_plain
from ..packing import PaddedPacking
from .common import (
    PaddingFree,
    asks_for_more,
    attention,
    by_name,
    feed_forward,
    serves,
    why_not_activation,
    why_not_attention,
    why_not_linear,
)
from .stock import CAPTURE, Stock

FAMILIES = {"t5": "T5", "mt5": "MT5"}
"""Model types of transformers and the prefix of their classes. Their layers are the same but for the name."""

_PARTS = ("LayerSelfAttention", "Attention", "LayerNorm", "LayerFF", "DenseActDense", "DenseGatedActDense")
_BLOCK = {
    "Block": "hidden_states attention_mask position_bias **kwargs: any clamp finfo float16 isinf layer max where",
    "LayerSelfAttention": "hidden_states attention_mask position_bias **kwargs: SelfAttention dropout layer_norm",
    "Attention": "hidden_states mask position_bias **kwargs: compute_bias dropout gradient_checkpointing "
                 "has_relative_attention_bias k key_value_proj_dim n_heads o q requires_grad scaling v",
    "Attention.compute_bias": "query_length key_length device past_seen_tokens: _relative_position_bucket weight "
                              "relative_attention_bias relative_attention_max_distance relative_attention_num_buckets",
    "Attention._relative_position_bucket": "relative_position bidirectional num_buckets max_distance: "
                                           "abs float full_like log math min where zeros_like",
    "LayerNorm": "hidden_states: bfloat16 float16 float32 mean pow rsqrt variance_epsilon weight",
    "LayerFF": "hidden_states: DenseReluDense dropout layer_norm",
    "DenseActDense": "hidden_states: act dropout int8 weight wi wo",
    "DenseGatedActDense": "hidden_states: act dropout int8 weight wi_0 wi_1 wo",
}  # fmt: skip
_STACK = {
    "Stack": "input_ids attention_mask **kwargs: "
             "block create_bidirectional_mask create_causal_mask dropout embed_tokens final_layer_norm",
}  # fmt: skip


class _FusedBlock(nn.Module):
    """A block of T5's encoder on the fused kernels; mixed into a subclass of the family's own block."""

    parts: ClassVar[dict[str, type]]
    """The family's own classes of the parts that the fused forward stands in for, by the end of their names."""
    served: ClassVar[frozenset[str]] = frozenset({"hidden_states", "attention_mask", "position_bias"})

    @classmethod
    def why_not_fused(cls, block: Any) -> str:
        """Why a block cannot run fused, or ""."""
        if block.is_decoder:
            return "a decoder block"
        stock = cls.parts
        first, second = block._modules["layer"]
        attention, dense = first._modules["SelfAttention"], second._modules["DenseReluDense"]
        gated = type(dense) is stock["DenseGatedActDense"]
        reason = why_not_plain(
            [
                ("layer.0", first, stock["LayerSelfAttention"]),
                ("layer.0.SelfAttention", attention, stock["Attention"]),
                ("layer.1", second, stock["LayerFF"]),
                ("layer.1.DenseReluDense", dense, stock["DenseGatedActDense" if gated else "DenseActDense"]),
            ],
            except_of=CAPTURE,
        )
        if reason:
            return reason
        linears = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
        reason = (
            why_not_attention(attention, ("q", "k", "v", "o"), "layer.0.SelfAttention", attention.key_value_proj_dim)
            or why_not_linear((f"layer.1.DenseReluDense.{name}", dense._modules[name]) for name in linears)
            or why_not_activation(dense.act)
            or why_not_plain(
                [
                    ("layer.0.layer_norm", first._modules["layer_norm"], stock["LayerNorm"]),
                    ("layer.0.dropout", first._modules["dropout"], nn.Dropout),
                    ("layer.1.layer_norm", second._modules["layer_norm"], stock["LayerNorm"]),
                    ("layer.1.dropout", second._modules["dropout"], nn.Dropout),
                    ("layer.1.DenseReluDense.dropout", dense._modules["dropout"], nn.Dropout),
                ]
            )
        )
        if reason:
            return reason
        dtype = dense.wo.weight.dtype
        if dtype == torch.float16:
            return "float16 hidden states are clamped between the parts"
        if any(dense._modules[name].weight.dtype != dtype for name in linears) or attention.o.weight.dtype != dtype:
            return "the weights are of several dtypes"
        return ""

    def forward(
        self, *args: Any, packing: PaddedPacking | None = None, together: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        """As the family's own block.

        With `packing` the result is packed, ``[T, width]``, and there is no mask. `together` says that all blocks of
        the encoder run fused: then the position bias may be one by distance, ``[H, 2 R + 1]``.
        """
        given = by_name(self, args, kwargs)
        x: Any = given.get("hidden_states")
        attention_mask, position_bias = given.get("attention_mask"), given.get("position_bias")
        first, second = self._modules["layer"]  # type: ignore[misc]
        norm1, norm2 = first._modules["layer_norm"], second._modules["layer_norm"]
        module, dense = first._modules["SelfAttention"], second._modules["DenseReluDense"]
        if not together and (
            asks_for_more(given, self.served)
            or not serves(x, attention_mask, norm1.weight)
            or (position_bias is None and not module.has_relative_attention_bias)
            or self.why_not_fused(self)
        ):
            return super().forward(**given)
        if packing is not None and x.dim() == 3:
            x = packing.pack(x)
        if position_bias is None:
            position_bias = _position_bias(module, x, packing, together)
        attended = attention(
            kernels.add_norm(x, None, norm1.weight, norm="rms", eps=norm1.variance_epsilon),
            (module.q, module.k, module.v), module.key_value_proj_dim, packing=packing,
            dropout_p=module.dropout if module.training else 0.0, scale=module.scaling,
            **_bias_and_mask(position_bias, attention_mask),
        )  # fmt: skip
        normed, x = kernels.add_norm(
            module.o(attended), x, norm2.weight, norm="rms", eps=norm2.variance_epsilon,
            dropout_p=first.dropout.p, training=first.dropout.training, return_sum=True,
        )  # fmt: skip
        out = feed_forward(
            normed, (dense.wi_0, dense.wi_1) if "wi_0" in dense._modules else dense.wi, dense.act, dense.wo,
            dropout_p=dense.dropout.p if dense.dropout.training else 0.0,
            out_dropout_p=second.dropout.p if second.dropout.training else 0.0, residual=x,
        )  # fmt: skip
        return out, position_bias, None


def _position_bias(module: Any, x: Tensor, packing: PaddedPacking | None, together: bool) -> Tensor:
    """The bias that all blocks share: by distance where kernels read that, else ``[1, H, L, L]``, as torch's do."""
    if together and would_use_triton(x):
        table, reach = module.relative_attention_bias.weight, module.relative_attention_max_distance
        return kernels.t5_relative_bias(table, max_distance=reach)
    length = x.shape[1] if packing is None else packing.max_length
    bias: Tensor = module.compute_bias(length, length, device=x.device)
    return bias


def _bias_and_mask(bias: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    """The two as arguments of attention."""
    if bias.dim() == 2:
        return {"relative_bias": bias, "attn_mask": mask}
    if mask is None:
        return {"attn_mask": bias}
    return {
        "attn_mask": torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
    }


class _FusedStack(PaddingFree):
    """T5's encoder; mixed into a subclass of the family's own stack."""

    layer_list = "block"
    by_distance = True

    @classmethod
    def why_not_fused(cls, encoder: Any) -> str:
        """Why a stack cannot run fused, or ""."""
        return "a decoder" if encoder.is_decoder else super().why_not_fused(encoder)

    def _plan(self, inputs: Tensor, attention_mask: Any) -> tuple[Any, dict[str, Any]] | None:
        mask, options = super()._plan(inputs, attention_mask) or (attention_mask, {})
        return mask, {**options, "together": True}


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of a family's own."""
    block = stock.fused(_FusedBlock, "Block", _BLOCK, parts={part: stock[part] for part in _PARTS})
    yield block
    yield stock.fused(_FusedStack, "Stack", _STACK, fused_layer=block)
