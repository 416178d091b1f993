"""What a chip is and has. No other file of kernels/ and encoder/ asks torch about devices."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from . import compat

# Triton 3.10 changes the default of this option, so it is said: a multiply and an add may become one instruction.
COMPILE_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@functools.cache
def count() -> int:
    """Number of GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def current() -> int:
    """Index of the current GPU."""
    return torch.cuda.current_device()


def on_device(index: int | None) -> Any:
    """A context in which the GPU `index` is current; None for a tensor that is on no GPU."""
    return torch.cuda.device(index) if index is not None and count() > 1 else contextlib.nullcontext()


def on_device_of(x: Tensor) -> Any:
    """A context in which the GPU of `x` is current."""
    return on_device(x.device.index)


@functools.cache
def compute_units(index: int | None) -> int:
    """Streaming multiprocessors (or AMD compute units) of a device; 4 stands in where there is no GPU."""
    if not torch.cuda.is_available():
        return 4
    return int(torch.cuda.get_device_properties(index or 0).multi_processor_count)


@functools.cache
def architecture(index: int | None) -> str:
    """The chip as Triton names it, ``"sm_90"`` or ``"gfx942"``; empty where there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index or 0).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index or 0)
    return f"sm_{major}{minor}"


@functools.cache
def name(index: int | None) -> str | None:
    """The GPU's name as its driver gives it; None where there is no GPU."""
    if not torch.cuda.is_available() or not architecture(index):
        return None
    return str(torch.cuda.get_device_name(index or 0))


_FAMILIES = {
    "sm_80": "ampere",
    "sm_86": "ada", "sm_89": "ada", "sm_120": "ada",
    "sm_90": "hopper", "sm_100": "hopper",
    "gfx90a": "cdna", "gfx942": "cdna",
}  # fmt: skip
"""Chips that share configurations: by their matrix instructions, shared memory and registers."""


def family(index: int | None) -> str:
    """The group of chips with which a device shares configurations; empty where the general ones serve."""
    chip = architecture(index)
    return _FAMILIES[chip] if chip in _FAMILIES else _family_of_relative(chip)


@functools.cache
def _family_of_relative(chip: str) -> str:
    """The family of the nearest older chip of the same kind, for a chip that no table names."""
    prefix, known = chip[:3], [other for other in _FAMILIES if other[:3] == chip[:3]]
    older = [other for other in known if (len(other), other) < (len(chip), chip)]
    if not older or (prefix == "gfx" and not chip.startswith("gfx9")):
        return ""
    relative = max(older, key=lambda other: (len(other), other))
    logging.getLogger("fusenc").warning("no configurations for %s; those of %s are used", chip, relative)
    return _FAMILIES[relative]


def lanes(index: int | None) -> int:
    """Threads of a warp."""
    return 64 if architecture(index).startswith("gfx9") else 32


def input_precision(x: Tensor) -> str:
    """How dot products of float32 round: IEEE, or TF32 where torch's own switch allows it and the chip has it."""
    return "tf32" if x.dtype == torch.float32 and compat.tf32_allowed() and has_tf32(x.device.index) else "ieee"


def has_tf32(index: int | None) -> bool:
    """True where Triton has TF32 dot products: NVIDIA's chips, and of AMD's only CDNA 3."""
    return not architecture(index).startswith("gfx") or architecture(index).startswith("gfx942")


def power_of_2(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def is_capturing() -> bool:
    """True while the current stream records a CUDA graph, in which nothing may be waited for."""
    return _has_gpu() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _has_gpu() -> bool:
    """True where there is a GPU, not a tensor that stands for a GPU's alone (CONTRIBUTING.md)."""
    return torch.backends.cuda.is_built() and torch._C._cuda_getDeviceCount() > 0
