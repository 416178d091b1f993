"""Choices that `fusenc tune` measured on this machine's GPU, where there are any."""

from __future__ import annotations

import torch


def choice(operation: str, device_index: int | None, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """What was measured to be fastest for an operation, None where nothing was measured."""
    return None
