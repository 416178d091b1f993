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


class Watched:
    """The parts of a module as they are now: `unchanged` tells in a few microseconds whether a part, its type, its
    hooks or its forward have changed since.

    Parts are known by identity and type, hooks by their numbers, which are never given twice.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())[1:]  # not itself: it may be what this is kept for
        self._kinds = list(map(type, self._modules))
        self._dicts = [part.__dict__ for part in self._modules]
        children = [part["_modules"] for part in (module.__dict__, *self._dicts)]
        hooks = [part[name] for part in self._dicts for name in _HOOKS]
        self._empty = [each for each in (*children, *hooks) if not each]
        self._children = [(each, tuple(each.values())) for each in children if each]
        self._hooks = [(each, tuple(each)) for each in hooks if each]
        self._config, self._way = _attention_of(module)
        self._parameters = [part["_parameters"] for part in self._dicts if part["_parameters"]]
        self._dtypes = self._dtypes_now()

    def _dtypes_now(self) -> list[torch.dtype]:
        return [t.dtype for parameters in self._parameters for t in parameters.values() if t is not None]

    def unchanged(self) -> bool:
        """True if all is as it was."""
        if self._dtypes_now() != self._dtypes or list(map(type, self._modules)) != self._kinds:
            return False
        if any(_GLOBAL_HOOKS) or any(self._empty) or any("forward" in each for each in self._dicts):
            return False
        if getattr(self._config, "_attn_implementation", None) != self._way:
            return False
        return all(tuple(each.values()) == parts for each, parts in self._children) and all(
            tuple(each) == numbers for each, numbers in self._hooks
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _attention_of(module: nn.Module) -> tuple[Any, Any]:
    """The configuration that says how attention is computed, and what it says."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            return config, config._attn_implementation
    return None, None


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
