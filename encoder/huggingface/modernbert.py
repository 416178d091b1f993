"""ModernBERT: rotary positions, layers that see all and layers that see a window, gated feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from ..packing import PaddedPacking
from ..padding import RealTokens
from .common import (
    PaddingFree,
    asks_for_more,
    by_name,
    feed_forward,
    serves,
    why_not_activation,
    why_not_attention,
    why_not_linear,
)
from .pre_norm import norm
from .stock import CAPTURE, Stock

FAMILIES = {"modernbert": ""}

_LAYER = {
    "ModernBertEncoderLayer": "hidden_states attention_mask position_embeddings **kwargs: attn attn_norm mlp mlp_norm",
    "ModernBertAttention": "hidden_states position_embeddings attention_mask **kwargs: "
                           "Wo Wqkv apply_rotary_pos_emb attention_dropout head_dim out_drop sliding_window",
    "ModernBertMLP": "hidden_states: Wi Wo act drop",
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim: float rotate_half",
    "rotate_half": "x: cat",
}  # fmt: skip
_MODEL = {
    "ModernBertModel": "input_ids attention_mask position_ids **kwargs: attention_type create_bidirectional_mask "
                       "create_bidirectional_sliding_window_mask embeddings final_norm layer_types rotary_emb",
}  # fmt: skip


class _Packing(PaddedPacking):
    """Where the real tokens are, and what layers of one kind share: rotary tables, and the band of a window."""

    def __init__(self, tokens: RealTokens) -> None:
        super().__init__(tokens)
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        self._bands: dict[int, Tensor] = {}

    def tables(self, kind: Any, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows of cosine and sine tables that the packed tokens take, ``[T, D / 2]``."""
        if kind not in self._tables:
            halves = (t[..., : t.shape[-1] // 2].expand(self.shape[0], -1, -1) for t in position_embeddings)
            cos, sin = (self.pack(t) for t in halves)
            self._tables[kind] = cos, sin
        return self._tables[kind]

    def local(self, reach: int) -> dict[str, Any]:
        """Options of `attend` for keys no farther than `reach` tokens from a query: for the kernels a window, for eager
        attention, which is faster with a mask, a band ``[L, L]``."""
        if self.max_length <= reach + 1:
            return {}
        if self.indices.is_cuda:
            return {"window": (reach, reach)}
        if reach not in self._bands:
            every = torch.ones(self.max_length, self.max_length, dtype=torch.bool, device=self.indices.device)
            self._bands[reach] = every.tril(reach).triu(-reach)
        return {"attn_mask": self._bands[reach]}


class _FusedLayer(nn.Module):
    """A ModernBERT layer on the fused kernels; mixed into a subclass of it."""

    stock_attention: ClassVar[type]
    stock_mlp: ClassVar[type]
    served = frozenset({"hidden_states", "attention_mask", "position_embeddings"})

    @classmethod
    def why_not_fused(cls, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        parts = layer._modules
        attn, mlp, attn_norm = parts["attn"], parts["mlp"], parts["attn_norm"]
        return (
            why_not_plain([("attn", attn, cls.stock_attention), ("mlp", mlp, cls.stock_mlp)], except_of=CAPTURE)
            or why_not_attention(attn, ("Wqkv", "Wo"), "attn", attn.head_dim)
            or why_not_linear((f"mlp.{name}", mlp._modules[name]) for name in ("Wi", "Wo"))
            or why_not_activation(mlp.act)
            or why_not_plain(
                [
                    # The first layer has no norm of its own, and without dropout there is no module for it.
                    ("attn_norm", attn_norm, _identity_or(nn.LayerNorm, attn_norm)),
                    ("attn.out_drop", attn.out_drop, _identity_or(nn.Dropout, attn.out_drop)),
                    ("mlp_norm", parts["mlp_norm"], nn.LayerNorm),
                    ("mlp.drop", mlp._modules["drop"], nn.Dropout),
                ]
            )
        )

    def forward(
        self, *args: Any, packing: _Packing | None = None, windowed: bool = False, **kwargs: Any
    ) -> Tensor:  # fmt: skip
        """As ModernBERT's own layer.

        With `packing` the result is packed, ``[T, width]``, and there is no mask. `windowed` says that the mask knows
        of padding alone, so that a local layer adds its window.
        """
        given = by_name(self, args, kwargs)
        x: Any = given.get("hidden_states")
        attention_mask, position_embeddings = given.get("attention_mask"), given.get("position_embeddings")
        parts: Any = self._modules
        attn, mlp, attn_norm, mlp_norm = parts["attn"], parts["mlp"], parts["attn_norm"], parts["mlp_norm"]
        if packing is None and not windowed and (
            position_embeddings is None
            or asks_for_more(given, self.served)
            or not serves(x, attention_mask, mlp_norm.weight)
            or self.why_not_fused(self)
        ):  # fmt: skip
            return super().forward(**given)
        assert position_embeddings is not None
        if packing is not None and x.dim() == 3:
            x = packing.pack(x)
        normed = x if type(attn_norm) is nn.Identity else norm(x, attn_norm)
        key: Any  # for a type checker `rotary` may give None
        query, key, value = attn.Wqkv(normed).unflatten(-1, (3, -1, attn.head_dim)).unbind(-3)
        dropout_p = attn.attention_dropout if attn.training else 0.0
        reach = None if attn.sliding_window is None else attn.sliding_window - 1
        if packing is not None:
            query, key = kernels.rotary(query, key, *packing.tables(self.attention_type, position_embeddings))
            local = {} if reach is None else packing.local(reach)
            attended = packing.attend(query, key, value, dropout_p=dropout_p, **local)
        else:
            query, key = kernels.rotary(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
            window = (reach, reach) if windowed and reach is not None else None
            attended = kernels.attention(
                query, key, value.transpose(1, 2), attention_mask, dropout_p, window=window
            ).transpose(1, 2)
        out_drop = attn.out_drop
        normed, x = kernels.add_norm(
            attn.Wo(attended.flatten(-2)), x, mlp_norm.weight, mlp_norm.bias, eps=mlp_norm.eps,
            dropout_p=out_drop.p if out_drop.training and type(out_drop) is nn.Dropout else 0.0, return_sum=True,
        )  # fmt: skip
        dropout_p = mlp.drop.p if mlp.drop.training else 0.0
        return feed_forward(normed, mlp.Wi, mlp.act, mlp.Wo, gated=True, dropout_p=dropout_p, residual=x)


def _identity_or(kind: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    return nn.Identity if type(module) is nn.Identity else kind


class _FusedModel(PaddingFree):
    """ModernBERT; mixed into a subclass of it."""

    layer_list = "layers"
    by_distance = True
    served = frozenset({"input_ids", "attention_mask", "inputs_embeds", "position_ids"})

    def _plan(self, inputs: Tensor, attention_mask: Any) -> tuple[Any, dict[str, Any]] | None:
        if attention_mask is not None and not (
            isinstance(attention_mask, Tensor) and attention_mask.shape == inputs.shape[:2]
        ):
            return None
        tokens = self._padding(inputs, attention_mask)
        if tokens is not None:
            return _for_all(None), {"packing": _Packing(tokens)}
        if not inputs.is_cuda:  # elsewhere torch's attention is faster with a mask than ours with a window
            return None
        return _for_all(None if attention_mask is None else attention_mask.bool()[:, None, None]), {"windowed": True}


def _for_all(mask: Tensor | None) -> dict[str, Tensor | None]:
    """The same mask for layers of either kind."""
    return {"full_attention": mask, "sliding_attention": mask}


def fused_classes(stock: Stock) -> Iterator[type]:
    """The classes that take the place of ModernBERT's."""
    parts = {"stock_attention": stock["ModernBertAttention"], "stock_mlp": stock["ModernBertMLP"]}
    layer = stock.fused(_FusedLayer, "ModernBertEncoderLayer", _LAYER, **parts)
    yield layer
    yield stock.fused(_FusedModel, "ModernBertModel", _MODEL, fused_layer=layer)
