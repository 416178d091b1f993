"""The public functions: arguments and documentation."""

from __future__ import annotations

from torch import Tensor

from .op import FFN, LINEAR_ACT


def ffn(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *,
    activation: str = "gelu", gated: bool = False, dropout_p: float = 0.0, out_dropout_p: float = 0.0,
    residual: Tensor | None = None, training: bool = True, recompute: bool | str = False, fused: bool | None = None,
) -> Tensor:  # fmt: skip
    """The Transformer's feed-forward block: ``residual + dropout(linear2(dropout(activation(linear1(x)))))``.

    Bias, activation, gating and dropout happen in the first matrix product's epilogue, output dropout and residual
    in the second's, and in the backward pass the activation's derivative in that of the product that needs it, so
    none of them makes a trip of its own through memory (Vaswani et al., "Attention is all you need", section 3.3).
    Where that would slow a product down more than it saves, PyTorch computes the product and one pointwise
    kernel the rest (docs/ffn.md).

    Args:
        x: ``[..., d_model]``, float32, float16, bfloat16 or float64, any strides.
        weight1: ``[d_hidden, d_model]`` as in `nn.Linear`, gated ``[2 * d_hidden, d_model]``; dtype, device of `x`.
        bias1: ``[d_hidden]``, gated ``[2 * d_hidden]``, or None.
        weight2: ``[d_out, d_hidden]``.
        bias2: ``[d_out]`` or None.
        activation: ``"gelu"`` (exact, by erf), ``"gelu_tanh"`` (``F.gelu(approximate="tanh")``), ``"quick_gelu"``
            (``x * sigmoid(1.702 * x)``), ``"relu"``, ``"silu"`` or ``"relu2"`` (squared ReLU: So et al.,
            "Primer", 2021).
        gated: the hidden layer is ``activation(gate) * up``, where gate is the first half of ``linear1(x)`` and up
            the second: GEGLU, SwiGLU, ReGLU (Shazeer, "GLU variants improve Transformer", 2020).
        dropout_p: probability in [0, 1] with which a hidden activation is dropped.
        out_dropout_p: likewise for an element of ``linear2``.
        residual: ``[..., d_out]``, dtype of `x` or float32, added at the end, or None.
        training: dropout applies only if True.
        recompute: what the backward pass computes again instead of keeping. In elements per token kept besides `x`:
            False: pre-activation and activation, ``2 * d_hidden`` (gated ``3 * d_hidden``); ``"activation"``: the
            pre-activation, ``d_hidden`` (gated ``2 * d_hidden``), at the price of one more store; True: nothing, at
            the price of the first product.
        fused: True or False forces the products with or without an epilogue; None chooses.

    Returns:
        ``[..., d_out]`` in the dtype of the residual, else of `x` (under autocast, in its dtype); differentiable, once
        on the kernels.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `x`; a probability that is no
            number.
        ValueError: shapes or devices that do not fit, an odd first dimension of a gated `weight1`, an unknown
            activation, `recompute` or `fused`, a probability outside [0, 1].

    Example:
        >>> import torch, fusenc
        >>> x, w1, w2 = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> fusenc.kernels.ffn(x, w1, torch.zeros(32), w2, torch.zeros(8), residual=x).shape
        torch.Size([2, 5, 8])
        >>> fusenc.kernels.ffn(x, w1, None, w2[:, :16], None, activation="silu", gated=True).shape
        torch.Size([2, 5, 8])
    """
    options = (dropout_p, out_dropout_p, training, activation, gated, recompute, fused)
    return FFN((x, weight1, bias1, weight2, bias2, residual), options)[0]


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu", *, gated: bool = False,
    dropout_p: float = 0.0, training: bool = True, recompute: bool = False, fused: bool | None = None,
) -> Tensor:  # fmt: skip
    """A linear layer with its activation, ``dropout(activation(linear(x)))``: the first half of `ffn`.

    Args:
        x: ``[..., d_in]``, float32, float16, bfloat16 or float64, any strides.
        weight: ``[d_out, d_in]``, dtype and device of `x`; gated ``[2 * d_out, d_in]``, the gate's rows first.
        bias: ``[d_out]``, gated ``[2 * d_out]``, or None.
        activation: as in `ffn`.
        gated: as in `ffn`.
        dropout_p: probability in [0, 1] with which an element of the result is dropped.
        training: dropout applies only if True.
        recompute: True computes the pre-activation again in the backward pass instead of keeping it, ``d_out`` elements
            per token (gated ``2 * d_out``).
        fused: as in `ffn`.

    Returns:
        ``[..., d_out]`` in the dtype of `x` (under autocast, in its dtype); differentiable, once on the kernels.

    Raises:
        TypeError: an argument that is no floating tensor, or of another dtype than `x`; a probability that is no
            number.
        ValueError: shapes or devices that do not fit, an odd first dimension of a gated `weight`, an unknown
            activation, `recompute` or `fused`, `dropout_p` outside [0, 1].

    Example:
        >>> import torch, fusenc
        >>> fusenc.kernels.linear_act(torch.randn(2, 5, 8), torch.randn(32, 8), None, "silu", gated=True).shape
        torch.Size([2, 5, 16])
    """
    return LINEAR_ACT((x, weight, bias), (dropout_p, training, activation, gated, recompute, fused))[0]
