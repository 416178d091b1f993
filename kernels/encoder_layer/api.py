"""The public function and its documentation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .arguments import LayerWeights
from .op import ENCODER_LAYER


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
    options = (
        nhead, batch_first, norm_first, activation, eps1, eps2, is_causal, attn_dropout_p, dropout1_p, dropout_p,
        dropout2_p,
    )  # fmt: skip
    return ENCODER_LAYER((src, *weights, attn_mask, cu_seqlens), options, (max_seqlen, int(not batch_first)))[0]
