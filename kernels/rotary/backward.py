"""The backward pass: the forward kernel with the negative angle, in one launch too."""

from __future__ import annotations

from torch import Tensor

from .forward import rotate


def rotate_back(
    dquery: Tensor, dkey: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel: the gradients of query and key, each in the memory order of what came in."""
    return rotate(dquery, dkey, cos, sin, position_ids, interleaved, True)
