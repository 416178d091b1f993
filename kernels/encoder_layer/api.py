"""The public function: checks, documentation, and which path serves a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..attention.api import checked_starts
from ..common import backend, checks
from ..ffn.eager import ACTIVATIONS
from . import eager, op
from .arguments import Dropouts, LayerWeights, Masks, Options


def encoder_layer(
    src: Tensor,
    weights: LayerWeights,
    nhead: int,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    batch_first: bool = True,
    norm_first: bool = False,
    activation: str = "gelu",
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    attn_dropout_p: float = 0.0,
    dropout1_p: float = 0.0,
    dropout_p: float = 0.0,
    dropout2_p: float = 0.0,
) -> Tensor:
    """A Transformer encoder layer, post-norm or pre-norm (Vaswani et al., 2017; Xiong et al., 2020).

    The same as `attention`, `add_norm` and `ffn` one after the other, as `torch.nn.TransformerEncoderLayer` chains
    them. On the kernels it is one call and one autograd function: 7 kernels forward and 12 backward (post-norm, no
    dropout), since gradients of biases and norms are summed on the side and residual gradients are added inside
    products. On eager PyTorch, under torch.compile and under autocast it is the chain itself.

    Args:
        src: ``[B, L, E]``, ``[L, B, E]`` (with `batch_first` False), or packed, ``[T, E]``.
        weights: the parameters, of the dtype and device of `src` (under autocast of any dtype).
        nhead: number of heads; divides E.
        attn_mask: as in `attention` (bool: True takes part; float: added), broadcastable to ``[B, H, L, L]``.
        is_causal: as in `attention`.
        cu_seqlens: first token of each sequence of a packed batch, as in `attention_varlen`.
        max_seqlen: tokens of its longest sequence.
        batch_first: the order of the first two dimensions of `src`.
        norm_first: norms before attention and feed-forward (pre-norm) instead of after each sum.
        activation: as in `ffn`.
        eps1: of the first norm.
        eps2: of the second norm.
        attn_dropout_p: probability with which a softmax weight is dropped.
        dropout1_p: the same of an element of attention's projection.
        dropout_p: of a hidden activation.
        dropout2_p: of an element of the feed-forward's output.

    Returns:
        A tensor of the shape of `src`; differentiable, once on the kernels.

    Raises:
        TypeError: `src` or a weight that is no floating tensor, or weights of another dtype.
        ValueError: shapes that do not fit, and as `attention`, `add_norm` and `ffn`.

    Example:
        >>> import torch, fusenc
        >>> from fusenc.kernels import LayerWeights, encoder_layer
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        >>> attn, norm1, norm2 = layer.self_attn, layer.norm1, layer.norm2
        >>> weights = LayerWeights(
        ...     attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias,
        ...     norm1.weight, norm1.bias, layer.linear1.weight, layer.linear1.bias, layer.linear2.weight,
        ...     layer.linear2.bias, norm2.weight, norm2.bias)
        >>> x = torch.randn(2, 5, 32)
        >>> torch.allclose(encoder_layer(x, weights, 4), layer(x), atol=1e-5)
        True
    """
    compiling = torch.compiler.is_compiling()
    wrong = (
        not isinstance(src, Tensor) or src.dim() not in (2, 3) or not isinstance(nhead, int) or nhead < 1
        or src.shape[-1] % nhead or src.shape[-1] == 0 or (src.dim() == 2) != (cu_seqlens is not None)
        or not (0.0 <= attn_dropout_p <= 1.0 and 0.0 <= dropout1_p <= 1.0)
        or not (0.0 <= dropout_p <= 1.0 and 0.0 <= dropout2_p <= 1.0) or activation not in ACTIVATIONS
        or any(t is not None and t.shape != shape for _, t, shape in _expected(src.shape[-1], weights))
    )  # fmt: skip
    dropout_ps = (attn_dropout_p, dropout1_p, dropout_p, dropout2_p)
    if wrong:
        _explain(src, weights, nhead, cu_seqlens, dropout_ps, activation)
    masks = Masks(attn_mask, is_causal, cu_seqlens, max_seqlen)
    options = Options(nhead, batch_first, norm_first, activation, eps1, eps2, Dropouts(*dropout_ps))
    if compiling or not _in_one(src, weights):
        return eager.encoder_layer(src, weights, masks, options)
    if cu_seqlens is not None:
        cu_seqlens = checked_starts("cu_seqlens", cu_seqlens, src.shape[0], "max_seqlen", max_seqlen, src)
        masks = masks._replace(cu_seqlens=cu_seqlens)
    seeds = op.new_seeds(src, options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (src, attn_mask, *weights)):
        return op.EncoderLayer.apply(src, *weights, *masks, seeds, options)
    return op.forward(src, weights, masks, seeds, options, False)[0]


def _in_one(src: Tensor, weights: LayerWeights) -> bool:
    """Whether one call of the kernels serves; else the chain does, which also says what is wrong with dtypes."""
    if backend.autocast_enabled(src) or src.numel() == 0 or not backend.use_triton(src):
        return False
    dtype, device = src.dtype, src.device
    return all(t is None or (t.dtype is dtype and t.device == device) for t in weights)


def _expected(width: int, w: LayerWeights) -> Iterator[tuple[str, Tensor | None, tuple[int, ...]]]:
    """The name, the value and the shape of each parameter."""
    hidden = w.weight1.shape[0]
    shapes: tuple[tuple[int, ...], ...] = (
        (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,),
        (hidden, width), (hidden,), (width, hidden), (width,), (width,), (width,),
    )  # fmt: skip
    return zip(LayerWeights._fields, w, shapes, strict=True)


def _explain(
    src: Any, weights: LayerWeights, nhead: Any, cu_seqlens: Any, dropout_ps: tuple[Any, ...], activation: Any
) -> NoReturn:
    if activation not in ACTIVATIONS:
        checks.fail_value("activation", f"one of {', '.join(ACTIVATIONS)}", activation)
    for p in dropout_ps:
        checks.dropout_probability(p)
    checks.floating_tensor("src", src)
    if src.dim() != (3 if cu_seqlens is None else 2):
        expected = "[B, L, E] without cu_seqlens" if cu_seqlens is None else "[T, E] beside cu_seqlens"
        checks.fail_value("src", expected, src)
    if not isinstance(nhead, int) or nhead < 1 or src.shape[-1] == 0 or src.shape[-1] % nhead:
        checks.fail_value("nhead", f"a number that divides the width, {src.shape[-1]}", nhead)
    for name, value, shape in _expected(src.shape[-1], weights):
        if value is not None and tuple(value.shape) != shape:
            checks.fail_value(f"weights.{name}", f"shape {list(shape)}", value)
    checks.fail_type("src", "a floating tensor", src)
