"""Differences between versions of torch and Triton. No other file of kernels/ and encoder/ compares versions.

Each difference names the oldest version that does not need it, so that it goes when the floor reaches that version.
Two rules for kernels come from Triton 3.6 and 3.7 and need no code here:

- ``tl.zeros`` does not take a size from a named tuple of constants (``S.BLOCK_M``); ``tl.full`` does. Gone in 3.8.
- A ``@triton.jit`` helper cannot return None inside a tuple. Gone in 3.7.
"""

from __future__ import annotations

import functools
import re
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any

import torch

OLDEST_TORCH = "2.10"
OLDEST_TRITON = "3.6"


def parse(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"version: expected a text like '3.6.0', got {version!r}")
    return int(found[1]), int(found[2])


def require_supported(torch_version: str, triton_version: str) -> None:
    """Raise ImportError if the Triton kernels do not run with these versions of torch and Triton."""
    if parse(torch_version) < parse(OLDEST_TORCH) or parse(triton_version) < parse(OLDEST_TRITON):
        raise ImportError(
            f"fusenc's Triton kernels need torch {OLDEST_TORCH} or newer and Triton {OLDEST_TRITON} or newer, found "
            f"torch {torch_version} and Triton {triton_version}; fusenc.kernels.set_backend('eager') runs PyTorch's "
            "own operators instead"
        )


@functools.cache
def require_supported_triton() -> None:
    """Raise ImportError if the installed torch or Triton is too old for the Triton kernels."""
    import triton

    require_supported(torch.__version__, triton.__version__)


def launcher_without_driver(launch: Any) -> AbstractContextManager[Any]:
    """Inside, Triton's launcher for CUDA calls ``launch`` where it would call a function in C that calls the driver.

    Only launchers that are made inside are affected.
    """
    from unittest import mock  # slow to import

    import triton
    from triton.backends.nvidia import driver

    stack = ExitStack()
    if parse(triton.__version__) < (3, 7):  # compiles a function in C for each kernel, and links libcuda
        stack.enter_context(mock.patch.object(driver, "library_dirs", list))
        module = SimpleNamespace(launch=launch)
        stack.enter_context(mock.patch.object(driver, "compile_module_from_src", lambda **source: module))
    else:  # one function in C for all kernels, which CudaUtils brings, with a description of the arguments
        stack.enter_context(mock.patch.object(driver, "PyKernelArg", lambda **fields: fields))
    return stack
