"""Memory traffic of kernels, counted under Triton's interpreter: what each one asks for, per tensor argument."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from fusenc.kernels import add_norm, attention, embed_norm, ffn, rotary, rotary_tables
from torch import Tensor

SECTOR = 32
"""Bytes that DRAM and L2 move at least."""


@dataclass
class Argument:
    """Traffic of one tensor argument. Names that share their memory in a launch (a stand-in for an argument that is
    not there) are joined by ``|``."""

    loaded: int = 0
    """Bytes asked for by loads, lanes that a mask excludes not counted."""
    loaded_once: int = 0
    """Different bytes among them."""
    load_sectors: int = 0
    """32-byte sectors of each load of a block, added up."""
    stored: int = 0
    stored_once: int = 0
    store_sectors: int = 0
    atomics: int = 0
    """Elements updated atomically."""


@dataclass
class Traffic:
    """One launch."""

    kernel: str
    arguments: dict[str, Argument] = field(default_factory=dict)
    dot_flops: int = 0

    @property
    def asked(self) -> int:
        """Bytes loaded and stored."""
        return sum(a.loaded + a.stored for a in self.arguments.values())

    @property
    def once(self) -> int:
        """Bytes if every load and store of the same byte happened once."""
        return sum(a.loaded_once + a.stored_once for a in self.arguments.values())


def _active(addresses: Any, mask: Any) -> np.ndarray[Any, Any]:
    return np.asarray(addresses)[np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(addresses))].astype(np.int64)


class _Counter:
    """Counts the accesses of the launch in progress."""

    def __init__(self, traffic: Traffic, tensors: dict[str, Tensor]) -> None:
        self.traffic = traffic
        names: dict[tuple[int, int], list[str]] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            names.setdefault((storage.data_ptr(), storage.nbytes()), []).append(name)
        self.ranges = [(start, size, "|".join(joined)) for (start, size), joined in names.items() if size]
        self.touched: dict[tuple[str, bool], np.ndarray[Any, Any]] = {}

    def access(self, addresses: Any, mask: Any, width: int, store: bool) -> None:
        lanes = _active(addresses, mask)
        for start, size, name in self.ranges:
            mine = lanes[(lanes >= start) & (lanes < start + size)]
            if not mine.size:
                continue
            argument = self.traffic.arguments.setdefault(name, Argument())
            touched = self.touched.setdefault((name, store), np.zeros(size, dtype=bool))
            for byte in range(width):
                touched[mine - start + byte] = True
            sectors = int(np.unique(mine // SECTOR).size)
            if store:
                argument.stored += mine.size * width
                argument.store_sectors += sectors
            else:
                argument.loaded += mine.size * width
                argument.load_sectors += sectors

    def atomic(self, addresses: Any, mask: Any) -> None:
        lanes = _active(addresses, mask)
        for start, size, name in self.ranges:
            count = int(((lanes >= start) & (lanes < start + size)).sum())
            if count:
                self.traffic.arguments.setdefault(name, Argument()).atomics += count

    def finish(self) -> None:
        for (name, store), touched in self.touched.items():
            argument = self.traffic.arguments[name]
            if store:
                argument.stored_once = int(touched.sum())
            else:
                argument.loaded_once = int(touched.sum())


@contextlib.contextmanager
def count_traffic() -> Iterator[list[Traffic]]:
    """Inside, each launch under the interpreter is counted; gives the list that they are added to.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set before Triton was imported.

    Example:
        >>> with count_traffic() as launches:  # doctest: +SKIP
        ...     copy[(4,)](x, out, x.numel(), BLOCK=1024)
        >>> launches[0].arguments["x_ptr"].loaded  # doctest: +SKIP
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("count_traffic: needs TRITON_INTERPRET=1 in the environment before Triton is imported")
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches: list[Traffic] = []
    counters: list[_Counter] = []

    def width(ptrs: Any) -> int:
        return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)

    def init_args(self: Any, args: Any, kwargs: Any, original: Any = executor._init_args_hst) -> Any:
        host, host_kwargs = original(self, args, kwargs)
        named = dict(zip(self.arg_names, host, strict=False)) | host_kwargs
        tuples = {k: v for k, v in named.items() if isinstance(v, (tuple, list))}
        named |= {f"{k}[{i}]": part for k, parts in tuples.items() for i, part in enumerate(parts)}
        launches.append(Traffic(self.fn.__name__))
        counters.append(_Counter(launches[-1], {k: v for k, v in named.items() if isinstance(v, Tensor)}))
        return host, host_kwargs

    def restore(self: Any, *args: Any, original: Any = executor._restore_args_dev) -> Any:
        counters[-1].finish()
        return original(self, *args)

    def watch(name: str, count: Callable[..., None]) -> Any:
        """Replaces a method of the interpreter's builder by one that counts first."""
        original = getattr(builder, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            count(*args)
            return original(self, *args, **kwargs)

        return mock.patch.object(builder, name, counted)

    def load(ptrs: Any, mask: Any, *rest: Any) -> None:
        counters[-1].access(ptrs.data, mask.data, width(ptrs), False)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        counters[-1].access(ptrs.data, mask.data, width(ptrs), True)

    def update(op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> None:
        counters[-1].atomic(ptr.data, mask.data)

    def swap(ptr: Any, *rest: Any) -> None:
        counters[-1].atomic(ptr.data, True)

    def dot(a: Any, b: Any, *rest: Any) -> None:
        counters[-1].traffic.dot_flops += 2 * a.data.size * b.data.shape[-1]

    with (
        mock.patch.object(executor, "_init_args_hst", init_args),
        mock.patch.object(executor, "_restore_args_dev", restore),
        watch("create_masked_load", load),
        watch("create_masked_store", store),
        watch("create_atomic_rmw", update),
        watch("create_atomic_cas", swap),
        watch("create_dot", dot),
    ):
        yield launches


@dataclass
class Pass:
    """One direction of one function: its launches, and the least that it must move."""

    name: str
    launches: list[Traffic]
    least: int
    """Bytes of its inputs, outputs and what it saves for the backward pass, each once."""


_Call = tuple[Callable[..., Tensor], list[tuple[int, ...]]]

_IDS = torch.randperm(4096, generator=torch.Generator().manual_seed(0)).view(256, 16)
"""Each word once, so that a row read twice shows."""


def _embed_norm(*tables: Tensor) -> Tensor:
    return embed_norm(_IDS, *tables, token_type_ids=_IDS % 2, eps=1e-5)


def _rotary(query: Tensor, key: Tensor) -> Tensor:
    tables = rotary_tables(query.shape[2], query.shape[3], dtype=query.dtype)
    return torch.stack([t for t in rotary(query, key, *tables) if t is not None])


CASES: dict[str, _Call] = {
    "attention 2x2x256x64": (attention, [(2, 2, 256, 64)] * 3),
    "attention 1x2x256x64, causal": (lambda q, k, v: attention(q, k, v, is_causal=True), [(1, 2, 256, 64)] * 3),
    "add_norm 512x256": (add_norm, [(512, 256), (512, 256), (256,), (256,)]),
    "add_norm 1024x768": (add_norm, [(1024, 768), (1024, 768), (768,), (768,)]),
    "add_norm 1024x192, rms": (lambda *t: add_norm(*t, norm="rms"), [(1024, 192), (1024, 192), (192,)]),
    "add_norm 2048x192, x_bias": (
        lambda x, r, w, b, x_bias: add_norm(x, r, w, b, x_bias=x_bias), [(2048, 192), (2048, 192), *[(192,)] * 3],
    ),
    "add_norm 1024x192, recompute": (
        lambda *t: add_norm(*t, recompute=True), [(1024, 192), (1024, 192), (192,), (192,)],
    ),
    "add_norm 1024x192, float32 sum": (
        lambda *t: add_norm(*t, residual_in_fp32=True), [(1024, 192), (1024, 192), (192,), (192,)],
    ),
    "add_norm 16x20000": (add_norm, [(16, 20000), (16, 20000), (20000,), (20000,)]),
    "add_norm 512x1024, dropout": (
        lambda *t: add_norm(*t, dropout_p=0.1), [(512, 1024), (512, 1024), (1024,), (1024,)],
    ),
    "embed_norm 256x16x256": (_embed_norm, [(4096, 256), (16, 256), (2, 256), (256,), (256,)]),
    "rotary 8x12x128x64": (_rotary, [(8, 12, 128, 64), (8, 12, 128, 64)]),
    "ffn 256x128x512": (ffn, [(256, 128), (512, 128), (512,), (128, 512), (128,)]),
    "ffn 256x128x512, gated": (
        lambda *t: ffn(*t, activation="silu", gated=True), [(256, 128), (1024, 128), (1024,), (128, 512), (128,)],
    ),
    "ffn 256x128x512, unfused": (
        lambda *t: ffn(*t[:5], residual=t[5], dropout_p=0.1, out_dropout_p=0.1, recompute="activation", fused=False),
        [(256, 128), (512, 128), (512,), (128, 512), (128,), (256, 128)],
    ),
}  # fmt: skip


def _bytes(tensors: Any) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t is not None}.values())


def passes(names: list[str] | None = None, dtype: torch.dtype = torch.float16) -> list[Pass]:
    """Run the cases (float16) under the interpreter, forward and backward, and count.

    What PyTorch's own matrix products move (in ffn's backward pass) is not counted.
    """
    torch.manual_seed(0)
    result = []
    for case, (call, shapes) in CASES.items():
        if names and not any(case.startswith(name) for name in names):
            continue
        inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
        with count_traffic() as forward:
            out = call(*inputs)
        assert out.grad_fn is not None
        saved = [t for t in getattr(out.grad_fn, "saved_tensors", ()) if t is not None]
        result.append(Pass(f"{case}, forward", forward, _bytes([*inputs, out, *saved])))
        dout = torch.ones_like(out)
        with count_traffic() as backward:
            grads = torch.autograd.grad(out, inputs, dout)
        result.append(Pass(f"{case}, backward", backward, _bytes([dout, *saved, *grads])))
    return result


def passes_in_a_process(names: list[str]) -> list[Pass]:
    """`passes` in a process of its own, since Triton reads TRITON_INTERPRET when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "fusenc.bench.traffic", *names], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"counting under the interpreter failed: {run.stderr.strip().splitlines()[-1]}")
    return [
        Pass(
            p["name"],
            [
                Traffic(t["kernel"], {k: Argument(**a) for k, a in t["arguments"].items()}, t["dot_flops"])
                for t in p["launches"]
            ],
            p["least"],
        )
        for p in json.loads(run.stdout)
    ]


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(p) for p in passes(sys.argv[1:])]))
