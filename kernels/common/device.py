"""What a launcher needs to know about the device: its compute units, its precision, which one is current."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

# Triton 3.10 changes the default of this option, so it is said: a multiply and an add may become one instruction.
COMPILE_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


@functools.cache
def compute_units(index: int | None) -> int:
    """Streaming multiprocessors (or AMD compute units) of a device; 4 stands in where there is no GPU."""
    if not torch.cuda.is_available():
        return 4
    return int(torch.cuda.get_device_properties(index or 0).multi_processor_count)


@functools.cache
def architecture(index: int | None) -> str:
    """The chip as Triton names it, ``"sm_90"`` or ``"gfx942"``; nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index or 0).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index or 0)
    return f"sm_{major}{minor}"


_FAMILIES = {
    "sm_80": "ampere",
    "sm_86": "ada", "sm_89": "ada", "sm_120": "ada",
    "sm_90": "hopper", "sm_100": "hopper",
    "gfx90a": "cdna", "gfx942": "cdna",
}  # fmt: skip
"""Chips that share configurations: by their matrix instructions, shared memory and registers."""


def family(index: int | None) -> str:
    """Which of the chips that share configurations a device is; nothing where no chip has its own."""
    return _FAMILIES.get(architecture(index), "")


def has_float8(index: int | None) -> bool:
    """True where the chip multiplies float8 numbers: NVIDIA's from sm_89 on. True where there is no chip to ask."""
    name = architecture(index)
    return not name or (name.startswith("sm_") and int(name.removeprefix("sm_")) >= 89)


def on_device_of(x: Tensor) -> Any:
    """Make the GPU of `x` current for a launch; free where it already is."""
    if torch.cuda.is_available() and x.device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def input_precision(x: Tensor) -> str:
    """How dot products of float32 round: IEEE, or TF32 where torch's own switch allows it and the chip has it."""
    # Not allow_tf32: reading that raises once a program has used the newer switch.
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if has_tf32(x.device.index) else "ieee"


@functools.cache
def has_tf32(index: int | None) -> bool:
    """True where Triton has TF32 dot products: NVIDIA's chips, and of AMD's only CDNA 3."""
    if not torch.version.hip or not torch.cuda.is_available():
        return True
    return str(torch.cuda.get_device_properties(index or 0).gcnArchName).startswith("gfx942")


def power_of_2(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()
