"""What one encoder_layer call is made of, in the one form that every path takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..attention.arguments import Options as AttentionOptions
from ..attention.arguments import Tensors as AttentionTensors


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


class Tensors(NamedTuple):
    """The tensors of a call: the source, the parameters, what limits attention, and the keys of the dropouts."""

    src: Tensor
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    norm1_weight: Tensor | None
    norm1_bias: Tensor | None
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    attn_mask: Tensor | None
    """Four dimensions, each 1 or that of ``[B, H, L, L]``."""
    cu_seqlens: Tensor | None
    """``[B + 1]``, of a packed batch."""
    attention_seed: Tensor | None = None
    projection_seed: Tensor | None = None
    hidden_seed: Tensor | None = None
    output_seed: Tensor | None = None


class Options(NamedTuple):
    """The numbers of a call."""

    nhead: int
    batch_first: bool
    norm_first: bool
    activation: str
    """A name, or of a call that runs part by part a function."""
    eps1: float
    eps2: float
    is_causal: bool
    attention_p: float = 0.0
    """Probabilities of the dropouts: of the softmax weights, the projection, the hidden layer, the output."""
    projection_p: float = 0.0
    hidden_p: float = 0.0
    output_p: float = 0.0


def views(qkv: Tensor, shape: Sequence[int], options: Options) -> tuple[Tensor, ...]:
    """Query, key and value ``[B, H, L, D]`` in their rows ``[T, 3 E]``; of a packed batch ``[T, H, D]``."""
    nhead = options.nhead
    split = qkv.view(*shape[:-1], 3, nhead, shape[-1] // nhead)
    if len(shape) == 2:
        return split.unbind(1)
    return split.permute((2, 0, 3, 1, 4) if options.batch_first else (2, 1, 3, 0, 4)).unbind()


def attention_tensors(
    qkv: Tensor, shape: Sequence[int], attn_mask: Tensor | None, starts: Tensor | None, seed: Tensor | None,
    options: Options,
) -> AttentionTensors:  # fmt: skip
    """The tensors of the attention call on the projections ``[T, 3 E]``."""
    query, key, value = views(qkv, shape, options)
    return AttentionTensors(
        query, key, value, attn_mask, seqlens_q=starts, seqlens_k=starts, seed=seed,
    )  # fmt: skip


def attention_options(width: int, packed: bool, options: Options) -> AttentionOptions:
    """The numbers of that call."""
    right = 0 if options.is_causal else -1
    return AttentionOptions((width // options.nhead) ** -0.5, options.attention_p, right=right, packed=packed)


def as_rows(attended: Tensor, options: Options) -> Tensor:
    """What attention returns as ``[T, E]`` in the order of the source's rows; a view."""
    if attended.dim() == 3:
        return attended.flatten(1)
    swapped = attended.transpose(1, 2) if options.batch_first else attended.permute(2, 0, 1, 3)
    return swapped.reshape(-1, attended.shape[1] * attended.shape[3])


def as_heads(rows: Tensor, attended: Tensor, options: Options) -> Tensor:
    """The other way round."""
    if attended.dim() == 3:
        return rows.view(attended.shape)
    batch, nhead, length, head_dim = attended.shape
    if options.batch_first:
        return rows.view(batch, length, nhead, head_dim).transpose(1, 2)
    return rows.view(length, batch, nhead, head_dim).permute(1, 2, 0, 3)
