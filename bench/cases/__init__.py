"""What `fusenc bench` measures, one module an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..timing import Device
from . import add_norm, attention, decoder, embed_norm, encoder, ffn, host, layer, model, rotary
from .case import Case, Given

OPS: dict[str, Callable[[Given, Device], list[Case]]] = {
    "host": host.cases,
    "add_norm": add_norm.cases,
    "embed_norm": embed_norm.cases,
    "rotary": rotary.cases,
    "attention": attention.cases,
    "ffn": ffn.cases,
    "layer": layer.cases,
    "model": model.cases,
    "encoder": encoder.cases,
    "decoder": decoder.cases,
}
"""Each gives the cases of its op at the sizes asked for, on a device."""


def cases(ops: Sequence[str], given: Given, device: Device) -> list[Case]:
    """The cases of some ops, or of all with ``"all"``.

    Raises:
        ValueError: an unknown op, sizes that do not fit; the message lists what is known.
    """
    for name in ops:
        if name not in (*OPS, "all"):
            raise ValueError(f"unknown op {name!r}, expected one of {', '.join((*OPS, 'all'))}")
    chosen = OPS if "all" in ops else {name: OPS[name] for name in dict.fromkeys(ops)}
    return [case for make in chosen.values() for case in make(given, device)]
