"""What a fused layer needs to know about the modules whose forward it stands in for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as global_hooks

_GLOBAL_HOOKS = (
    global_hooks._global_forward_pre_hooks,
    global_hooks._global_forward_hooks,
    global_hooks._global_backward_pre_hooks,
    global_hooks._global_backward_hooks,
)


def has_hooks(module: nn.Module, except_of: str = "") -> bool:
    """True if calling the module would do more than its class's forward: hooks, or a forward set on the instance.

    Forward hooks that the Python module `except_of` defines do not count.
    """
    state = module.__dict__
    if state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"] or "forward" in state:
        return True
    hooks = state["_forward_hooks"]
    return bool(hooks) and any(getattr(hook, "__module__", None) != except_of for hook in hooks.values())


def why_not_plain(modules: Iterable[tuple[str, nn.Module, type[nn.Module]]], except_of: str = "") -> str:
    """Why these modules cannot be stood in for, or "": each must be of just its type, without hooks.

    A quantised, parametrised or adapter-wrapped module has another type; a hook expects to be called.
    """
    if any(_GLOBAL_HOOKS):
        return "hooks on all modules are set"
    for name, module, kind in modules:
        if type(module) is not kind:
            return f"{name} is a {type(module).__name__}, not a {kind.__name__}"
        if has_hooks(module, except_of):
            return f"{name} has hooks or a forward of its own"
    return ""


def activation_name(activation: Callable[..., Any]) -> str | None:
    """The kernels' name of an activation function or module, None for one they do not have."""
    if activation in (F.relu, torch.relu) or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if activation is F.silu or type(activation) is nn.SiLU:
        return "silu"
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return None
