"""What BERT and the families with its layers share: post-norm layers, encoders and embeddings."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from ..packing import PaddedPacking
from .common import (
    asks_for_more,
    attention,
    by_name,
    causal_without_mask,
    feed_forward,
    serves,
    why_not_activation,
    why_not_attention,
    why_not_linear,
)
from .stock import CAPTURE


class Names(NamedTuple):
    """Where a family's layer keeps what the fused forward needs, as paths within the layer."""

    attention: str
    """The module that attends."""
    projections: tuple[str, str, str]
    """Of query, key and value, in the attention."""
    attention_dropout: str
    out: str
    dropout1: str | None
    norm1: str
    up: str
    activation: str
    down: str
    dropout2: str | None
    norm2: str


class PostNormLayer(nn.Module):
    """A post-norm layer on the fused kernels; mixed into a subclass of the family's own layer."""

    names: ClassVar[Names]
    parts: ClassVar[dict[str, type]]
    """The family's own classes of the parts that the fused forward stands in for, by path."""
    served: ClassVar[frozenset[str]] = frozenset({"hidden_states", "attention_mask"})
    """Arguments of the stock forward that the fused one serves."""

    @classmethod
    def why_not_fused(cls, layer: Any) -> str:
        """Why a layer cannot run fused, or ""."""
        if getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False):
            return "a decoder layer"
        names = cls.names
        reason = why_not_plain(((path, _at(layer, path), kind) for path, kind in cls.parts.items()), except_of=CAPTURE)
        if reason:
            return reason
        if any(part.__dict__.get("chunk_size_feed_forward") for part in (layer, *(_at(layer, p) for p in cls.parts))):
            return "the feed-forward is chunked"
        attending = _at(layer, names.attention)
        dropouts = (names.attention_dropout, names.dropout1, names.dropout2)
        return (
            why_not_attention(attending, names.projections, names.attention, attending.attention_head_size)
            or why_not_linear((path, _at(layer, path)) for path in (names.out, names.up, names.down))
            or why_not_activation(_activation(layer, names.activation))
            or why_not_plain(
                [
                    *((path, _at(layer, path), nn.LayerNorm) for path in (names.norm1, names.norm2)),
                    *((path, _at(layer, path), nn.Dropout) for path in dropouts if path is not None),
                ]
            )
        )

    def forward(self, *args: Any, packing: PaddedPacking | None = None, **kwargs: Any) -> Any:
        """As the family's own layer; with `packing` the result is packed, ``[T, width]``, and there is no mask."""
        given = by_name(self, args, kwargs)
        x, attention_mask = given.get("hidden_states"), given.get("attention_mask")
        if packing is None and (
            asks_for_more(given, self.served)
            or not serves(x, attention_mask, _at(self, self.names.norm1).weight)
            or self.why_not_fused(self)
        ):
            return super().forward(**given)
        attending = _at(self, self.names.attention)
        return self._layer(
            x, packing, attn_mask=attention_mask, scale=attending.scaling,
            is_causal=packing is None and causal_without_mask(attending, attention_mask, kwargs),
        )  # fmt: skip

    def _layer(self, x: Any, packing: PaddedPacking | None, **options: Any) -> Tensor:
        """The layer, with options of `attention`."""
        names = self.names
        if packing is not None and x.dim() == 3:
            x = packing.pack(x)
        attending = _at(self, names.attention)
        attended = attention(
            x, [attending._modules[name] for name in names.projections],
            attending.attention_head_size, packing=packing, dropout_p=_rate(self, names.attention_dropout), **options,
        )  # fmt: skip
        x = self._add_norm(_at(self, names.out)(attended), x, names.norm1, names.dropout1)
        out = feed_forward(x, _at(self, names.up), _activation(self, names.activation), _at(self, names.down))
        return self._add_norm(out, x, names.norm2, names.dropout2)

    def _add_norm(self, x: Tensor, residual: Tensor, norm: str, dropout: str | None) -> Tensor:
        module = _at(self, norm)
        return kernels.add_norm(
            x, residual, module.weight, module.bias, eps=module.eps, dropout_p=_rate(self, dropout)
        )  # fmt: skip


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module._modules[name]
    return module


def _activation(layer: Any, path: str) -> Any:
    """The activation, which may be a function of the user's, and then is no submodule."""
    holder, _, name = path.rpartition(".")
    return getattr(_at(layer, holder) if holder else layer, name)


def _rate(layer: Any, path: str | None) -> float:
    if path is None:
        return 0.0
    dropout = _at(layer, path)
    return dropout.p if dropout.training else 0.0


class PostNormEmbeddings(nn.Module):
    """Embeddings whose positions are 0 to L - 1 unless given, in one pass with their norm and dropout; mixed into a
    subclass of the family's own.

    Without `token_type_ids` all tokens are of type 0, as in the family's own.
    """

    served: ClassVar[frozenset[str]] = frozenset({"input_ids", "token_type_ids", "position_ids"})
    """Arguments of the stock forward that the fused one serves."""

    @classmethod
    def why_not_fused(cls, embeddings: Any) -> str:
        """Why embeddings cannot run fused, or ""."""
        parts = embeddings._modules
        tables = [name for name in _TABLES if name in parts]
        reason = why_not_plain(
            [
                *((name, parts[name], nn.Embedding) for name in tables),
                ("LayerNorm", parts["LayerNorm"], nn.LayerNorm),
                ("dropout", parts["dropout"], nn.Dropout),
            ]
        )
        if reason:
            return reason
        for name in tables:
            table = parts[name]
            if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
                return f"{name} has options that are not fused"
            if table.padding_idx is not None and name != "word_embeddings":
                return f"{name} has a row without gradient"
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the family's own embeddings."""
        parts: Any = self._modules
        word, position, types = parts["word_embeddings"], parts["position_embeddings"], parts.get(_TABLES[2])
        given = by_name(self, args, kwargs)
        input_ids, position_ids = given.get("input_ids"), given.get("position_ids")
        norm = parts["LayerNorm"]
        if (
            input_ids is None
            or asks_for_more(given, self.served)
            or torch._C._get_tracing_state()  # a traced graph is made of torch's own operators
            or (position_ids is None and input_ids.shape[-1] > position.num_embeddings)
            or self.why_not_fused(self)
            or any(p.dtype != word.weight.dtype for p in self.parameters())
        ):
            return super().forward(**given)
        return kernels.embed_norm(
            input_ids, word.weight, position.weight, None if types is None else types.weight, norm.weight, norm.bias,
            position_ids=position_ids, token_type_ids=given.get("token_type_ids"), eps=norm.eps,
            dropout_p=_rate(self, "dropout"), padding_idx=word.padding_idx,
        )  # fmt: skip


_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
