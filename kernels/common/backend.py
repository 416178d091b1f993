"""Which implementation runs a call: Triton kernels or eager PyTorch. The only place that decides."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from . import compat, plan

BACKENDS = ("auto", "triton", "eager")
KERNEL_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

# Triton reads TRITON_INTERPRET when a kernel is decorated, so a later change could not take effect.
_INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Not on macOS and Windows."""

_forced = "auto"
last: str | None = None
"""What ran the last call."""


@functools.cache
def _warn_no_triton() -> None:
    warnings.warn(
        "fusenc: Triton is not installed, so GPU tensors run on eager PyTorch (same results, slower)",
        RuntimeWarning,
        stacklevel=4,
    )


def autocast_device(x: Tensor) -> str:
    """The type of device whose autocast counts for `x`. (`x.device.type` alone would cost twice as much.)"""
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


def autocast_enabled(x: Tensor) -> bool:
    """True if an autocast for the device of `x` is in force."""
    device_type = autocast_device(x)
    if device_type in ("cpu", "cuda"):
        return torch.is_autocast_enabled(device_type)
    # there are some that know no autocast, such as meta
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def use_triton(x: Tensor) -> bool:
    """True if a call on `x` runs the Triton kernels, False if it runs eager PyTorch.

    Triton serves CUDA and ROCm tensors of float32, float16 and bfloat16, and with
    ``TRITON_INTERPRET=1`` tensors on the CPU too. float64 and every other device are eager.
    """
    global last
    triton = would_use_triton(x)
    last = "eager" if not triton else "interpreter" if _INTERPRET else "triton"
    return triton


def would_use_triton(x: Tensor) -> bool:
    """As `use_triton`, for a question that is no call."""
    if _forced != "eager" and (x.is_cuda or _INTERPRET or _forced == "triton"):
        return _kernels_can_run(x)
    return False


def _kernels_can_run(x: Tensor) -> bool:
    if _forced == "triton":
        if not (x.is_cuda or _INTERPRET):
            raise RuntimeError(
                "backend 'triton' is forced, but it needs a CUDA or ROCm tensor (or TRITON_INTERPRET=1), "
                f"got one on {x.device}"
            )
        if x.dtype not in KERNEL_DTYPES:
            raise TypeError(f"backend 'triton' is forced, but its kernels do not take {x.dtype}")
        _require_supported_triton()
        return True
    if x.dtype not in KERNEL_DTYPES:
        return False
    if not _HAS_TRITON:
        _warn_no_triton()
        return False
    _require_supported_triton()
    return True


def _require_supported_triton() -> None:
    if not torch.compiler.is_compiling():  # an operator asks again when it runs
        compat.require_supported_triton()


def get_backend() -> str:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"eager"``."""
    return _forced


def last_backend() -> str | None:
    """What ran the last call: ``"triton"``, ``"interpreter"`` (Triton's own), ``"eager"``, or None."""
    return last


def set_backend(backend: str) -> None:
    """Force a backend for every later call.

    Args:
        backend: ``"auto"`` (Triton where it can run, else eager), ``"triton"`` or ``"eager"``.

    Raises:
        ValueError: an unknown name.
    """
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    _forced = backend
    plan.change_switches(backend)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for every thread of the process.

    Example:
        >>> import fusenc
        >>> with fusenc.kernels.use_backend("eager"):
        ...     fusenc.kernels.get_backend()
        'eager'
    """
    before = _forced
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)
