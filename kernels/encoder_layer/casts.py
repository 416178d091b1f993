"""Weights in the dtype of autocast, cast once for each of its regions, as torch's own operators have them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.backend import autocast_enabled
from .neighbours import stacked


class _Region:
    """The casts of a region. As a hook of a cast that torch keeps until the region ends, it lives as long."""

    def __init__(self) -> None:
        self.casts: dict[Any, tuple[tuple[Any, ...], list[int], Tensor]] = {}

    def __call__(self, *unused: Any) -> None:
        """Nothing: a gradient that never comes."""


_regions: dict[Any, weakref.ReferenceType[_Region]] = {}
"""By device."""
_leaves: dict[Any, Tensor] = {}


def _region(like: Tensor) -> _Region:
    """That of the autocast in force, or where torch keeps no casts a new one."""
    device = like.device
    reference = _regions.get(device)
    region = None if reference is None else reference()
    if region is None:
        region = _Region()
        with torch.inference_mode(False), torch.enable_grad():
            leaf = _leaves.get(device)
            if leaf is None:
                leaf = _leaves[device] = torch.empty(0, 0, device=device, requires_grad=True)
            product = torch.mm(leaf, leaf)  # casts the leaf; of no element, so nothing is launched
        if product.grad_fn is not None:
            product.grad_fn.next_functions[0][0].register_hook(region)  # type: ignore[union-attr]
            _regions[device] = weakref.ref(region)
    return region


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Tensors one below the other in one of another dtype; None for those that are None."""
    first = tensors[0]
    if first is None:
        return None
    if all(t is not None and t.dtype == dtype for t in tensors):
        return stacked(tensors)
    there: Any = tensors
    # In an operator no autocast is in force, and its results must have memory of their own. Changes of inference
    # tensors are not counted.
    if not autocast_enabled(first) or any(t.is_inference() for t in there):
        return stacked(tensors).to(dtype)  # type: ignore[union-attr]
    casts = _region(first).casts
    key = (*map(id, tensors), dtype)
    found = casts.get(key)
    versions = [n for t in there for n in (t._version, t.data_ptr())]
    if found is not None and found[1] == versions and all(a is b for a, b in zip(found[0], tensors, strict=True)):
        return found[2]
    with torch.inference_mode(False), torch.no_grad():  # a later call may keep it for a backward pass
        copy: Tensor = stacked(tensors).to(dtype)  # type: ignore[union-attr]
    casts[key] = (tuple(tensors), versions, copy)
    return copy
