"""What a call keeps in memory for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes of all storages that hold a tensor which autograd saves during a call, those of parameters left out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t if t._base is None else t._base, nn.Parameter):
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage  # kept alive, so that no address occurs twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(storage.nbytes() for storage in storages.values())
