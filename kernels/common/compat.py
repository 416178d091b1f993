"""Differences between versions of torch and Triton. No other file of kernels/ and encoder/ compares versions.

Each difference names the oldest version that does not need it, so that it goes when the floor reaches that version.
Two rules for kernels come from Triton 3.6 and 3.7 and need no code here:

- ``tl.zeros`` does not take a size from a named tuple of constants (``S.BLOCK_M``); ``tl.full`` does. Gone in 3.8.
- A ``@triton.jit`` helper cannot return None inside a tuple. Gone in 3.7.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any, NamedTuple

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


def tf32_allowed() -> bool:
    """True if torch's switches let float32 products round their inputs to TF32."""
    return _fp32_precision() == "tf32"


def _fp32_precision() -> str:
    # Not allow_tf32: reading that raises once a program has used the newer switch.
    return str(torch.backends.cuda.matmul.fp32_precision)


_GETTER: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
if _GETTER is not None:  # what the attribute reads, at a sixth of its price
    _fp32_precision = functools.partial(_GETTER, "cuda", "matmul")  # type: ignore[assignment]


_HOOKS: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saves_through_hooks() -> bool:
    """True if tensors that are saved for a backward pass go through hooks, which may return others; or unknown."""
    return _HOOKS is None or _HOOKS(True) is not None


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its look at the arguments for torch.func, under whose transforms it must not run."""
    apply = getattr(super(torch.autograd.Function, function), "apply", None)
    return function.apply if apply is None else apply


class DirectLaunch(NamedTuple):
    """How to launch a compiled kernel without Triton's argument binder."""

    run: Callable[..., None]
    """``(x, y, z, stream, *handles, launch_metadata, enter_hook, exit_hook, *arguments)``"""
    handles: tuple[Any, Any]
    stream: Callable[[int | None], int]
    """The current stream of a device, as the driver's handle."""
    hooks: tuple[list[Any], list[Any]]
    """Triton's launch hooks; while there are any, launches have to go through the JIT."""


def direct_launch(compiled: Any, kernel: Any, changing: tuple[Any, ...]) -> DirectLaunch | None:
    """How to launch again what Triton's JIT has just launched; None where only the JIT can.

    That is so under Triton's interpreter, where another program stands in for the JIT, and for numbers past 31 bits,
    whose type is not that of smaller ones. The same in Triton 3.6 to 3.9.

    Raises:
        AssertionError: a number among the arguments that change is specialised, so that another would not fit.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction) or JITFunction.run.__module__ != "triton.runtime.jit" or compiled is None:
        return None
    for parameter, value in zip(kernel.params, changing, strict=False):
        numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, int)]
        assert parameter.do_not_specialize or not numbers, f"{kernel.__name__}: {parameter.name} is specialised"
        if not all(-(2**31) <= n < 2**31 for n in numbers):
            return None
    runtime = knobs.runtime
    return DirectLaunch(
        compiled.run, (compiled.function, compiled.packed_metadata), driver.active.get_current_stream,
        (runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls),
    )  # fmt: skip


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
