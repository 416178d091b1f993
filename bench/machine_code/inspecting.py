"""Figures of kernels for chips that are not there: compiled in parallel, and kept in the user's cache."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import platformdirs
import torch
import triton
from triton.runtime.jit import JITFunction

from . import chips, shipped
from .chips import Chip
from .compiling import Launch, compile_for
from .figures import Figures, read
from .shipped import Unit


def inspect_kernel(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    *,
    arch: str = "sm_90",
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Sequence[str] | None = None,
) -> Figures:
    """Compile any `@triton.jit` kernel for a chip, without a GPU, and read its figures from the machine code.

    Args:
        kernel: the kernel, decorated without TRITON_INTERPRET.
        signature: type of each argument that is no compile-time constant, as Triton writes it: ``"*fp16"``, ``"i32"``.
        constants: values of the ``tl.constexpr`` arguments.
        arch: a key of ``chips.toml``: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx90a, gfx942 or gfx1100.
        num_warps: warps of a block, a power of two.
        num_stages: depth of software pipelining.
        aligned: arguments (pointers, strides, sizes) divisible by 16; every pointer if None.

    Returns:
        The figures; `error` says why if the kernel does not compile.

    Raises:
        ValueError: an unknown arch, or arguments of the kernel that `signature` and `constants` do not cover.

    Example:
        >>> import triton, triton.language as tl  # doctest: +SKIP
        >>> @triton.jit
        ... def copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        ...     offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ...     tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)
        >>> inspect_kernel(copy, {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1024}).registers
    """
    constants = dict(constants or {})
    names = set(kernel.arg_names)
    for what, given in (("signature", signature), ("constants", constants)):
        if not set(given) <= names:
            raise ValueError(f"{what}: expected arguments of {kernel.__name__}, got {sorted(set(given) - names)}")
    if missing := names - set(signature) - set(constants):
        raise ValueError(f"signature: expected every argument of {kernel.__name__}, lacks {sorted(missing)}")
    (chip,) = chips.chosen([arch])
    if aligned is None:
        aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    whole = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    places: dict[Any, Any] = dict(constants)
    launch = Launch(kernel, whole, places, list(aligned), {"num_warps": num_warps, "num_stages": num_stages})
    return figures_of(Unit("", launch), chip)


def figures_of(unit: Unit, chip: Chip) -> Figures:
    """Figures of one unit, from the cache if it has them."""
    file = _cache_file(unit, chip)
    try:
        return _from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    try:
        figures = read(unit.kernel, unit.case, chip, compile_for(unit.launch, chip))
    except Exception as error:  # a row with the reason, whatever the compiler raised
        return Figures(unit.kernel, unit.case, chip.arch, error=_reason(error))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(figures)), encoding="utf-8")
    temporary.replace(file)
    return figures


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:200]


def _from_json(stored: dict[str, Any]) -> Figures:
    stored["loads"], stored["stores"] = ({int(k): v for k, v in stored[name].items()} for name in ("loads", "stores"))
    if set(stored) != {f.name for f in fields(Figures)}:
        raise ValueError("written by another version")
    return Figures(**stored)


def _cache_file(unit: Unit, chip: Chip) -> Path:
    parts = (unit.case, unit.launch.identity, chip, triton.__version__, _reader_version())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    return Path(platformdirs.user_cache_dir("fusenc")) / "inspect" / f"{key}.json"


def _reader_version() -> str:
    """The figures depend on the code that reads them, so a change of it starts a new cache."""
    folder = Path(__file__).parent
    files = ("instructions.py", "figures.py", "compiling.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in files)).hexdigest()


def inspect_shipped(
    kernels: Sequence[str], archs: Sequence[str], advance: Callable[[int, int], None] | None = None,
    first_case: Collection[str] = (),
) -> list[Figures]:  # fmt: skip
    """Figures of the library's own kernels, in the order of the cases, chip by chip.

    Args:
        kernels: names; all if empty.
        archs: names of chips.
        advance: called with how many are done and how many there are.
        first_case: those of the chips for which only the first case of each kernel is looked at.

    Raises:
        ValueError: an unknown kernel or arch.
    """
    work = []
    for chip in chips.chosen(archs):
        units = shipped.chosen(list(kernels), chip.arch)
        if chip.arch in first_case:
            first: dict[str, Unit] = {}
            for unit in units:
                first.setdefault(unit.kernel, unit)
            units = list(first.values())
        work += [(unit, chip) for unit in units]
    missing = [i for i, (unit, chip) in enumerate(work) if not _cache_file(unit, chip).exists()]
    position = {id(unit): i for chip in chips.chosen(archs) for i, unit in enumerate(shipped.units(chip.arch))}
    done: dict[int, Figures] = {}
    if len(missing) > 1:
        # Kernels are not pickled: each process records the same units and is told which one by its position.
        with concurrent.futures.ProcessPoolExecutor(
            max_workers=os.cpu_count(),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare_process,
        ) as pool:
            futures = {pool.submit(_by_position, position[id(work[i][0])], work[i][1]): i for i in missing}
            for count, future in enumerate(concurrent.futures.as_completed(futures), len(work) - len(missing) + 1):
                done[futures[future]] = future.result()
                if advance:
                    advance(count, len(work))
    return [done[i] if i in done else figures_of(unit, chip) for i, (unit, chip) in enumerate(work)]


def _prepare_process() -> None:
    torch.set_num_threads(1)  # the processes share the cores already


def _by_position(position: int, chip: Chip) -> Figures:
    return figures_of(shipped.units(chip.arch)[position], chip)
