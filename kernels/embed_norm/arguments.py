"""What one embed_norm call is made of, in the one form that every path takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Tables(NamedTuple):
    """The tensors of a call, as kernels take them too; the first five have gradients."""

    word: Tensor
    position: Tensor | None
    types: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    ids: Tensor
    position_ids: Tensor | None
    type_ids: Tensor | None
    seed: Tensor | None = None
    """Key of the dropout, int64 ``[1]``."""


class Options(NamedTuple):
    """The numbers of a call."""

    dropout_p: float
    eps: float
    rms: bool
    """RMSNorm instead of LayerNorm."""
    padding_idx: int
    """-1 for none."""
    wide: bool
    """The result is float32 whatever the tables are, as autocast has it."""
    check_ids: bool
