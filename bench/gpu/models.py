"""Part 4: bert-base with random weights, inference in bfloat16 and a training step under autocast."""

from __future__ import annotations

from ..cases import model
from ..cases.case import Case, Point
from ..timing import Device
from .listing import once_more, only, through_compiler

SIZES = ((32, 128, 0.5), (32, 512, 0.5), (8, 128, 1.0), (1, 128, 1.0))
"""Sequences, tokens of the longest, and how much of the batch is real, in order of value."""
STOCK = ("hf-sdpa", "hf-sdpa-flash", "hf-sdpa-cudnn")
OURS = ("fusenc", "fusenc-packed", "fusenc-flattened")


def cases(device: Device, tiny: bool) -> list[Case]:
    """Inference and training at each size; CUDA graphs last, since a capture that fails may harm what follows."""
    found = _berts(device, tiny)
    graphs = [once_more(case, ("hf-sdpa",), ("fusenc-graph",), "graph") for case in found]
    return [*(only(case, STOCK, OURS) for case in found), *graphs]


def compiled(device: Device, tiny: bool) -> list[Case]:
    """The same beside torch.compile."""
    found = _berts(device, tiny)
    return [through_compiler(case, ("hf-sdpa",), "compile") for case in (found[:1] if tiny else found)]


def _berts(device: Device, tiny: bool) -> list[Case]:
    found = []
    for batch, length, fill in SIZES:
        for direction in ("forward", "both"):
            sizes = (min(batch, 4), length // 8, 32, 2) if tiny else (batch, length, 768, 12)
            point = Point("bfloat16", *sizes, fill, direction, device.kind, device.where)
            found.append(model.case(point, device, layers=2 if tiny else 12, autocast=direction == "both"))
    return found
