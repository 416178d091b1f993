"""The public function and its documentation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention.api import Window
from ..common import checks
from ..common.operator import autocast_dtype
from . import parts
from .arguments import LayerWeights
from .op import ENCODER_LAYER, checked, require_modules
from .parts import NONE, Modules


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
    no_norm1: bool = False,
    norm: str = "layer",
    activation: str | Callable[[Tensor], Tensor] = "gelu",
    gated: bool = False,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    relative_bias: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    attn_dropout_p: float = 0.0,
    dropout1_p: float = 0.0,
    dropout_p: float = 0.0,
    dropout2_p: float = 0.0,
    recompute: bool = False,
    modules: Modules = NONE,
) -> Tensor:
    """A Transformer encoder layer, post-norm or pre-norm (Vaswani et al., 2017; Xiong et al., 2020).

    The same as `attention`, `add_norm` and `ffn` one after the other, as `torch.nn.TransformerEncoderLayer` chains
    them. On the kernels it is one call and one autograd function: 7 kernels forward and 12 backward (post-norm, no
    dropout), since gradients of biases and norms are summed on the side and residual gradients are added inside
    products. So it is under autocast: weights are cast once a region, what goes from part to part is float32, and the
    norms write the copies that products read. Under torch.compile it is one operator. Elsewhere it is those functions
    themselves.

    Args:
        src: ``[B, L, E]``, ``[L, B, E]`` (with `batch_first` False), or packed, ``[T, E]``.
        weights: the parameters, of the dtype and device of `src` (those of norms also float32; under autocast any).
        nhead: number of query heads; divides the columns of ``out_proj_weight``. Those of key and value follow from
            their weights, and divide it.
        attn_mask: as in `attention` (bool: True takes part; float: added), broadcastable to ``[B, H, L, L]``.
        is_causal: as in `attention`.
        cu_seqlens: first token of each sequence of a packed batch, as in `attention_varlen`.
        max_seqlen: tokens of its longest sequence.
        batch_first: the order of the first two dimensions of `src`.
        norm_first: norms before attention and feed-forward (pre-norm) instead of after each sum. With `weights` of post
            norms these normalise what a part gives before it is added too, as in Gemma 2:
            ``x + post_norm1(dropout(attention(norm1(x))))``; around them the parts run one by one.
        no_norm1: of a pre-norm layer, attention takes `src` as it is (the first layer of ModernBERT).
        norm: ``"layer"`` or ``"rms"``, as in `add_norm`.
        activation: as in `ffn`, or a function of a tensor, around which the parts run one by one.
        gated: as in `ffn`: the hidden layer is ``activation(gate) * up``.
        eps1: of attention's norm or norms.
        eps2: of the feed-forward's.
        scale: as in `attention`, above 0.
        window: as in `attention`.
        softcap: as in `attention`.
        relative_bias: as in `attention`, ``[H or 1, 2 R + 1]``; differentiable.
        rotary: cosines and sines with which query and key are rotated, as in `kernels.rotary`; of a packed batch a
            row for each token, ``[T, R / 2]``.
        attn_dropout_p: probability with which a softmax weight is dropped.
        dropout1_p: the same of an element of attention's projection.
        dropout_p: of a hidden activation.
        dropout2_p: of an element of the feed-forward's output.
        recompute: the backward pass computes the activation again instead of keeping it: in units of `src` 12 are kept
            instead of 16, where the hidden layer is 4 times as wide.
        modules: what takes the place of products, by the names of their weights (``"in_proj"``, ``"k_proj"``,
            ``"v_proj"``, ``"out_proj"``, ``"weight1"``, ``"up"``, ``"weight2"``), such as a linear layer with an
            adapter: a function of a tensor. Around it the parts run one by one.

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
    if not isinstance(weights, LayerWeights):
        checks.fail_type("weights", "a LayerWeights", weights)
    cos = sin = None
    if rotary is not None:
        if not isinstance(rotary, tuple) or len(rotary) != 2:
            checks.fail_type("rotary", "a pair (cos, sin) of tensors", rotary)
        cos, sin = rotary
    options = (
        nhead, batch_first, norm_first, norm, activation, gated, eps1, eps2, scale, is_causal, window, softcap,
        no_norm1, recompute, attn_dropout_p, dropout1_p, dropout_p, dropout2_p,
    )  # fmt: skip
    tensors = (src, *weights, attn_mask, relative_bias, _copy_of(src), cos, sin, cu_seqlens)
    if modules:
        require_modules(modules, weights)
        return parts.encoder_layer(*checked(tensors, options, max_seqlen), max_seqlen, modules)
    out, copy = ENCODER_LAYER(tensors, options, (max_seqlen, int(not batch_first)))[:2]
    # An operator's result stands for one that is not there, and nobody counts the changes of inference tensors.
    if copy is not None and not torch.compiler.is_compiling() and not out.is_inference():
        out._fusenc_copy = (copy, out._version)
    return out


def _copy_of(src: Tensor) -> Tensor | None:
    """The copy in autocast's dtype that the layer before left with its output, which nobody has changed since."""
    found = None if torch.compiler.is_compiling() else getattr(src, "_fusenc_copy", None)
    if found is None or found[1] != src._version:
        return None
    copy: Tensor = found[0]
    return copy if autocast_dtype(src) is copy.dtype else None
