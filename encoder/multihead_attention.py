"""torch.nn.MultiheadAttention on the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels.attention.eager import MAX_HEAD_DIM
from .packing import PackedTokens, in_the_kind_of


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with the same constructor, weights, masks and results on fused kernels.

    It runs in training and in inference, with every option of torch's: other widths of keys and values, `add_bias_kv`,
    `add_zero_attn`, attention weights (differentiable, after dropout), nested tensors. Differences from torch: a query
    with every key masked attends to nothing (output 0 before the projection, weights 0, where torch gives NaN on some
    paths); dropout draws another mask from the same generator; nested tensors may be jagged, may be of a query other
    than the keys, and may train. docs/torch_nn.md says which of torch's paths is followed where they differ.

    Example:
        >>> import torch, fusenc
        >>> attn = fusenc.MultiheadAttention(embed_dim=32, num_heads=4, batch_first=True)
        >>> x = torch.randn(2, 10, 32)
        >>> out, weights = attn(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 10, 10]))
    """

    def why_not_fused(self) -> str:
        """Why calls run torch's own forward, or "" if they run fused."""
        return f"the head size is above {MAX_HEAD_DIM}" if self.head_dim > MAX_HEAD_DIM else ""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`: same arguments, shapes, mask meaning (True is masked)."""
        masks = (attn_mask, key_padding_mask)
        nested = query.is_nested or key.is_nested or value.is_nested
        if nested:
            sizes = None
            served = (
                attn_mask is None and key_padding_mask is None and self._takes_nested(query, key, value, need_weights)
            )
        else:
            sizes = self._sizes(query, key, value)
            served = sizes is not None and masks_fit(*masks, query, sizes)
        if not served or self.why_not_fused():
            # Torch's own forward computes what we do not, and raises its own errors for bad input.
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        check_hint(is_causal, attn_mask)
        if sizes is None:
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        extra = self.bias_k is not None or self.add_zero_attn
        # Where torch asks for the whole mask the hint is only a hint; and of extra keys it knows nothing.
        mask, causal = merged_mask(*masks, is_causal and not need_weights and not extra, query, sizes)
        q, k, v = self._projections(query, key, value)
        if extra:
            k, v, mask = self._with_extra_keys(k, v, mask)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = kernels.attention_with_weights(q, k, v, mask, dropout_p, average=average_attn_weights)
            if weights.dtype is not query.dtype:
                weights = weights.to(query.dtype)
            if query.dim() == 2:
                weights = weights.squeeze(0)
        else:
            out = kernels.attention(q, k, v, mask, dropout_p, causal)
        out_proj = self.out_proj
        return F.linear(join_heads(out, query, self.batch_first), out_proj.weight, out_proj.bias), weights

    def _sizes(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int] | None:
        """Batch, heads, queries and keys; None for inputs that torch would not take."""
        shape = query.shape
        key_shape = shape if key is query else key.shape
        rank = len(shape)
        if (
            rank not in (2, 3) or len(key_shape) != rank or (value is not key and key_shape[:-1] != value.shape[:-1])
            or not self._fits(query, key, value)
        ):  # fmt: skip
            return None
        if rank == 2:
            return 1, self.num_heads, shape[0], key_shape[0]
        batch, length = (0, 1) if self.batch_first else (1, 0)
        if shape[batch] != key_shape[batch]:
            return None
        return shape[batch], self.num_heads, shape[length], key_shape[length]

    def _fits(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """True if widths and dtypes go with the weights."""
        weight = self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight
        if query.size(-1) != self.embed_dim or (self.bias_k is None) is not (self.bias_v is None):
            return False
        if key.size(-1) != self.kdim or value.size(-1) != self.vdim:
            return False
        dtype = query.dtype
        if dtype is key.dtype and dtype is value.dtype and dtype is weight.dtype:
            return True
        return query.is_floating_point() and torch.is_autocast_enabled(query.device.type)

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Query, key and value ``[B, H, L, D]`` of three inputs."""
        if self._qkv_same_embed_dim:
            return project(self, query, key, value, self.batch_first)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return [
            _heads(F.linear(x, weight, bias), self, self.batch_first)  # type: ignore[arg-type]
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]

    def _with_extra_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values followed by the learned ones and by zeros, as far as asked for; every query sees them."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, bias.to(t.dtype).view(1, self.num_heads, 1, -1).expand(t.shape[0], -1, -1, -1)], 2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        return k, v, None if mask is None else F.pad(mask, (0, extra), value=float(mask.dtype == torch.bool))

    def _takes_nested(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> bool:
        """True for nested tensors ``[B, jagged, E]`` of one layout; where weights are asked for, without gradients."""
        tensors = (query, key, value)
        if not all(t.is_nested and t.layout == query.layout and t.dim() == 3 for t in tensors):
            return False
        if not self.batch_first or self.bias_k is not None or self.add_zero_attn:
            return False
        if query.layout == torch.jagged and any(t.lengths() is not None for t in tensors):  # type: ignore[attr-defined]
            return False  # with holes between the sequences
        if need_weights and (
            (self.training and self.dropout > 0.0)
            or (torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self.parameters())))
        ):
            return False
        return self._fits(query, key, value)

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """On the tokens of all sequences, one after the other; weights are padded with 0, as torch's."""
        of_q = PackedTokens.from_nested(query)
        of_k = of_q if key is query else PackedTokens.from_nested(key)
        of_v = of_k if value is key else PackedTokens.from_nested(value)
        if len(of_q) != len(of_k) or (of_v is not of_k and not torch.equal(of_k.cu_seqlens, of_v.cu_seqlens)):
            raise AssertionError(
                f"key's sequence lengths {of_k.lengths.tolist()} do not match value's {of_v.lengths.tolist()}, "
                f"or their number does not match query's {len(of_q)}"
            )
        q, k, v = (t[0].transpose(0, 1) for t in self._projections(of_q.data, of_k.data, of_v.data))
        starts = (of_q.cu_seqlens, of_k.cu_seqlens, of_q.max_length, of_k.max_length)
        out: Any = kernels.attention_varlen(q, k, v, *starts, dropout_p=self.dropout if self.training else 0.0)
        weights = None
        if need_weights:
            names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
            weights = kernels.attention_weights(q, k, average=average, **dict(zip(names, starts, strict=True)))  # type: ignore[arg-type]
            weights = weights.to(query.dtype)
        out = F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)
        return in_the_kind_of(query, of_q.with_data(out)), weights


def batch_and_length(x: Tensor, batch_first: bool) -> tuple[int, int]:
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


def masks_fit(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, sizes: tuple[int, int, int, int]
) -> bool:
    """True if torch would take these masks; `sizes` are batch, heads, queries, keys."""
    batch, nhead, len_q, len_k = sizes
    if key_padding_mask is not None and (
        key_padding_mask.shape != ((batch, len_k) if query.dim() == 3 else (len_k,))
        or not _dtype_fits(key_padding_mask, query)
    ):
        return False
    return attn_mask is None or (
        attn_mask.shape in ((len_q, len_k), (batch * nhead, len_q, len_k)) and _dtype_fits(attn_mask, query)
    )


def _dtype_fits(mask: Tensor, query: Tensor) -> bool:
    dtype = mask.dtype
    return (
        dtype in (torch.bool, torch.float32, query.dtype)
        or (mask.is_floating_point() and torch.is_autocast_enabled(query.device.type))
    )  # fmt: skip


def check_hint(is_causal: bool, attn_mask: Tensor | None) -> None:
    """Raise as torch does where there is a hint and nothing that it is a hint of."""
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )


def merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, hinted: bool, query: Tensor,
    sizes: tuple[int, int, int, int], names: tuple[str, str] = ("attn_mask", "key_padding_mask"),
) -> tuple[Tensor | None, bool]:  # fmt: skip
    """One mask with the kernels' meaning (bool with True taking part, or floating and added), and whether attention is
    causal instead: a hint, `hinted`, stands for the mask where there is no padding, as in torch. `names` are those of
    the masks in warnings."""
    if key_padding_mask is None:
        if attn_mask is None:
            return None, False
        if hinted:
            return None, True
    batch, nhead, len_q, len_k = sizes
    if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        key_padding_mask = F._canonical_mask(  # warns, as torch does, that mixed mask types are deprecated
            key_padding_mask, names[1], attn_mask.dtype, names[0], query.dtype
        )
        attn_mask = F._canonical_mask(attn_mask, names[0], None, "", query.dtype, False)
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch, nhead, len_q, len_k))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(batch, 1, 1, len_k))
    if masks[0].dtype == torch.bool:
        return ~(masks[0] | masks[1] if len(masks) == 2 else masks[0]), False
    return masks[0] + masks[1] if len(masks) == 2 else masks[0], False


def project(
    attn: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
) -> Sequence[Tensor]:
    """Query, key and value ``[B, H, L, D]``, with one product for inputs that are the same tensor."""
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    assert weight is not None
    if query is key and key is value:
        return _heads_of_parts(F.linear(query, weight, bias), 3, attn, batch_first)
    width = attn.embed_dim
    if key is value:
        of_q, of_kv = weight.split([width, 2 * width])
        bias_q, bias_kv = (None, None) if bias is None else bias.split([width, 2 * width])
        q = _heads(F.linear(query, of_q, bias_q), attn, batch_first)
        return q, *_heads_of_parts(F.linear(key, of_kv, bias_kv), 2, attn, batch_first)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [
        _heads(F.linear(x, w, b), attn, batch_first)
        for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
    ]


def _heads(x: Tensor, attn: nn.MultiheadAttention, batch_first: bool) -> Tensor:
    """``[B, L, E]``, ``[L, B, E]`` or ``[L, E]`` seen as ``[B, H, L, D]``."""
    if x.dim() == 2:
        return x.view(1, x.shape[0], attn.num_heads, attn.head_dim).transpose(1, 2)
    heads = x.view(x.shape[0], x.shape[1], attn.num_heads, attn.head_dim)
    return heads.transpose(1, 2) if batch_first else heads.permute(1, 2, 0, 3)


def _heads_of_parts(x: Tensor, count: int, attn: nn.MultiheadAttention, batch_first: bool) -> Sequence[Tensor]:
    """``[..., count * E]`` as `count` views ``[B, H, L, D]``, of which the backward pass makes one tensor at once."""
    if x.dim() == 2:
        x, batch_first = x.unsqueeze(0), True
    parts = x.view(x.shape[0], x.shape[1], count, attn.num_heads, attn.head_dim)
    return parts.permute(2, 0, 3, 1, 4).unbind() if batch_first else parts.permute(2, 1, 3, 0, 4).unbind()


def join_heads(x: Tensor, like: Tensor, batch_first: bool) -> Tensor:
    """``[B, H, L, D]`` to the shape of `like`: ``[B, L, E]``, ``[L, B, E]`` or ``[L, E]``."""
    swapped = x.transpose(1, 2) if batch_first or like.dim() == 2 else x.permute(2, 0, 1, 3)
    return swapped.reshape(like.shape)
