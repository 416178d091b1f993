"""What one encoder_layer call is made of, in the one form that every path takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention.arguments import Options as AttentionOptions


class LayerWeights(NamedTuple):
    """The parameters of a layer, named and shaped as in `torch.nn.TransformerEncoderLayer`. None where it has none.

    E is the width, H and Hk the numbers of heads of the query and of key and value, D their size.
    """

    in_proj_weight: Tensor
    """``[(H + 2 Hk) D, E]``: query, key and value projections, one below the other; beside those of key and value the
    query's, ``[H D, E]``."""
    in_proj_bias: Tensor | None
    """``[(H + 2 Hk) D]``, likewise."""
    out_proj_weight: Tensor
    """``[E, H D]``"""
    out_proj_bias: Tensor | None
    norm1_weight: Tensor | None
    """``[E]``, as are the norms' other parameters. Without a weight and a bias that norm only scales."""
    norm1_bias: Tensor | None
    weight1: Tensor
    """``[d_hidden, E]``; gated ``[2 d_hidden, E]``, the gate first, or beside `up_weight` the gate's alone."""
    bias1: Tensor | None
    weight2: Tensor
    """``[E, d_hidden]``"""
    bias2: Tensor | None
    norm2_weight: Tensor | None
    norm2_bias: Tensor | None
    k_proj_weight: Tensor | None = None
    """``[Hk D, E]``. Where query, key and value lie one behind the other in memory, as `fusenc.fuse` puts them, or gate
    and up do, they take one product, else one each."""
    k_proj_bias: Tensor | None = None
    v_proj_weight: Tensor | None = None
    v_proj_bias: Tensor | None = None
    up_weight: Tensor | None = None
    """``[d_hidden, E]``: what the gate multiplies."""
    up_bias: Tensor | None = None
    post_norm1_weight: Tensor | None = None
    """Of a pre-norm layer that also normalises what attention gives before it is added (sandwich norm, Gemma 2); there
    is such a norm after both parts or after none. None: there is none."""
    post_norm1_bias: Tensor | None = None
    post_norm2_weight: Tensor | None = None
    """The same of the feed-forward."""
    post_norm2_bias: Tensor | None = None


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
    k_proj_weight: Tensor | None
    k_proj_bias: Tensor | None
    v_proj_weight: Tensor | None
    v_proj_bias: Tensor | None
    up_weight: Tensor | None
    up_bias: Tensor | None
    post_norm1_weight: Tensor | None
    post_norm1_bias: Tensor | None
    post_norm2_weight: Tensor | None
    post_norm2_bias: Tensor | None
    attn_mask: Tensor | None
    """Four dimensions, each 1 or that of ``[B, H, L, L]``."""
    relative_bias: Tensor | None
    """As in `attention`, ``[1 or H, 2 R + 1]``."""
    src_half: Tensor | None
    """Under autocast the source in its dtype, if there is such a copy."""
    cos: Tensor | None
    """As in `rotary`."""
    sin: Tensor | None
    cu_seqlens: Tensor | None
    """``[B + 1]``, of a packed batch."""
    attention_seed: Tensor | None = None
    projection_seed: Tensor | None = None
    hidden_seed: Tensor | None = None
    output_seed: Tensor | None = None


class Options(NamedTuple):
    """The numbers of a call."""

    nhead: int
    kv_nhead: int
    head_dim: int
    scale: float
    """Of the scores."""
    batch_first: bool
    norm_first: bool
    no_norm1: bool
    """Pre-norm, attention's input is the source itself."""
    rms: bool
    activation: str
    """A name, or of a call that runs part by part a function."""
    gated: bool
    eps1: float
    eps2: float
    is_causal: bool
    left: int
    """How many keys before and behind its own position a query sees; -1: all."""
    right: int
    softcap: float
    """0: none."""
    recompute: bool
    """The activation is computed again for the backward pass."""
    half: torch.dtype | None
    """Under autocast the dtype of products; what goes from part to part is float32, as are all parameters."""
    attention_p: float = 0.0
    """Probabilities of the dropouts: of the softmax weights, the projection, the hidden layer, the output."""
    projection_p: float = 0.0
    hidden_p: float = 0.0
    output_p: float = 0.0


def views(qkv: Tensor, shape: Sequence[int], o: Options) -> tuple[Tensor, ...]:
    """Query, key and value ``[B, H, L, D]`` in their rows ``[T, (H + 2 Hk) D]``; of a packed batch ``[T, H, D]``."""
    split = qkv.view(*shape[:-1], o.nhead + 2 * o.kv_nhead, o.head_dim)
    if len(shape) == 3:
        split = split.transpose(1, 2) if o.batch_first else split.permute(1, 2, 0, 3)
    return split.split((o.nhead, o.kv_nhead, o.kv_nhead), 1)


def attention_options(packed: bool, o: Options) -> AttentionOptions:
    """The numbers of the attention call."""
    return AttentionOptions(
        o.scale, o.attention_p, o.softcap, o.left, 0 if o.is_causal else o.right, packed=packed
    )  # fmt: skip


def as_rows(attended: Tensor, o: Options) -> Tensor:
    """What attention returns as ``[T, H D]`` in the order of the source's rows; a view."""
    if attended.dim() == 3:
        return attended.flatten(1)
    swapped = attended.transpose(1, 2) if o.batch_first else attended.permute(2, 0, 1, 3)
    return swapped.reshape(-1, attended.shape[1] * attended.shape[3])


def as_heads(rows: Tensor, shape: Sequence[int], o: Options) -> Tensor:
    """The other way round."""
    if len(shape) == 3:
        return rows.view(shape)
    batch, nhead, length, head_dim = shape
    if o.batch_first:
        return rows.view(batch, length, nhead, head_dim).transpose(1, 2)
    return rows.view(length, batch, nhead, head_dim).permute(1, 2, 0, 3)
