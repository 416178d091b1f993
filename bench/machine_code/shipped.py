"""Every kernel that the library launches, in every configuration it ships."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fusenc.kernels import BlockMask, add_norm, attention, attention_varlen, ffn
from torch import Tensor

from .compiling import Launch, record_launches

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Unit:
    """A kernel as one case launches it."""

    case: str
    launch: Launch

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.launch.name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _calls(arch: str) -> Iterator[tuple[str, Callable[..., Tensor], list[tuple[int, ...]], torch.dtype]]:
    """Case, call, shapes of the inputs and dtype; forward and backward of each call are recorded."""
    half_heads = [(HALF, d) for d in (16, 32, 64, 128, 256)]
    for dtype, head in [*half_heads, (BRAIN, 64), *((FLOAT, d) for d in (16, 32, 64, 128, 256))]:
        yield f"{_name(dtype)} head {head}", attention, [(2, 4, 512, head)] * 3, dtype

    def mask(*shape: int, dtype: torch.dtype = HALF, gradient: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)

    blocks = BlockMask.sliding_window(512, 128)
    options: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "padding mask": {"attn_mask": mask(2, 1, 1, 512, dtype=torch.bool)},
        "bias": {"attn_mask": mask(1, 4, 512, 512, gradient=True)},
        "dropout": {"dropout_p": 0.1},
        "relative bias, softcap": {"relative_bias": mask(4, 257, gradient=True), "softcap": 30.0},
        "block mask": {"block_mask": blocks.to("meta")},
    }
    for option, arguments in options.items():
        call = functools.partial(attention, **arguments)
        yield f"float16 head 64 {option}", call, [(2, 4, 512, 64)] * 3, HALF
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    packed: Any = functools.partial(
        attention_varlen,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=512,
        max_seqlen_k=512,
        window=(128, 128),
    )
    yield "float16 head 64 packed, window, 4 heads share a key head", packed, [(800, 8, 64), *[(800, 2, 64)] * 2], HALF
    yield "float16 head 80", attention, [(2, 4, 512, 80)] * 3, HALF

    for dtype, width in [(t, w) for t in (HALF, FLOAT) for w in (64, 384, 768, 1024, 4096, 8192, 16384)]:
        shapes: list[tuple[int, ...]] = [(4096, width), (4096, width), (width,), (width,)]
        yield f"{_name(dtype)} width {width}", add_norm, shapes, dtype
    dropped = functools.partial(add_norm, dropout_p=0.1)
    yield "float16 width 1024 dropout", dropped, [(4096, 1024), (4096, 1024), (1024,), (1024,)], HALF

    block: list[tuple[int, ...]] = [(4096, 768), (3072, 768), (3072,), (768, 3072), (768,)]
    for dtype in (HALF, BRAIN, FLOAT):
        yield f"{_name(dtype)} gelu", ffn, block, dtype
    activations: dict[str, dict[str, Any]] = {
        "gelu_tanh": {"activation": "gelu_tanh"}, "relu": {"activation": "relu"}, "gelu dropout": {"dropout_p": 0.1},
    }  # fmt: skip
    for option, arguments in activations.items():
        yield f"float16 {option}", functools.partial(ffn, **arguments), block, HALF

    from fusenc.kernels.ffn import triton_whole

    for (chip, width), config in triton_whole.CONFIGS.items():
        if chip == arch:  # no other launches it
            narrow: list[tuple[int, ...]] = [(16384, width), (4 * width, width), (4 * width,), (width, 4 * width),
                                             (width,), (16384, width)]  # fmt: skip
            whole: Any = functools.partial(triton_whole.whole_ffn, activation="gelu", config=config)
            yield f"float16 width {width} whole block", whole, narrow, HALF


@functools.cache
def units(arch: str) -> tuple[Unit, ...]:
    """All units of a chip, each distinct launch once, under the first case that makes it."""
    found: dict[str, Unit] = {}
    for case, call, shapes, dtype in _calls(arch):
        # Half the inputs of a real call are views of one projection; here each has memory of its own, aligned.
        inputs = [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]
        with record_launches(arch) as launches:
            out = call(*inputs)
            if out.requires_grad:
                out.backward(torch.empty_like(out))
        seen: dict[str, int] = {}
        for launch in launches:
            seen[launch.name] = seen.get(launch.name, 0) + 1
            again = f" #{seen[launch.name]}" if seen[launch.name] > 1 else ""
            found.setdefault(launch.identity, Unit(case + again, launch))
    return tuple(found.values())


def kernels() -> list[str]:
    """The names of all shipped kernels, in order of appearance."""
    return list(dict.fromkeys(unit.kernel for arch in ("", "sm_90") for unit in units(arch)))


def chosen(names: list[str], arch: str) -> list[Unit]:
    """The units of the named kernels, all if `names` is empty, as a chip launches them.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    for name in names:
        if name not in kernels():
            raise ValueError(f"unknown kernel {name!r}, expected one of {', '.join(kernels())}")
    return [unit for unit in units(arch) if not names or unit.kernel in names]
