"""The public function: checks, documentation, and which path serves a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..attention.api import checked_starts
from ..common import backend, checks, dropout
from ..ffn.eager import ACTIVATIONS
from . import chain, eager, op
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
    activation: str | Callable[[Tensor], Tensor] = "gelu",
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
    products. Elsewhere it is the same in plain PyTorch; under torch.compile and under autocast the chain itself.

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
        activation: as in `ffn`, or a function of a tensor, around which the parts run one by one.
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
    dropout_ps = (attn_dropout_p, dropout1_p, dropout_p, dropout2_p)
    try:
        width, hidden = src.shape[-1], weights.weight1.shape[0]
        wrong = (
            src.dim() != (3 if cu_seqlens is None else 2) or not isinstance(nhead, int) or width % nhead or width == 0
            or nhead < 1 or src.dtype not in checks.DTYPES
            or not ((isinstance(activation, str) and activation in ACTIVATIONS) or callable(activation))
            or _shapes(weights) != _expected(width, hidden, weights)
        )  # fmt: skip
        for p in dropout_ps:
            wrong = wrong or not 0.0 <= p <= 1.0
    except (AttributeError, TypeError, IndexError, ZeroDivisionError):
        wrong = True
    if wrong:
        _explain(src, weights, nhead, cu_seqlens, dropout_ps, activation)
    masks = Masks(attn_mask, is_causal, cu_seqlens, max_seqlen)
    options = Options(nhead, batch_first, norm_first, activation, eps1, eps2, Dropouts(*dropout_ps))
    if torch.compiler.is_compiling() or not _in_one(src, weights, activation):
        if not backend.autocast_enabled(src):
            for name, t in zip(LayerWeights._fields, weights, strict=True):
                if t is not None and "norm" not in name:  # a norm's may be float32 beside 16 bit
                    checks.same_kind(f"weights.{name}", t, "src", src)
        return chain.encoder_layer(src, weights, masks, options)
    if cu_seqlens is not None:
        cu_seqlens = checked_starts("cu_seqlens", cu_seqlens, src.shape[0], "max_seqlen", max_seqlen, src)
        masks = masks._replace(cu_seqlens=cu_seqlens)
    drops = len(dropout_ps) - dropout_ps.count(0.0)
    # One draw gives the keys that single draws in this order give on a CPU.
    seeds = dropout.new_seed(src, drops) if drops else None
    if not backend.use_triton(src):
        return eager.encoder_layer(src, weights, masks, seeds, options)
    each = options.dropouts.spread(() if seeds is None else seeds.split(1))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (src, attn_mask, *weights)):
        return op.EncoderLayer.apply(src, *weights, *masks, each, options)
    return op.forward(src, weights, masks, each, options, False)[0]


def _in_one(src: Tensor, weights: LayerWeights, activation: str | Callable[[Tensor], Tensor]) -> bool:
    """Whether one call serves; else the chain does, which also says what is wrong with dtypes."""
    if backend.autocast_enabled(src) or not isinstance(activation, str):
        return False
    dtype, device = src.dtype, src.device
    if src.numel() == 0 and backend.would_use_triton(src):
        return False
    for t in weights:  # noqa: SIM110 -- a generator costs more than the loop
        if t is not None and (t.dtype is not dtype or t.device != device):
            return False
    return True


def _shapes(weights: LayerWeights) -> list[tuple[int, ...] | None]:
    return [None if t is None else t.shape for t in weights]


def _expected(width: int, hidden: int, weights: LayerWeights) -> list[tuple[int, ...] | None]:
    """The shape of each parameter that there is."""
    vector = (width,)
    shapes = [
        (3 * width, width), (3 * width,), (width, width), vector, vector, vector,
        (hidden, width), (hidden,), (width, hidden), vector, vector, vector,
    ]  # fmt: skip
    return [None if t is None else shape for t, shape in zip(weights, shapes, strict=True)]


def _explain(
    src: Any, weights: LayerWeights, nhead: Any, cu_seqlens: Any, dropout_ps: tuple[Any, ...], activation: Any
) -> NoReturn:
    if not ((isinstance(activation, str) and activation in ACTIVATIONS) or callable(activation)):
        checks.fail_value("activation", f"a function or one of {', '.join(ACTIVATIONS)}", activation)
    for p in dropout_ps:
        checks.dropout_probability(p)
    checks.floating_tensor("src", src)
    if src.dim() != (3 if cu_seqlens is None else 2):
        expected = "[B, L, E] without cu_seqlens" if cu_seqlens is None else "[T, E] beside cu_seqlens"
        checks.fail_value("src", expected, src)
    width = src.shape[-1]
    if not isinstance(nhead, int) or nhead < 1 or width == 0 or width % nhead:
        checks.fail_value("nhead", f"a number that divides the width, {width}", nhead)
    for name, value, shape in zip(
        LayerWeights._fields, weights, _expected(width, weights.weight1.shape[0], weights), strict=True
    ):
        if value is not None and shape is not None and tuple(value.shape) != shape:
            checks.fail_value(f"weights.{name}", f"shape {list(shape)}", value)
    checks.fail_type("src", "a floating tensor", src)
