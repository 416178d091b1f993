"""Compile the kernels that a call would launch, for any chip, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fusenc.kernels.common import backend, launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "gfx942": 65536}
"""Bytes of shared memory that one program may use (CUDA programming guide; LDS of CDNA 3)."""

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass
class Launch:
    """One recorded launch: the kernel, what its arguments specialise to, and its options."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    options: dict[str, Any]


@dataclass
class Resources:
    """What a compiled kernel needs. Spills are bytes of local memory a thread, stack included."""

    registers: int
    spilled: int
    shared: int


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside, the library takes the GPU path with CPU tensors, and launches are recorded instead of run.

    Outputs are what `torch.empty` left in memory, so only the launches mean anything.
    """
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_recorded(self, args, kwargs))

    def use_triton(x: Tensor) -> bool:
        return x.dtype in backend.KERNEL_DTYPES

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(backend, "use_triton", use_triton),
        mock.patch.object(launch, "compute_units", lambda index: 108),
    ):
        yield launches


def _recorded(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    for name in kernel.arg_names:
        value = values[name]
        if name in constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible.append(name)  # torch aligns its allocations; a view may say otherwise, and compiles anew
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constants, divisible, options)


def compile_ahead(recorded: Launch, arch: str) -> Resources:
    """Compile one recorded launch for `arch` (a key of TARGETS) down to machine code.

    Raises:
        ValueError: an unknown arch.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch: expected one of {', '.join(TARGETS)}, got {arch!r}")
    index = recorded.kernel.arg_names.index
    source = ASTSource(
        recorded.kernel,
        recorded.signature,
        {(index(name),): value for name, value in recorded.constants.items()},
        {(index(name),): [["tt.divisibility", 16]] for name in recorded.divisible},
    )
    compiled = triton.compile(source, target=TARGETS[arch], options=recorded.options)
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        registers, spilled = _nvidia_resources(compiled.asm["cubin"])
    else:
        registers, spilled = _amd_resources(compiled.asm["amdgcn"])
    return Resources(registers, spilled, shared)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    found = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)}
    return found["vgpr_count"], found["private_segment_fixed_size"]
