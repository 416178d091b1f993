"""Instructions read from machine code: what each one is, where the loops are, how wide global accesses are.

NVIDIA's comes from ``cuobjdump --dump-sass``, AMD's from the compiler's assembly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

TENSOR, FP32, INTEGER, MULTIPLY_ADD, SPECIAL = "tensor", "fp32", "integer", "multiply_add", "special"
SHARED, GLOBAL, LOCAL, CONTROL, UNKNOWN = "shared", "global", "local", "control", "unknown"
KINDS = (TENSOR, FP32, INTEGER, MULTIPLY_ADD, SPECIAL, SHARED, GLOBAL, LOCAL, CONTROL, UNKNOWN)

# NVIDIA's opcodes, up to the first dot. Sources: CUDA binary utilities, "Instruction set reference", and what ptxas
# emits for this library's kernels.
_NVIDIA = {
    TENSOR: "HMMA IMMA DMMA QMMA OMMA BMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    FP32: "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I FSWZADD FHADD FHMUL FHFMA "
    "HADD2 HMUL2 HFMA2 HADD2_32I HMUL2_32I HFMA2_32I DADD DMUL DFMA",
    INTEGER: "IADD IADD3 IADD32I ISETP ISET LOP LOP3 LOP32I PLOP3 SHF SHL SHR LEA SEL FSEL FSET FSETP DSETP HSET2 "
    "HSETP2 FMNMX FMNMX3 HMNMX2 IMNMX IMNMX3 VIMNMX VIMNMX3 VHMNMX IABS INEG PRMT SGXT BMSK MOV MOV32I CS2R "
    "VIADD VIADDMNMX F2FP I2FP F2IP I2IP P2R R2P VOTE VOTEU VABSDIFF VABSDIFF4 ISCADD "
    "UNPACK LEPC ICMP PSETP CSET CSETP",
    MULTIPLY_ADD: "IMAD IMUL IMUL32I XMAD IDP IDP4A IMADSP",
    SPECIAL: "MUFU I2F F2I F2F I2I FRND POPC FLO BREV FCHK",
    SHARED: "LDS STS LDSM STSM ATOMS SHFL REDUX MATCH MOVM SYNCS LDTM STTM UTCCP CREDUX",
    GLOBAL: "LDG STG LD ST LDGSTS RED REDG ATOM ATOMG UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED",
    LOCAL: "LDL STL",
    CONTROL: "BRA BRX BRXU JMP JMX CALL RET EXIT BREAK BSSY BSYNC BMOV KILL NOP BAR DEPBAR LDGDEPBAR WARPSYNC "
    "WARPGROUP WARPGROUPSET YIELD MEMBAR FENCE ERRBAR CCTL CCTLL CCTLT NANOSLEEP BPT S2R S2UR R2UR B2R R2B LDC "
    "LDCU ULDC ELECT UMOV UIADD3 UIADD ULOP3 ULOP USHF ULEA UIMAD UISETP USEL USGXT UPRMT UFLO UPOPC UBREV "
    "UBMSK UP2UR UR2UP UPLOP3 UVOTE UF2FP UIMNMX UVIMNMX UVIRTCOUNT UCLEA UFADD UFMUL UFFMA UFSETP UFSEL UFMNMX "
    "UI2F UF2I UI2FP UF2F UMUFU "
    "UTCBAR UTCATOMSWS UTCSHIFT UTMACCTL UTMACMDFLUSH UTMAPF UGETNEXTWORKID USETMAXREG UCGABAR_ARV UCGABAR_WAIT "
    "PREEXIT ACQBULK ARRIVES CGAERRBAR GETLMEMBASE SETLMEMBASE PMTRIG VOTE_VTG USETSHMSZ ENDCOLLECTIVE",
}
_NVIDIA_KIND = {opcode: kind for kind, opcodes in _NVIDIA.items() for opcode in opcodes.split()}

# AMD's, by the beginning of the mnemonic; the first match counts. Sources: the CDNA and RDNA instruction set guides.
_AMD = (
    (TENSOR, r"v_(mfma|smfmac|wmma|swmmac)_"),
    (SPECIAL, r"v_(exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_(f16|f32|f64|bf16)"),
    (FP32, r"v_(dual_)?(pk_)?(fma|fmac|fmaak|fmamk|add|sub|subrev|mul|mac|mad|dot2|dot2c)"
           r"(_mix|_mixlo|_mixhi|_legacy|_dx9_zero|_f32)?_(f16|f32|f64|bf16)"),
    (FP32, r"v_(ldexp|div_scale|div_fmas|div_fixup|trunc|floor|ceil|rndne|fract|frexp_mant|frexp_exp)_"),
    (MULTIPLY_ADD, r"v_(mul|mad)_(lo|hi|u32|i32|u64|i64|u16)"),
    (INTEGER, r"v_"),
    (SHARED, r"ds_"),
    (LOCAL, r"scratch_"),
    (GLOBAL, r"(global|buffer|flat)_(load|store|atomic)"),
    (CONTROL, r"s_|buffer_(gl|inv|wb)|global_(wb|inv)"),
)  # fmt: skip
_AMD_KIND = tuple((kind, re.compile(pattern)) for kind, pattern in _AMD)

_SASS_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)([\w.]*)\s*(.*?)\s*;")
_ADDRESS = re.compile(r"0x([0-9a-f]+)\b")
_GCN_LINE = re.compile(r"\s+([a-z][a-z0-9_]*)\b\s*([^;]*)")
_NVIDIA_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "ENL2": 32}
_AMD_WIDTH = (("dwordx4|b128", 16), ("dwordx3|b96", 12), ("dwordx2|b64", 8), ("dword|b32", 4),
              ("short|16", 2), ("byte|8", 1))  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    name: str
    """The opcode with its modifiers."""
    kind: str
    operands: str = ""
    width: int = 0
    """Bytes a thread moves, for accesses to memory."""
    stores: bool = False


@dataclass
class Block:
    """A basic block."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


def loops(blocks: list[Block]) -> list[set[int]]:
    """The natural loops of a control flow graph, as sets of blocks, innermost first (Aho et al., "Compilers", 9.6)."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(blocks)))
    graph.add_edges_from((i, s) for i, block in enumerate(blocks) for s in block.successors)
    parent = networkx.immediate_dominators(graph, 0)

    def dominates(a: int, b: int) -> bool:
        while b != a and parent.get(b, b) not in (None, b):
            b = parent[b]
        return a == b

    reachable = set(networkx.descendants(graph, 0)) | {0}
    bodies: dict[int, set[int]] = {}
    for tail, head in graph.edges:
        if tail in reachable and dominates(head, tail):
            body = bodies.setdefault(head, {head})
            stack = [tail]
            while stack:
                node = stack.pop()
                if node not in body:
                    body.add(node)
                    stack.extend(graph.predecessors(node))
    return sorted((body & reachable for body in bodies.values()), key=len)


def nvidia(sass: str) -> list[Block]:
    """The control flow graph of one kernel's SASS."""
    lines: list[tuple[int, str | None, Instruction]] = []
    for line in sass.splitlines():
        match = _SASS_LINE.match(line)
        if match is None:
            continue
        address, predicate, opcode, modifiers, operands = match.groups()
        kind = _NVIDIA_KIND.get(opcode, UNKNOWN)
        stores = opcode in ("STG", "ST", "STL", "RED", "REDG", "UTMASTG", "STS")
        width = _nvidia_width(opcode, modifiers) if kind in (GLOBAL, LOCAL, SHARED) else 0
        lines.append((int(address, 16), predicate, Instruction(opcode + modifiers, kind, operands, width, stores)))
    index = {address: i for i, (address, _, _) in enumerate(lines)}
    targets: dict[int, int] = {}
    for i, (_, _, instruction) in enumerate(lines):
        if instruction.name.split(".")[0] in ("BRA", "JMP", "CALL"):
            found = _ADDRESS.findall(instruction.operands)
            if found and int(found[-1], 16) in index:
                targets[i] = index[int(found[-1], 16)]

    def ends(i: int) -> bool:
        return lines[i][2].name.split(".")[0] in ("BRA", "JMP", "CALL", "EXIT", "RET", "BRX", "BRXU", "JMX")

    def falls_through(i: int) -> bool:
        name = lines[i][2].name.split(".")[0]
        return name == "CALL" or not ends(i) or lines[i][1] is not None or _conditional_operand(lines[i][2])

    return _graph([entry[2] for entry in lines], targets, ends, falls_through)


def _conditional_operand(instruction: Instruction) -> bool:
    """Branches of newer chips may carry their condition as an operand: ``BRA.U UP0, 0x120``."""
    return re.match(r"!?U?P\d", instruction.operands) is not None


def _nvidia_width(opcode: str, modifiers: str) -> int:
    parts = modifiers.split(".")
    if opcode in ("LDSM", "STSM"):  # 8x8 matrices of 16 bit: 4 bytes a thread each
        return 4 * int(next((p for p in parts if p in ("2", "4")), "1"))
    if opcode in ("LDTM", "STTM"):
        return 4 * int(next((p[1:] for p in parts if p[:1] == "x" and p[1:].isdigit()), "1"))
    return next((_NVIDIA_WIDTH[p] for p in parts if p in _NVIDIA_WIDTH), 4)


def amd(assembly: str) -> list[Block]:
    """The control flow graph of one kernel's GCN assembly."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label = re.match(r"(\.L\w+|\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        match = _GCN_LINE.match(line)
        if match is None:  # a directive, a comment, an empty line
            continue
        name, operands = match[1], match[2].strip()
        kind = next((kind for kind, pattern in _AMD_KIND if pattern.match(name)), UNKNOWN)
        width = next((size for pattern, size in _AMD_WIDTH if re.search(rf"_[a-z]*({pattern})(_|$)", name)), 4)
        stores = "_store" in name or "_write" in name
        moved = width if kind in (GLOBAL, LOCAL, SHARED) else 0
        instructions.append(Instruction(name, kind, operands, moved, stores))
    targets = {}
    for i, instruction in enumerate(instructions):
        target = labels.get(instruction.operands, len(instructions))
        if instruction.name.startswith(("s_branch", "s_cbranch")) and target < len(instructions):
            targets[i] = target

    def ends(i: int) -> bool:
        return instructions[i].name.startswith(("s_branch", "s_cbranch", "s_endpgm", "s_setpc"))

    def falls_through(i: int) -> bool:
        return not ends(i) or instructions[i].name.startswith("s_cbranch")

    return _graph(instructions, targets, ends, falls_through)


def _graph(
    instructions: list[Instruction],
    targets: dict[int, int],
    ends: Callable[[int], bool],
    falls_through: Callable[[int], bool],
) -> list[Block]:
    after = (i + 1 for i in range(len(instructions)) if ends(i))
    leaders = [i for i in sorted({0, *targets.values(), *after}) if i < len(instructions)]
    number = {start: k for k, start in enumerate(leaders)}
    blocks = []
    for k, start in enumerate(leaders):
        end = leaders[k + 1] if k + 1 < len(leaders) else len(instructions)
        last = end - 1
        block = Block(instructions[start:end])
        if last in targets:
            block.successors.append(number[targets[last]])
        if falls_through(last) and end < len(instructions):
            block.successors.append(number[end])
        blocks.append(block)
    return blocks


def counts(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many of each kind; kinds that do not occur are left out."""
    found = dict.fromkeys(KINDS, 0)
    for instruction in instructions:
        found[instruction.kind] += 1
    return {kind: n for kind, n in found.items() if n}


_NVIDIA_SHAPE = {"HMMA": {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4},
                 "IMMA": {"16832": 16 * 8 * 32, "16816": 16 * 8 * 16, "8816": 8 * 8 * 16},
                 "QMMA": {"16832": 16 * 8 * 32, "16816": 16 * 8 * 16},
                 "DMMA": {"884": 8 * 8 * 4, "16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}}  # fmt: skip


def multiply_adds(instruction: Instruction, warp: int) -> tuple[float, bool] | None:
    """Multiply-adds of one warp's part of a matrix instruction, weighted by their time against float16's, and
    whether a whole warp group issues it; None where the machine code does not say the shape (tcgen05).
    """
    opcode, *modifiers = instruction.name.split(".")
    if opcode.startswith("v_"):  # AMD: v_mfma_f32_32x32x8_f16
        shape = re.search(r"(\d+)x(\d+)x(\d+)", instruction.name)
        if shape is None:
            return None
        work = float(int(shape[1]) * int(shape[2]) * int(shape[3]))
        slower = 4.0 if re.search(r"x\d+_?(f32|xf32)$", instruction.name) else 1.0
        return work * slower, False
    if opcode.endswith("GMMA"):  # four warps share it
        stated = next((m for m in modifiers if re.fullmatch(r"\d+x\d+x\d+", m)), None)
        if stated is None:
            return None
        m, n, k = (int(size) for size in stated.split("x"))
        return m * n * k / 4 * _rate(opcode, modifiers), True
    for modifier in modifiers:
        if modifier in _NVIDIA_SHAPE.get(opcode, {}):
            return _NVIDIA_SHAPE[opcode][modifier] * _rate(opcode, modifiers), False
    return None


def _rate(opcode: str, modifiers: list[str]) -> float:
    """Time of a multiply-add against float16's: TF32 is half as fast, 8-bit twice as fast."""
    if "TF32" in modifiers:
        return 2.0
    return 0.5 if opcode in ("IMMA", "QMMA", "IGMMA", "QGMMA") else 1.0
