"""What the families share: activations, what a running call records, and the classes that replace stock classes."""

from __future__ import annotations

import sys
from typing import Any

from transformers.activations import ACT2FN
from transformers.utils import output_capturing

ACTIVATIONS = {
    type(ACT2FN[theirs]): ours
    for theirs, ours in (
        ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"),
    )
}  # fmt: skip
"""The kernels' name of an activation module of transformers."""

CAPTURE = output_capturing.__name__
"""transformers leaves hooks of this module that sleep until a call asks for hidden states or attentions."""


def collected() -> Any:
    """The outputs (hidden states, attentions) that the running call of a model records, by name; empty if none."""
    return output_capturing._active_collector.get() or {}


def fused_class(mixin: type, plain: type, **attributes: Any) -> type:
    """A subclass of `plain` whose forward is that of `mixin`, found by pickle in the mixin's module."""
    name = f"Fused{plain.__name__}"
    fused = type(name, (mixin, plain), {"__module__": mixin.__module__, "__doc__": mixin.__doc__, **attributes})
    setattr(sys.modules[mixin.__module__], name, fused)
    return fused
