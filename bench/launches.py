"""How many kernels an encoder layer launches on a GPU, counted on a CPU."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fusenc
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that allocate or describe memory and launch nothing; views are known by their schema.
_NO_KERNEL = (
    "empty", "new_empty", "empty_like", "empty_strided", "resize_", "unsafe_split", "unsafe_split_with_sizes",
    "_unsafe_view", "detach", "_reshape_alias", "alias",
)  # fmt: skip


class _Operators(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU; one each, as nearly all do."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _NO_KERNEL:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Count:
    """Kernels of one layer, by name."""

    forward: Counter[str]
    backward: Counter[str]


def count_layer(layer: nn.Module, source: Tensor) -> Count:
    """Kernels that ``layer(source)`` and its backward pass launch: PyTorch's operators and recorded Triton launches.

    An operator of PyTorch counts as one kernel; flash attention's backward pass, which is three on a GPU, too.

    Args:
        layer: any module from one tensor to one of the same shape, on the CPU.
        source: ``[B, L, D]``, float32.
    """
    source = source.detach().requires_grad_()
    with _counting() as forward:
        out = layer(source)
    upstream = torch.ones_like(out)
    with _counting() as backward:
        torch.autograd.grad(out, [source, *layer.parameters()], upstream)
    return Count(forward(), backward())


def count_call(call: Callable[[], Any], arch: str = "") -> int:
    """Kernels that any call launches: PyTorch's operators and recorded Triton launches, as in `count_layer`.

    Nothing that Triton should compute is computed.

    Args:
        call: on tensors of any device.
        arch: as in `machine_code.compiling.record_launches`.
    """
    with _counting(arch) as found:
        call()
    return found().total()


@contextlib.contextmanager
def _counting(arch: str = "") -> Iterator[Callable[[], Counter[str]]]:
    from .machine_code.compiling import record_launches

    operators = _Operators()
    with record_launches(arch) as launches, operators:
        yield lambda: operators.found + Counter(launch.name for launch in launches)


def layers(dropout: float) -> dict[str, Count]:
    """A post-norm layer in training: torch's with plain and with flash attention, and this library's.

    On a CPU torch's flash attention takes no dropout, so there its own dropout is off; it would be no kernel more.
    """
    options: dict[str, Any] = {"dropout": dropout, "activation": "gelu", "batch_first": True}
    source = torch.randn(2, 16, 64)
    plain, flash = (nn.TransformerEncoderLayer(64, 4, 128, **options) for _ in range(2))
    flash.self_attn.dropout = 0.0
    counts = {}
    with fusenc.kernels.use_backend("eager"):
        with sdpa_kernel(SDPBackend.MATH):
            counts["torch.nn, plain attention"] = count_layer(plain, source)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            counts["torch.nn, flash attention"] = count_layer(flash, source)
    counts["fusenc"] = count_layer(fusenc.TransformerEncoderLayer(64, 4, 128, **options), source)
    return counts
