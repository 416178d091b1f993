"""Launches whose driver does nothing: what is left is the host's own cost of a call.

Everything between a public function and the driver runs as on a GPU: checks, choice of configuration, allocation,
autograd, Triton's cache of compiled kernels and its CUDA launcher, up to the C function that unpacks the arguments and
calls ``cuLaunchKernel``. Kernels are compiled, for sm_90. Not in it: that C function, and two questions to torch about
the current device, some microsecond a launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from fusenc.kernels.common import backend, compat, plan
from fusenc.kernels.common import device as gpu

from .machine_code.chips import chips

ARCH = "sm_90"


class _Utils:
    """The driver's C module, with functions that do nothing."""

    launches = 0

    def launch(self, *arguments: Any) -> None:
        self.launches += 1

    def build_signature_metadata(self, signature: Any) -> bytes:
        return b""

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": chips()[ARCH].block_shared}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 0, 0, 0, 1024  # a module's handle, a function's, registers, spills, threads


class _Driver:
    """What Triton asks of a driver."""

    DEVICE = "stub"  # Triton keeps compiled kernels by device, so those of a real one stay apart

    def __init__(self) -> None:
        self.utils = _Utils()
        self._functions: set[Any] = set()

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        """Triton's own launcher."""
        from triton.backends.nvidia.driver import CudaLauncher

        self._functions.add(src.fn)
        return CudaLauncher(src, metadata)

    def forget(self) -> None:
        """Let go of the compiled kernels, whose modules no real driver may unload."""
        for function in self._functions:
            for kernel in function.device_caches.pop(self.DEVICE)[0].values():
                kernel.module = None

    def get_current_device(self) -> str:
        return self.DEVICE

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return chips()[ARCH].gpu_target


@contextlib.contextmanager
def stubbed_driver() -> Iterator[_Utils]:
    """Inside, the library takes the GPU path with tensors of the CPU, and launches do nothing.

    Outputs are what `torch.empty` left in memory, so nothing can be said of values.

    Yields:
        What counts the launches, in `launches`.
    """
    from triton.runtime import driver

    stub = _Driver()
    with contextlib.ExitStack() as stack:
        stack.callback(plan.forget)
        stack.callback(stub.forget)
        stack.enter_context(mock.patch.object(driver, "_active", stub))
        stack.enter_context(compat.launcher_without_driver(stub.utils.launch))
        # As under Triton's interpreter the real decision then lets tensors of the CPU pass.
        stack.enter_context(mock.patch.object(backend, "_INTERPRET", True))
        stack.enter_context(mock.patch.object(gpu, "compute_units", lambda index: chips()[ARCH].units))
        stack.enter_context(mock.patch.object(gpu, "architecture", lambda index: ARCH))
        plan.forget()
        # PyTorch's products on the CPU read outputs that nothing was written to; subnormal numbers would slow them.
        stack.callback(torch.set_flush_denormal, False)
        torch.set_flush_denormal(True)
        yield stub.utils
