"""Record the kernels that a call would launch, and compile them for any chip, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fusenc.kernels.common import backend, plan
from fusenc.kernels.common import device as gpu
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .chips import Chip

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


Place = str | tuple[str, int]
"""An argument, or an element of one that is a tuple."""


@dataclass
class Launch:
    """One recorded launch: the kernel, what its arguments specialise to, and its options."""

    kernel: JITFunction
    signature: dict[str, Any]
    """Triton's name of each argument's type; of a tuple a tuple of them."""
    constants: Mapping[Place, Any]
    divisible: Sequence[Place]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def identity(self) -> str:
        """What the machine code depends on besides the chip and the compiler: source, signature, constants, options."""
        parts = (self.name, self.kernel.cache_key, self.signature, self.constants, self.divisible, self.options)
        return repr(parts)


@contextlib.contextmanager
def record_launches(arch: str = "") -> Iterator[list[Launch]]:
    """Inside, the library takes the GPU path with tensors of any device, and launches are recorded instead of run.

    They have the configurations of `arch`, a key of ``chips.toml``, or those for chips without their own.

    Outputs are what `torch.empty` left in memory, so only the launches mean anything.
    """
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_recorded(self, args, kwargs))

    def would_use_triton(x: Tensor) -> bool:
        return x.dtype in backend.KERNEL_DTYPES

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(backend, "would_use_triton", would_use_triton),
        mock.patch.object(gpu, "compute_units", lambda index: 108),
        mock.patch.object(gpu, "architecture", lambda index: arch),
    ):
        plan.forget()
        yield launches
    plan.forget()


def _recorded(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    general = {p.name for p in kernel.params if p.do_not_specialize}
    signature: dict[str, Any] = {}
    constants: dict[Place, Any] = {}
    divisible: list[Place] = []

    def specialise(place: Place, value: Any, specialised: bool) -> str:
        if value is None or (isinstance(value, int) and value == 1 and specialised):
            constants[place] = value
            return "constexpr"
        if isinstance(value, Tensor):
            divisible.append(place)  # torch aligns its allocations; a view may say otherwise, and compiles anew
            return "*" + _TYPES[value.dtype]
        if isinstance(value, int):
            if value % 16 == 0 and specialised:
                divisible.append(place)
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    for name in kernel.arg_names:
        value = values[name]
        if name in constexprs:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, tuple):
            parts = [specialise((name, i), part, name not in general) for i, part in enumerate(value)]
            signature[name] = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        else:
            signature[name] = specialise(name, value, name not in general)
    return Launch(kernel, signature, constants, divisible, options)


@dataclass
class Compiled:
    """What the compiler made of a kernel: its machine code and what it says of its resources."""

    code: str
    """SASS (NVIDIA) or the compiler's assembly (AMD)."""
    registers: int
    """32-bit registers of a thread."""
    spilled: int
    """Bytes of local memory a thread, stack included."""
    shared: int
    """Bytes of shared memory a block, static and dynamic."""
    warps: int
    dot: bool
    """Whether the kernel has dot products (``tl.dot``)."""


def compile_for(recorded: Launch, chip: Chip) -> Compiled:
    """Compile one recorded launch for a chip, down to machine code; no GPU is needed.

    Raises:
        Exception: whatever Triton or the assembler raises for a kernel that does not compile.
    """

    def path(place: Place) -> tuple[int, ...]:
        name, *rest = (place,) if isinstance(place, str) else place
        return (recorded.kernel.arg_names.index(name), *rest)

    source = ASTSource(
        recorded.kernel,
        recorded.signature,
        {path(place): value for place, value in recorded.constants.items()},
        {path(place): [["tt.divisibility", 16]] for place in recorded.divisible},
    )
    compiled = triton.compile(source, target=chip.gpu_target, options=recorded.options)
    warps = int(compiled.metadata.num_warps)
    dot = "tt.dot" in compiled.asm["ttir"]
    if "cubin" in compiled.asm:
        usage, code = _dump(compiled.asm["cubin"])
        # With descriptors or tcgen05 more than one line speaks of the kernel; the largest is its own.
        found = {key: max(int(v) for k, v in usage if k == key) for key in {k for k, _ in usage}}
        shared = max(int(compiled.metadata.shared), found.get("SHARED", 0))
        return Compiled(code, found["REG"], found["STACK"] + found["LOCAL"], shared, warps, dot)
    code = compiled.asm["amdgcn"]
    stated = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", code)}
    return Compiled(
        code, stated["vgpr_count"], stated["private_segment_fixed_size"], int(compiled.metadata.shared), warps, dot
    )


def _dump(cubin: bytes) -> tuple[list[tuple[str, str]], str]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "--dump-sass", file]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text), text
