"""What one encoder_layer call is made of, in the one form that every path takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..attention.api import assemble
from ..attention.arguments import Inputs
from ..attention.arguments import Options as AttentionOptions


class LayerWeights(NamedTuple):
    """The parameters of a layer, shaped as in `torch.nn.TransformerEncoderLayer`. None where it has none."""

    in_proj_weight: Tensor
    """``[3 E, E]``: query, key and value projections, one below the other."""
    in_proj_bias: Tensor | None
    """``[3 E]``"""
    out_proj_weight: Tensor
    """``[E, E]``"""
    out_proj_bias: Tensor | None
    norm1_weight: Tensor | None
    """``[E]``, as are the norms' other parameters."""
    norm1_bias: Tensor | None
    weight1: Tensor
    """``[d_hidden, E]``"""
    bias1: Tensor | None
    weight2: Tensor
    """``[E, d_hidden]``"""
    bias2: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None


class Masks(NamedTuple):
    """What limits attention, as `attention` and `attention_varlen` take it."""

    attn_mask: Tensor | None = None
    is_causal: bool = False
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0


class Dropouts(NamedTuple):
    """Probabilities: of attention's weights, of its projection, of the hidden activation, of the feed-forward."""

    attention: float = 0.0
    projection: float = 0.0
    hidden: float = 0.0
    output: float = 0.0

    def spread(self, drawn: Iterable[Tensor]) -> list[Tensor | None]:
        """What is drawn for the places that drop, with None for the others in between."""
        rest = iter(drawn)
        return [next(rest) if p > 0.0 else None for p in self]


class Options(NamedTuple):
    """The numbers of a call."""

    nhead: int
    batch_first: bool
    norm_first: bool
    activation: str | Callable[[Tensor], Tensor]
    eps1: float
    eps2: float
    dropouts: Dropouts

    @property
    def kernel_activation(self) -> str:
        """The activation, of a call that the kernels serve."""
        assert isinstance(self.activation, str)
        return self.activation


def views(qkv: Tensor, shape: Sequence[int], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[B, H, L, D]`` in their rows ``[T, 3 E]``; of a packed batch ``[1, H, T, D]``."""
    split = qkv.view(*shape[:-1], 3, options.nhead, shape[-1] // options.nhead)
    if len(shape) == 2:
        split = split[None]
    elif not options.batch_first:
        split = split.transpose(0, 1)
    query, key, value = split.transpose(1, 3).unbind(2)
    return query, key, value


def attention_call(
    qkv: Tensor, shape: Sequence[int], masks: Masks, seed: Tensor | None, options: Options
) -> tuple[Inputs, AttentionOptions]:
    query, key, value = views(qkv, shape, options)
    starts, packed = masks.cu_seqlens, masks.cu_seqlens is not None
    batch, length = query.shape[0], query.shape[2]
    if starts is not None:
        batch, length = starts.shape[0] - 1, masks.max_seqlen
    inputs, call = assemble(
        query, key, value, starts, starts, batch, length, length, packed, masks.attn_mask, 0.0, masks.is_causal,
        None, None, None, None, None, "top_left", None,
    )  # fmt: skip
    return inputs._replace(seed=seed), call._replace(dropout_p=options.dropouts.attention)


def as_rows(attended: Tensor, options: Options, rows: Tensor | None) -> Tensor:
    """``[B, H, L, D]`` to ``[T, E]`` in the order of the source's rows; a view."""
    assert rows is not None
    swapped = attended.transpose(1, 2) if options.batch_first else attended.permute(2, 0, 1, 3)
    return swapped.reshape(rows.shape)


def as_heads(rows: Tensor, attended: Tensor | None, options: Options) -> Tensor:
    """The other way round."""
    assert attended is not None
    batch, nhead, length, head_dim = attended.shape
    if options.batch_first:
        return rows.view(batch, length, nhead, head_dim).transpose(1, 2)
    return rows.view(length, batch, nhead, head_dim).permute(1, 2, 0, 3)
