"""`fusenc env`: everything that a bug report or a result file needs to say about the machine and its software."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import fusenc
import torch
from fusenc.kernels.common import device as gpu
from fusenc.kernels.common import tuned

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "tokenizers", "sentence-transformers", "peft", "ttsem", "flash-attn",
    "xformers", "liger-kernel",
)  # fmt: skip
"""Whose versions decide what runs."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "FUSENC_TUNED", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_INTERPRET",
)  # fmt: skip
"""Environment variables that change what runs or how fast."""

Section = dict[str, str]


def collect() -> dict[str, Section]:
    """The sections of the report, each a mapping from a name to a text."""
    return {
        "fusenc": _fusenc(), "machine": _machine(), "packages": _packages(), "torch": _torch(), "gpus": _gpus(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }  # fmt: skip


def summary() -> Section:
    """The few facts that a table of times has to carry."""
    chip = gpu.name(0)
    return {
        "fusenc": fusenc.__version__, "commit": commit() or "none", "torch": torch.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "processor": _processor(),
        "gpu": chip or "none", "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def commit() -> str | None:
    """The commit of the checkout that this file belongs to, with "+" after it where files differ; None elsewhere."""
    here = Path(__file__).resolve().parent
    try:
        asked = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        # An installed copy may lie inside somebody else's checkout.
        subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
                       capture_output=True, timeout=10, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer or None


def text(sections: dict[str, Section]) -> str:
    """The report to paste into an issue."""
    lines = []
    for title, section in sections.items():
        lines.append(f"{title}:" if section else f"{title}: none")
        lines += [f"  {name}: {value}" for name, value in section.items()]
    return "\n".join(lines)


def _fusenc() -> Section:
    return {
        "version": fusenc.__version__, "commit": commit() or "none", "folder": str(Path(fusenc.__file__).parent),
        "backend": fusenc.kernels.get_backend(), "tables": _tables(),
    }  # fmt: skip


def _tables() -> str:
    """The files of tuned choices and how many they hold."""
    files = [tuned.cache_file()]
    if os.environ.get(tuned.ENVIRONMENT):
        files.insert(0, Path(os.environ[tuned.ENVIRONMENT]))
    found = []
    for file in files:
        if not file.exists():
            found.append(f"{file} (not there)")
            continue
        try:
            found.append(f"{file} ({sum(map(len, tuned.read_table(file).values()))} choices)")
        except (OSError, ValueError, RecursionError) as error:
            found.append(f"{file} (unreadable: {error})")
    return ", ".join(found)


def _machine() -> Section:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "system": platform.platform(), "python": platform.python_version(), "processor": _processor(),
        "cores": str(os.cpu_count()), "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
    }  # fmt: skip


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _packages() -> Section:
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    """The version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> Section:
    return {
        "threads": str(torch.get_num_threads()), "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": str(torch.version.cuda or "none"), "hip": str(torch.version.hip or "none"),
        "float32 precision of products": torch.get_float32_matmul_precision(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }  # fmt: skip


def _gpus() -> Section:
    found: Section = {}
    for index in range(torch.cuda.device_count()):
        of: Any = torch.cuda.get_device_properties(index)
        found[str(index)] = f"{of.name}, {gpu.architecture(index)}, {of.total_memory / 2**30:.1f} GiB"
    return found
