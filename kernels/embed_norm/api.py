"""The public functions and their documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks
from .op import EMBED_NORM


def embed_norm(
    input_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor | None = None,
    type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = True,
    padding_idx: int | None = None,
    check_ids: bool = False,
) -> Tensor:
    """``dropout(norm(word + type + position embeddings))`` in one pass, as Hugging Face's BertEmbeddings computes it.

    The summed embeddings never reach memory: the backward pass reads the tables again. The gradient of a table's row
    is the sum over the tokens that read it, in the order of the tokens, in float32, stored once: two runs give the
    same bits. LayerNorm is that of Ba et al. (2016), RMSNorm that of Zhang and Sennrich (2019).

    Args:
        input_ids: ``[..., L]``, int64 or int32.
        word_weight: ``[vocabulary, width]``, float32, float16, bfloat16 or float64; width 1 to 16,384 on the kernels.
        position_weight: ``[positions, width]``, learned or constant (`sinusoidal_positions`), or None. All floating
            tensors have dtype and device of `word_weight`; gradients are computed for those that require one.
        type_weight: ``[types, width]`` or None.
        norm_weight: ``[width]`` or None for 1.
        norm_bias: ``[width]`` or None for 0.
        position_ids: the rows of `position_weight`, broadcastable to `input_ids`; None for 0 to L - 1. Packed batches
            (``input_ids [T]``) say theirs.
        token_type_ids: the rows of `type_weight`, likewise; None for row 0.
        norm: ``"layer"`` or ``"rms"``.
        eps: added to the variance (or mean square), at least 0; with 0 a row without variance becomes 0 before weight
            and bias.
        dropout_p: probability in [0, 1] with which an element of the result is dropped.
        training: dropout applies only if True.
        padding_idx: a row of `word_weight` that gets no gradient, as in `torch.nn.Embedding`.
        check_ids: raise for ids out of range on a GPU too, which waits for it. Without it such a token's result is NaN
            there, no memory outside the tables is read, and its gradient goes nowhere. On a CPU they always raise.

    Returns:
        ``[..., L, width]`` in the dtype of the tables (under autocast float32, as torch's layer_norm); differentiable,
        once on the kernels.

    Raises:
        TypeError: ids that are no int64 or int32 tensor, tables that are no floating tensor or of several dtypes, a
            `dropout_p` that is no number.
        ValueError: shapes or devices that do not fit, more tokens in a row than positions, an unknown norm,
            `dropout_p` outside [0, 1], a negative eps, a `padding_idx` out of range.
        IndexError: an id out of range, where that is checked.

    Example:
        >>> import torch, fusenc
        >>> ids, words, positions = torch.tensor([[2, 7, 1], [4, 0, 0]]), torch.randn(10, 16), torch.randn(8, 16)
        >>> fusenc.kernels.embed_norm(ids, words, positions, norm_weight=torch.ones(16), padding_idx=0).shape
        torch.Size([2, 3, 16])
    """
    tables = (
        word_weight, position_weight, type_weight, norm_weight, norm_bias, input_ids, position_ids, token_type_ids,
    )  # fmt: skip
    return EMBED_NORM(tables, (norm, eps, dropout_p, training, padding_idx, check_ids))[0]


def sinusoidal_positions(
    length: int,
    d_model: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The constant position embeddings of Vaswani et al., "Attention is all you need" (2017), section 3.5.

    Args:
        length: how many positions, from 0.
        d_model: the width.
        base: the longest wavelength over 2 pi.
        dtype: of the result, as `embed_norm` takes it; the angles are float64.
        device: of the result.

    Returns:
        ``[length, d_model]``: column 2i is ``sin(position / base**(2i / d_model))``, column 2i + 1 the cosine.

    Raises:
        TypeError: another dtype.
        ValueError: a negative length, a width below 1, a base that is not positive.

    Example:
        >>> import fusenc
        >>> fusenc.kernels.sinusoidal_positions(2, 4)[0]
        tensor([0., 1., 0., 1.])
    """
    if not isinstance(length, int) or length < 0:
        checks.fail_value("length", "an integer that is not negative", length)
    if not isinstance(d_model, int) or d_model < 1:
        checks.fail_value("d_model", "an integer of at least 1", d_model)
    if not isinstance(base, (int, float)) or not base > 0.0:
        checks.fail_value("base", "a positive number", base)
    if dtype not in checks.DTYPES:
        checks.fail_type("dtype", "float32, float64, float16 or bfloat16", dtype)
    columns = torch.arange(0, d_model, 2, dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * base ** (-columns / d_model)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model].to(dtype)
