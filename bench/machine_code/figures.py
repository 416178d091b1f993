"""What a kernel's machine code says of its speed: resources, occupancy, instruction mix and upper bounds.

docs/inspect.md says what the model counts and what it leaves out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from . import instructions
from .chips import Chip
from .compiling import Compiled
from .instructions import FP32, GLOBAL, INTEGER, LOCAL, MULTIPLY_ADD, SHARED, SPECIAL, TENSOR, Block, Instruction


@dataclass
class Figures:
    """One kernel, as shipped for one case, on one chip."""

    kernel: str
    case: str
    arch: str
    error: str = ""
    """Why it did not compile; all else is empty then."""
    registers: int = 0
    spilled: int = 0
    """Bytes of local memory a thread."""
    loop_spills: int = 0
    """Accesses to local memory inside the hot loop."""
    shared: int = 0
    warps: int = 0
    cannot_launch: str = ""
    occupancy: float = 0.0
    """Resident warps over the most the chip can hold."""
    limited_by: str = ""
    tensor: dict[str, int] = field(default_factory=dict)
    """Tensor-core instructions by name, whole kernel."""
    loop: dict[str, int] = field(default_factory=dict)
    """Instruction mix of the hot loop, or of the whole kernel where there is none (`has_loop`)."""
    has_loop: bool = False
    loads: dict[int, int] = field(default_factory=dict)
    """Global load instructions by bytes a thread."""
    stores: dict[int, int] = field(default_factory=dict)
    bound: str = ""
    """"tensor", "fma" or "memory": which of the following apply."""
    issue_bound: float | None = None
    """Most that tensor cores (or FMA units) can be busy, if every instruction took one issue slot."""
    overlap_bound: float | None = None
    """The same if all pipes of a sub-partition overlap perfectly."""
    no_overlap_bound: float | None = None
    """The same if nothing inside a warp overlaps with its matrix instructions."""
    issue_over_dram: float | None = None
    """Issue and pipe time over DRAM time; above 1 the unit cannot keep its share of the DRAM busy."""
    unknown: list[str] = field(default_factory=list)
    """Opcodes that the tables do not know; counted as `unknown`."""


def read(kernel: str, case: str, chip: Chip, compiled: Compiled) -> Figures:
    """All figures of one compiled kernel."""
    blocks = (instructions.nvidia if chip.vendor == "cuda" else instructions.amd)(compiled.code)
    everything = [i for block in blocks for i in block.instructions]
    hot = _hot_loop(blocks, chip)
    region = everything if hot is None else hot
    figures = Figures(
        kernel, case, chip.arch, registers=compiled.registers, spilled=compiled.spilled, shared=compiled.shared,
        warps=compiled.warps,
        tensor=dict(Counter(i.name for i in everything if i.kind == TENSOR)),
        loop=instructions.counts(region), has_loop=hot is not None,
        loop_spills=sum(i.kind == LOCAL for i in region) if hot is not None else 0,
        loads=_widths(everything, False), stores=_widths(everything, True),
        unknown=sorted({i.name for i in everything if i.kind == instructions.UNKNOWN}),
    )  # fmt: skip
    figures.occupancy, figures.limited_by, figures.cannot_launch = occupancy(compiled, chip)
    _bounds(figures, region, compiled, chip)
    return figures


def _widths(code: list[Instruction], stores: bool) -> dict[int, int]:
    found = Counter(i.width for i in code if i.kind == GLOBAL and i.stores == stores)
    return dict(sorted(found.items(), reverse=True))


def occupancy(compiled: Compiled, chip: Chip) -> tuple[float, str, str]:
    """Resident warps over the most possible, what limits them, and why the kernel cannot launch at all (or "")."""
    if compiled.shared > chip.block_shared:
        return 0.0, "shared memory", f"needs {compiled.shared} bytes of shared memory, a block has {chip.block_shared}"
    a_block = compiled.warps
    used = compiled.shared + chip.reserved_shared
    if chip.vendor == "cuda":
        if compiled.registers * chip.warp * a_block > chip.registers:
            return 0.0, "registers", f"needs {compiled.registers * chip.warp * a_block} registers of {chip.registers}"
        of_a_warp = -(-compiled.registers * chip.warp // chip.register_unit) * chip.register_unit
        # Warps are spread over four register files.
        by_registers = (chip.registers // chip.subpartitions // of_a_warp) * chip.subpartitions // a_block
        most = chip.warps
    else:
        registers = max(chip.register_unit, -(-compiled.registers // chip.register_unit) * chip.register_unit)
        by_registers = min(chip.warps, chip.registers // registers) * chip.subpartitions // a_block
        most = chip.warps * chip.subpartitions
    limits = {
        "registers": by_registers,
        "shared memory": chip.shared // used if used else chip.blocks,
        "warps": most // a_block,
        "blocks": chip.blocks,
    }
    blocks = min(limits.values())
    limited_by = min(limits, key=lambda name: limits[name])
    if blocks == 0:
        return 0.0, limited_by, f"no block fits a unit: {limited_by}"
    return blocks * a_block / most, limited_by, ""


def _hot_loop(blocks: list[Block], chip: Chip) -> list[Instruction] | None:
    """The innermost loop with matrix instructions; without any, that with most FMAs or global accesses.

    Among several with as many (attention visits blocks of keys with and without masks) the shortest.
    """
    found: list[tuple[set[int], list[Instruction], tuple[int, int, int]]] = []
    for body in instructions.loops(blocks):
        code = [i for number in sorted(body) for i in blocks[number].instructions]
        kinds = Counter(i.kind for i in code)
        inner = any(other < body and work[0] for other, _, work in found)
        found.append((body, code, (0 if inner else kinds[TENSOR], _fmas(code), kinds[GLOBAL])))
    found = [entry for entry in found if any(entry[2])]
    if not found:
        return None
    if any(work[0] for _, _, work in found):
        found = [entry for entry in found if entry[2][0]]
    return min(found, key=lambda entry: (*(-n for n in entry[2]), len(entry[1])))[1]


def _fmas(code: list[Instruction]) -> int:
    return sum(i.name.startswith(("FFMA", "v_fma", "v_pk_fma", "v_dual_fma")) for i in code)


def pipes(code: list[Instruction], chip: Chip) -> dict[str, float]:
    """Cycles that one warp's instructions occupy each pipe of a sub-partition; "issue" is the issue slots."""
    busy = dict.fromkeys(("issue", FP32, INTEGER, MULTIPLY_ADD, SPECIAL, SHARED), 0.0)
    for i in code:
        busy["issue"] += 1.0
        if i.kind in chip.cycles:
            busy[i.kind] += chip.cycles[i.kind]
        elif i.kind == SHARED or (i.kind == GLOBAL and i.name.startswith("LDGSTS")):
            # 128 bytes a cycle for the whole unit, which its sub-partitions share.
            busy[SHARED] += (i.width or 4) * chip.warp / 128 * chip.subpartitions
    if chip.vendor == "hip" and chip.warp == 64:
        # A SIMD has its turn every fourth cycle, and then one instruction of each kind may go.
        busy["issue"] = 4.0 * max(Counter(i.kind for i in code).values(), default=0)
    return busy


def _bounds(figures: Figures, region: list[Instruction], compiled: Compiled, chip: Chip) -> None:
    busy = pipes(region, chip)
    matrix = [instructions.multiply_adds(i, chip.warp) for i in region if i.kind == TENSOR]
    if matrix and figures.has_loop:
        figures.bound = "tensor"
        if None in matrix:
            return  # tcgen05: shapes are not in the machine code
        known = [m for m in matrix if m is not None]
        useful = sum(work for work, _ in known) / chip.tensor_fma
        tensor = sum(work / (1.0 if group else chip.warp_level_rate) for work, group in known) / chip.tensor_fma
    else:
        fmas = _fmas(region)
        useful = tensor = fmas * chip.warp / chip.fp32_fma
        dram = _dram_cycles(region, chip)
        if not (compiled.dot and figures.has_loop):
            figures.bound = "memory"
            figures.issue_over_dram = max(busy.values()) / dram if dram else None
            return
        figures.bound = "fma"
        busy[FP32] -= fmas * chip.cycles[FP32]
    others = max(busy[pipe] for pipe in busy)
    figures.issue_bound = useful / max(tensor, busy["issue"])
    figures.overlap_bound = useful / max(tensor, others)
    figures.no_overlap_bound = useful / (tensor + others)


def _dram_cycles(region: list[Instruction], chip: Chip) -> float:
    """Cycles of a sub-partition's share of the DRAM bandwidth that one warp's global accesses take."""
    return sum(i.width for i in region if i.kind == GLOBAL) * chip.warp * chip.subpartitions / chip.unit_bytes_per_cycle
