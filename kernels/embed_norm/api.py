"""The public functions: arguments, checks, documentation."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..common import backend, checks, dropout
from . import eager, op
from .eager import Options, Tables

NORMS = ("layer", "rms")
ID_DTYPES = frozenset({torch.int64, torch.int32})


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
    compiling = torch.compiler.is_compiling()
    if dropout_p == 0.0 and padding_idx is None and norm == "layer" and not compiling:
        plain = eager.plain(
            word_weight, position_weight, type_weight, norm_weight, norm_bias, input_ids, position_ids, token_type_ids,
            eps,
        )  # fmt: skip
        if plain is not None:
            return plain
    try:
        dtype, device = word_weight.dtype, word_weight.device
        rows, width = word_weight.shape
        shape = input_ids.shape
        wrong = (
            input_ids.dtype not in ID_DTYPES or input_ids.device != device or len(shape) == 0
            or dtype not in checks.DTYPES or rows == 0 or width == 0
            or (position_weight is not None
                and (position_weight.dtype is not dtype or position_weight.device != device
                     or position_weight.dim() != 2 or position_weight.shape[1] != width
                     or (position_ids is None and position_weight.shape[0] < shape[-1])))
            or (type_weight is not None
                and (type_weight.dtype is not dtype or type_weight.device != device or type_weight.dim() != 2
                     or type_weight.shape[1] != width or type_weight.shape[0] == 0))
            or (norm_weight is not None
                and (norm_weight.shape != (width,) or norm_weight.dtype is not dtype or norm_weight.device != device))
            or (norm_bias is not None
                and (norm_bias.shape != (width,) or norm_bias.dtype is not dtype or norm_bias.device != device))
            or (position_ids is not None
                and (position_weight is None or position_weight.shape[0] == 0
                     or _ids_do_not_fit(position_ids, shape, device)))
            or (token_type_ids is not None
                and (type_weight is None or _ids_do_not_fit(token_type_ids, shape, device)))
            or norm not in NORMS or not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0
            or not isinstance(eps, (int, float)) or not eps >= 0.0
            or (padding_idx is not None and not (isinstance(padding_idx, int) and -rows <= padding_idx < rows))
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError, IndexError):
        wrong = True
    if wrong:
        _explain(
            input_ids, word_weight, position_weight, type_weight, norm_weight, norm_bias, position_ids,
            token_type_ids, norm, eps, dropout_p, padding_idx,
        )  # fmt: skip
    tables = Tables(
        word_weight, position_weight, type_weight, norm_weight, norm_bias, input_ids, position_ids, token_type_ids,
        dropout.new_seed(word_weight) if training and dropout_p > 0.0 else None,
    )  # fmt: skip
    padding = -1 if padding_idx is None else padding_idx % rows
    wide = dtype is not torch.float64 and backend.autocast_enabled(word_weight)
    options = Options(dropout_p, eps, norm == "rms", padding, wide, check_ids)

    if compiling:
        return op.embed_norm_operator(*tables, *options, _needs_gradients(tables))[0]
    if not backend.use_triton(word_weight):
        if check_ids and not input_ids.is_cpu:
            eager.require_ids_in_range(tables)
        return eager.embed_norm(tables, options)
    if _needs_gradients(tables):
        return op.EmbedNorm.apply(*tables, *options)
    return op.forward(tables, options, False)[0]


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


def _needs_gradients(tables: Tables) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tables[: op.DIFFERENTIABLE])


def _ids_do_not_fit(ids: Tensor, shape: torch.Size, device: torch.device) -> bool:
    return (
        ids.dtype not in ID_DTYPES or ids.device != device or ids.dim() > len(shape)
        or any(n != m and n != 1 for n, m in zip(reversed(ids.shape), reversed(shape), strict=False))
    )  # fmt: skip


def _explain(
    input_ids: Any, word: Any, position: Any, type_: Any, norm_weight: Any, norm_bias: Any, position_ids: Any,
    token_type_ids: Any, norm: Any, eps: Any, dropout_p: Any, padding_idx: Any,
) -> NoReturn:  # fmt: skip
    checks.dropout_probability(dropout_p)
    if norm not in NORMS:
        checks.fail_value("norm", f"one of {', '.join(NORMS)}", norm)
    if not isinstance(eps, (int, float)) or not eps >= 0.0:
        checks.fail_value("eps", "a number that is not negative", eps)
    checks.floating_tensor("word_weight", word)
    if word.dim() != 2 or 0 in word.shape:
        checks.fail_value("word_weight", "shape [vocabulary, width], neither of them 0", word)
    rows, width = word.shape
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is None and name != "input_ids":
            continue
        if not isinstance(ids, Tensor) or ids.dtype not in ID_DTYPES:
            checks.fail_type(name, "an int64 or int32 tensor", ids)
        if ids.device != word.device:
            checks.fail_value(name, f"device {word.device}, that of word_weight", ids)
    if input_ids.dim() == 0:
        checks.fail_value("input_ids", "at least one dimension", input_ids)
    for name, table in (("position_weight", position), ("type_weight", type_)):
        if table is None:
            continue
        checks.same_kind(name, table, "word_weight", word)
        if table.dim() != 2 or table.shape[1] != width:
            checks.fail_value(name, f"shape [rows, {width}], the width of word_weight", table)
    if position is not None and position_ids is None and position.shape[0] < input_ids.shape[-1]:
        checks.fail_value("position_weight", f"at least {input_ids.shape[-1]} rows, one a position", position)
    for name, table in (("position_weight", position), ("type_weight", type_)):
        if table is not None and table.shape[0] == 0 and (name == "type_weight" or position_ids is not None):
            checks.fail_value(name, "at least one row", table)
    for name, ids, table_name, table in (
        ("position_ids", position_ids, "position_weight", position),
        ("token_type_ids", token_type_ids, "type_weight", type_),
    ):
        if ids is not None and table is None:
            checks.fail_value(name, f"None, since there is no {table_name}", ids)
        if ids is not None and _ids_do_not_fit(ids, input_ids.shape, word.device):
            checks.fail_value(name, f"a shape that broadcasts to {list(input_ids.shape)}, that of input_ids", ids)
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            checks.same_kind(name, value, "word_weight", word)
            if value.shape != word.shape[1:]:
                checks.fail_value(name, f"shape [{width}], the width of word_weight", value)
    if padding_idx is not None and (not isinstance(padding_idx, int) or not -rows <= padding_idx < rows):
        checks.fail_value("padding_idx", f"an integer from {-rows} to {rows - 1}", padding_idx)
    checks.fail_type("word_weight", "a floating tensor", word)
