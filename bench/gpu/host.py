"""Part 2: the host's time from a public call to the end of its launches."""

from __future__ import annotations

import dataclasses

from .. import timing
from ..cases import host, layer, model
from ..cases.case import Case, Point
from .listing import only

ORDER = ("encoder_layer", "attention", "add_norm", "ffn", "linear_act", "embed_norm", "attention_varlen", "rotary",
         "attention_with_weights", "attention_weights")  # fmt: skip
LAYER = ("torch.nn", "fast-path")
MODEL = ("hf-sdpa",)


class HostClock(timing.Cpu):
    """The host's time of a call that launches on another device, whose queue is empty before and stays short."""

    least = 2e-4

    def __init__(self, device: timing.Device) -> None:
        super().__init__()
        self.name, self.kind, self.where = device.name, device.kind, device.where
        self._device, self._wait = device, device.finished(lambda: None)

    def seconds(self, call: timing.Call, calls: int = 1) -> float:
        """Mean time until a call returns."""
        self._wait()
        taken = super().seconds(call, calls)
        self._wait()
        return taken

    def captured(self, call: timing.Call) -> timing.Call:
        """As the device captures."""
        return self._device.captured(call)

    def release(self) -> None:
        """Give back the device's memory."""
        self._device.release()


def cases(device: timing.Device, tiny: bool) -> list[Case]:
    """Layers and models of one short sequence, where only the host counts, then each public function."""
    sizes = (8, 32, 2, 2) if tiny else (16, 768, 12, 12)
    found = []
    for direction in ("forward", "both"):
        length, width, heads, layers = sizes
        point = Point("bfloat16", 1, length, width, heads, 1.0, direction, device.kind, device.where)
        found.append(only(layer.case(point), LAYER, ("fusenc",)))
        found.append(only(model.case(point, device, layers), MODEL, ("fusenc",)))
    names = ("add_norm",) if tiny else ORDER
    found += [
        host.launching(name, direction, device)
        for direction in ("forward", "both")
        for name in names
        if direction == "forward" or host.FUNCTIONS[name].gradients
    ]
    return [case if case.op == "host" else dataclasses.replace(case, op="host") for case in found]
