"""Parameters that lie one behind the other in memory, so that one product does for them.

Each keeps a storage of its own, as far as torch knows: what looks at storages (saving, sharing, counting memory) finds
nothing new. That they lie together is known here, by identity, and looked at anew in each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

_wholes: dict[int, tuple[tuple[Any, ...], Tensor]] = {}
"""By the first one's id: weak references to all, and one tensor of their memory."""


def lay_together(tensors: Sequence[Any]) -> None:
    """Move the data of leaf tensors so that they lie one behind the other; the tensors stay the same objects.

    Left as they are: what is no plain tensor, of several dtypes or devices, not contiguous, or shares its memory.
    """
    if find(tensors)[0]:
        return
    let_go(tensors)
    if torch.is_inference_mode_enabled() or not all(_may_move(t, tensors[0]) for t in tensors):
        return
    first = tensors[0]
    with torch.no_grad():
        whole = torch.cat([t.detach() for t in tensors])
        for t, part in zip(tensors, whole.split([t.shape[0] for t in tensors]), strict=True):
            t.data = from_dlpack(to_dlpack(part))  # a tensor whose storage is this part of the memory, and keeps it
    key = id(first)
    references = (weakref.ref(first, lambda _: _wholes.pop(key, None)), *(weakref.ref(t) for t in tensors[1:]))
    _wholes[key] = references, whole


def let_go(tensors: Sequence[Any]) -> None:
    """Forget that tensors lie together, and what memory they had when they did."""
    _wholes.pop(id(tensors[0]), None)


def _may_move(t: Any, first: Any) -> bool:
    if type(t) not in (Tensor, nn.Parameter) or type(t.data) is not Tensor or t.dtype != first.dtype:
        return False
    if not (t.is_cpu or t.is_cuda) or t.device != first.device or not t.is_contiguous() or t.is_inference():
        return False
    if not t.is_leaf or t.numel() == 0 or t.shape[1:] != first.shape[1:]:
        return False
    storage = t.untyped_storage()
    whole = storage.nbytes() == t.numel() * t.element_size()
    # Two: the tensor's own, and `storage`. Whoever holds another would go on with the old memory.
    return whole and torch._C._storage_Use_Count(storage._cdata) == 2 and not (t.is_cpu and t.is_shared())


def find(tensors: Sequence[Tensor | None]) -> tuple[bool, Tensor | None]:
    """Whether tensors lie together, and if so as one; so do none."""
    first = tensors[0]
    if first is None:
        return not any(t is not None for t in tensors), None
    if len(tensors) == 1:
        return True, first
    found = _wholes.get(id(first))
    if found is None:
        return False, None
    references, whole = found
    at, last, size = whole.data_ptr(), whole.dtype, whole.element_size()
    if len(references) != len(tensors):
        return False, None
    for t, reference in zip(tensors, references, strict=True):
        if reference() is not t or t is None or t.dtype is not last or t.data_ptr() != at:
            return False, None
        at += t.numel() * size
    return (True, whole) if at == whole.data_ptr() + whole.numel() * size else (False, None)


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Tensors one below the other: as they lie, else a copy. For where nothing is differentiated."""
    first = tensors[0]
    if first is None or len(tensors) == 1 or tensors[1] is None:
        return first
    together, whole = find(tensors)
    return whole if together else torch.cat(tensors)  # type: ignore[arg-type]


def without_derivatives() -> bool:
    """True if nothing is differentiated, traced or vectorised."""
    return not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )  # fmt: skip
