"""Time bounds of an encoder layer on paper: every kernel at the chip's published peaks.

A kernel takes at least max(FLOPs / tensor peak, bytes / DRAM bandwidth); a layer at least the sum over its kernels, and
at least the time the host needs to launch them. Caches, latency and tails are left out, so real times are longer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .machine_code.chips import Chip, chips

LAUNCH_US = 4.0
"""Host time of one launch from PyTorch in microseconds, the usual order of magnitude; `--launch-us` sets another."""

_ELEMENT = 2
"""Bytes of float16 and bfloat16, the only dtypes of this model."""


@dataclass(frozen=True)
class Shape:
    """An encoder's dimensions."""

    layers: int
    d_model: int
    nhead: int
    dim_feedforward: int


# Published with the models: Devlin et al., 2019; Liu et al., 2019; Wang et al., 2020; Dosovitskiy et al., 2021.
MODELS = {
    "bert-base": Shape(12, 768, 12, 3072),
    "bert-large": Shape(24, 1024, 16, 4096),
    "roberta-base": Shape(12, 768, 12, 3072),
    "minilm-l6": Shape(6, 384, 12, 1536),
    "vit-b": Shape(12, 768, 12, 3072),
    "vit-l": Shape(24, 1024, 16, 4096),
}


def shape_of(model: str, **given: int | None) -> Shape:
    """The dimensions of a model: one of `MODELS`, or a Hugging Face model's folder; those `given` replace its own.

    Raises:
        ValueError: neither, or a model whose configuration has no such widths.
    """
    shape = MODELS.get(model)
    if shape is None and (Path(model) / "config.json").is_file():
        shape = _shape_of_folder(Path(model))
    if shape is None:
        raise ValueError(
            f"unknown model {model!r}, expected one of {', '.join(MODELS)} or a Hugging Face model's folder"
        )
    return replace(shape, **{name: value for name, value in given.items() if value is not None})


_NAMES = {
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "encoder_layers"),
    "d_model": ("hidden_size", "dim", "d_model"),
    "nhead": ("num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads"),
    "dim_feedforward": ("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim"),
}
"""How Hugging Face's families call the dimensions."""


def _shape_of_folder(folder: Path) -> Shape:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = {ours: next((config[name] for name in names if name in config), 0) for ours, names in _NAMES.items()}
    if lacking := [ours for ours, value in found.items() if not (isinstance(value, int) and value)]:
        raise ValueError(f"{folder / 'config.json'}: has no {', '.join(lacking)} by any of the names that encoders use")
    return Shape(**found)


@dataclass(frozen=True)
class Kernel:
    """One kernel's work."""

    name: str
    flops: float
    bytes: float
    times: int = 1

    def seconds(self, chip: Chip) -> float:
        """The least time on `chip`."""
        return self.times * max(self.flops / (chip.tensor_tflops * 1e12), self.bytes / (chip.dram_tb_s * 1e12))


def _pointwise(name: str, elements: float, passes: float, mask_bytes: float = 0.0) -> Kernel:
    return Kernel(name, 0.0, elements * (passes * _ELEMENT + mask_bytes))


def _gemm(name: str, rows: float, inner: float, columns: float, extra: float = 0.0) -> Kernel:
    moved = rows * inner + inner * columns + rows * columns + extra
    return Kernel(name, 2 * rows * inner * columns, _ELEMENT * moved)


def layer(shape: Shape, batch: int, length: int, way: str) -> tuple[list[Kernel], list[Kernel]]:
    """Forward and backward kernels of one post-norm training layer with dropout.

    Args:
        shape: the encoder's dimensions.
        batch: sequences.
        length: tokens of each.
        way: ``"eager"`` (explicit softmax), ``"sdpa"`` (flash attention), ``"compiled"`` (flash attention, pointwise
            chains fused) or ``"fused"`` (this library).

    Raises:
        ValueError: an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    t, d, f = batch * length, shape.d_model, shape.dim_feedforward
    scores = float(batch * shape.nhead * length * length)
    matrix = 2.0 * scores * (d // shape.nhead)  # FLOPs of one L x L product over all heads
    projections = [_gemm("qkv projection", t, d, 3 * d), _gemm("output projection", t, d, d)]
    forward, backward = list(projections), [
        *_linear_backward("qkv projection", t, d, 3 * d, way), *_linear_backward("output projection", t, d, d, way),
    ]  # fmt: skip

    if way == "eager":
        product = Kernel("scores / weighted values", matrix, _ELEMENT * (2 * t * d + scores), 2)
        forward += [product, _pointwise("scale", scores, 2), _pointwise("softmax", scores, 2),
                    _pointwise("dropout", scores, 2, 1)]  # fmt: skip
        backward += [Kernel("scores / weighted values", matrix, _ELEMENT * (2 * t * d + scores), 4),
                     _pointwise("softmax", scores, 3), _pointwise("dropout", scores, 2, 1),
                     _pointwise("scale", scores, 2)]  # fmt: skip
    else:
        row = 4.0 * batch * shape.nhead * length  # float32 statistics
        forward.append(Kernel("attention", 2 * matrix, _ELEMENT * 4 * t * d + row))
        if way == "fused":  # dQ's kernel makes delta of the output, which it reads
            backward += [Kernel("attention: dQ", 3 * matrix, _ELEMENT * 6 * t * d + 2 * row),
                         Kernel("attention: dK, dV", 4 * matrix, _ELEMENT * 6 * t * d + 2 * row)]  # fmt: skip
        else:
            delta = Kernel("attention: delta", 0.0, _ELEMENT * 2 * t * d + row)
            convert = _pointwise("attention: convert dQ", t * d, 3)
            backward += [delta, Kernel("attention: dQ, dK, dV", 5 * matrix, _ELEMENT * 9 * t * d + 2 * row), convert]

    hidden = float(t * f)
    first, second = _gemm("feed-forward 1", t, d, f), _gemm("feed-forward 2", t, f, d)
    if way == "fused":
        # The pre-activation is stored too; the products' own operands are those above.
        forward += [_gemm("feed-forward 1 + GELU + dropout", t, d, f, hidden), second]
        backward += [_gemm("feed-forward: dHidden + GELU'", t, d, f, hidden)]
    else:
        forward += [first, second]
        chain = [_pointwise("GELU + dropout", hidden, 2, 1)] if way == "compiled" else [
            _pointwise("GELU", hidden, 2), _pointwise("dropout", hidden, 2, 1)]  # fmt: skip
        forward += chain
        backward += [_gemm("feed-forward 2: dX", t, d, f)]
        backward += [_pointwise("GELU + dropout", hidden, 3, 1)] if way == "compiled" else [
            _pointwise("dropout", hidden, 2, 1), _pointwise("GELU", hidden, 3)]  # fmt: skip
    backward += [_gemm("feed-forward 2: dW", f, t, d), _gemm("feed-forward 1: dX", t, f, d),
                 _gemm("feed-forward 1: dW", d, t, f)]  # fmt: skip
    if way in ("eager", "sdpa"):  # elsewhere other kernels sum them on the side
        backward += [_pointwise("feed-forward: bias gradients", hidden, 1), _pointwise("bias gradients", t * d, 1)]

    rows = float(t * d)
    if way == "eager" or way == "sdpa":
        forward += 2 * [_pointwise("dropout", rows, 2, 1), _pointwise("add", rows, 3),
                        _pointwise("layer norm", rows, 2)]  # fmt: skip
        backward += 2 * [_pointwise("layer norm: dX", rows, 3), _pointwise("layer norm: dW", rows, 2),
                         _pointwise("dropout", rows, 2, 1), _pointwise("add", rows, 3)]  # fmt: skip
    else:
        mask = 1.0 if way == "compiled" else 0.0  # stored by the compiler, drawn again here
        forward += 2 * [_pointwise("dropout + add + norm", rows, 4, mask)]
        backward += 2 * [_pointwise("dropout + add + norm", rows, 4, mask)]
        backward += 2 * [Kernel("norm: weights", 0.0, 0.0)] if way == "compiled" else []
    return forward, backward


def _linear_backward(name: str, rows: int, inner: int, columns: int, way: str) -> list[Kernel]:
    products = [_gemm(f"{name}: dX", rows, columns, inner), _gemm(f"{name}: dW", inner, rows, columns)]
    return (
        products if way in ("compiled", "fused") else [*products, _pointwise(f"{name}: bias", float(rows * columns), 1)]
    )


WAYS = ("eager", "sdpa", "compiled", "fused")


def run(shape: Shape, batch: int, length: int, gpus: Sequence[str], launch_us: float, details: bool) -> None:
    """Print the bounds.

    Raises:
        ValueError: an unknown GPU, or dimensions that are not positive or do not divide.
    """
    for name, value in {"batch": batch, "seq": length, **vars(shape)}.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if shape.d_model % shape.nhead:
        raise ValueError(f"--nhead: expected a divisor of d_model {shape.d_model}, got {shape.nhead}")
    by_name = {chip.short: chip for chip in chips().values()} | chips()
    for gpu in gpus:
        if gpu not in by_name:
            raise ValueError(f"unknown GPU {gpu!r}, expected one of {', '.join(c.short for c in chips().values())}")
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    for gpu in gpus:
        chip = by_name[gpu]
        table = Table(
            "way", "forward us", "kernels", "launching us", "backward us", "kernels", "launching us",
            "layer ms", "model ms", title=f"{chip.name}: {chip.tensor_tflops:g} TFLOP/s, {chip.dram_tb_s:g} TB/s "
            f"(float16, batch {batch}, length {length}, {shape.layers} layers)", title_justify="left",
        )  # fmt: skip
        for way in WAYS:
            cells, total = [], 0.0
            for kernels in layer(shape, batch, length, way):
                bound = 1e6 * sum(kernel.seconds(chip) for kernel in kernels)
                count = sum(kernel.times for kernel in kernels)
                cells += [f"{bound:,.0f}", str(count), f"{count * launch_us:,.0f}"]
                total += max(bound, count * launch_us)
            table.add_row(way, *cells, f"{total / 1e3:.2f}", f"{shape.layers * total / 1e3:.1f}")
        console.print(table)
        if details:
            for way in WAYS:
                each = Table("pass", "kernel", "GFLOP", "MB", "us", "bound by", title=way, title_justify="left")
                for side, kernels in zip(("forward", "backward"), layer(shape, batch, length, way), strict=True):
                    for k in kernels:
                        computes = k.flops / chip.tensor_tflops > k.bytes / chip.dram_tb_s
                        limit = "tensor cores" if computes else "DRAM"
                        name = f"{k.name} x{k.times}" if k.times > 1 else k.name
                        work = f"{k.times * k.flops / 1e9:.2f}", f"{k.times * k.bytes / 1e6:.1f}"
                        each.add_row(side, name, *work, f"{1e6 * k.seconds(chip):.1f}", limit)
                console.print(each)
    console.print(
        f"Lower bounds at published peaks, {launch_us:g} us of host time a launch; nothing here was measured."
    )
