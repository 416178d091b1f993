"""Embeddings of BERT's kind: word, position and type in one pass with their norm and dropout."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..modules import why_not_plain
from .calls import asks_for_more, by_name


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
        norm, dropout = parts["LayerNorm"], parts["dropout"]
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
            dropout_p=dropout.p if dropout.training else 0.0, padding_idx=word.padding_idx,
        )  # fmt: skip


_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
