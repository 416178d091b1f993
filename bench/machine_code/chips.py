"""The chips of ``chips.toml``."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Chip:
    """One chip; ``chips.toml`` says what each field means and where it is published."""

    arch: str
    short: str
    name: str
    reported: str
    vendor: str
    target: int | str
    warp: int
    units: int
    subpartitions: int
    clock_ghz: float
    dram_tb_s: float
    tensor_fma: int
    fp32_fma: int
    tensor_tflops: float
    fp32_tflops: float
    registers: int
    register_unit: int
    warps: int
    blocks: int
    shared: int
    block_shared: int
    reserved_shared: int
    cycles: dict[str, int]
    source: str
    warp_level_rate: float = 1.0

    @property
    def gpu_target(self) -> GPUTarget:
        """What Triton compiles for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.vendor, self.target, self.warp)

    @property
    def unit_bytes_per_cycle(self) -> float:
        """DRAM bytes that one unit can have per clock when all units share the bandwidth."""
        return self.dram_tb_s * 1e3 / (self.clock_ghz * self.units)


@functools.cache
def chips() -> dict[str, Chip]:
    """All chips by architecture, in the table's order."""
    table = tomllib.loads(resources.files(__package__).joinpath("chips.toml").read_text(encoding="utf-8"))
    return {arch: Chip(arch=arch, **fields) for arch, fields in table.items()}


def chosen(archs: Sequence[str]) -> list[Chip]:
    """The named chips.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    for arch in archs:
        if arch not in chips():
            raise ValueError(f"unknown arch {arch!r}, expected one of {', '.join(chips())}")
    return [chips()[arch] for arch in archs]


def reported(name: str) -> Chip | None:
    """The chip that torch or its driver calls by this name; None for one that the table does not hold."""
    return next((chip for chip in chips().values() if chip.reported in name), None)
